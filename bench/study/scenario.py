"""A scenario: a TOML file as values. Data, its split, the arms that are compared at one image budget, and how they are scored.

Owns the keys and their bounds; an unknown key is an error that names it. What an arm says under `run` is passed to the run file as it is:
`cosilo run create` judges it. Must not know data, processes or torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cosilo_common.canonical import canonical_json, sha256
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import describe_validation

SITES_MAX = 64  # a daemon each, some 80 MB; trainers of many sites are not kept warm (federated.py)
EVALUATIONS_MAX = 10  # a centralised arm is one call of the trainer, which reports at tenths

Count = Annotated[int, Field(ge=1, le=100_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**32)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Plain):
    """kind: "fashion-mnist" (Debian's dataset-fashion-mnist) or "folders" (a folder for each site, and `holdout`; given with --data).

    images: how many of Fashion-MNIST's training images are used, drawn with subset_seed; test_images: how many others score the model.
    """

    kind: Literal["fashion-mnist", "folders"]
    images: Count = 6000
    test_images: Count = 2000
    subset_seed: Seed = 0


class Division(_Plain):
    """How images are given to sites. kind: "labels" (label skew) or "quantity" (size skew), both Dirichlet(beta), or "folders" as they lie.

    least: images that every site has at the very least; seed: of the draw, the same for every arm and seed of a scenario.
    """

    kind: Literal["labels", "quantity", "folders"]
    sites: Annotated[int, Field(ge=3, le=SITES_MAX)] = 4
    beta: Annotated[float, Field(gt=0)] = 0.5
    least: Count = 100
    seed: Seed = 0


class Budget(_Plain):
    """images: seen in training, by all sites together; evaluations: how often on the way, evenly, the last one at its end."""

    images: Count
    evaluations: Annotated[int, Field(ge=1, le=EVALUATIONS_MAX)] = 1

    @model_validator(mode="after")
    def _tenths(self) -> Self:
        if EVALUATIONS_MAX % self.evaluations:
            raise ValueError(f"evaluations must divide {EVALUATIONS_MAX}: 1, 2, 5 or 10")
        return self

    def points(self) -> list[int]:
        """Images seen at each evaluation."""
        return [self.images * (k + 1) // self.evaluations for k in range(self.evaluations)]


class Assessment(_Plain):
    """extractor: see cosilo_common.evaluation.extractors; samples: images drawn from each checkpoint, with the same noise (seed) for all."""

    extractor: str = "efficientnet-lite0"
    samples: Annotated[int, Field(ge=10, le=50_000)] = 2000
    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    seed: Seed = 1
    raw: bool = False  # the weights themselves where a run keeps a moving average as well


class Arm(_Plain):
    """One thing that is compared. mode: "federated" (real daemons, masks on) or "centralised" (the trainer over pooled images).

    run: keys of a run file that override the scenario's; seeds: instead of the scenario's.
    """

    name: Name
    mode: Literal["federated", "centralised"] = "federated"
    run: dict[str, Any] = {}
    seeds: tuple[Seed, ...] | None = None


class Scenario(_Plain):
    """A whole file. base: the arm whose gap to the centralised one the others are measured against."""

    name: Name
    about: str = ""
    data: Data
    split: Division
    budget: Budget
    evaluation: Assessment = Assessment()
    run: dict[str, Any]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    base: Name = "fedavg"
    arm: Annotated[tuple[Arm, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [arm.name for arm in self.arm]
        if len(set(names)) != len(names):
            raise ValueError("arm: a name stands twice")
        if (self.data.kind == "folders") != (self.split.kind == "folders"):
            raise ValueError('data.kind = "folders" and split.kind = "folders" go together')
        return self

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The arm's own seeds, or the scenario's."""
        return self.seeds if arm.seeds is None else arm.seeds

    def plan(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The run file of one cell: the scenario's keys, the arm's over them, and the seed as training.seed."""
        merged = _merged(_merged(self.run, arm.run), {"training": {"seed": seed}})
        return {"name": f"{self.name[:60]}-{arm.name[:30]}-{seed}", **merged}

    def fingerprint(self, arm: Arm, seed: int) -> str:
        """What a cell's result depends on, in hex: a finished cell of the same fingerprint is not run again."""
        parts = {name: getattr(self, name).model_dump(mode="json") for name in ("data", "split", "budget", "evaluation")}
        return sha256(canonical_json({**parts, "mode": arm.mode, "plan": self.plan(arm, seed)})).hex()


def read_scenario(path: Path) -> Scenario:
    """Parses a scenario. Raises CosiloError naming the file and the key that is wrong."""
    try:
        return Scenario.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CosiloError("read scenario", f"{path}: {error.strerror}", "name a file of bench/study/scenarios") from None
    except tomllib.TOMLDecodeError as error:
        raise CosiloError("read scenario", f"{path}: {error}", "correct the TOML") from None
    except ValidationError as error:
        raise CosiloError("read scenario", f"{path}: {describe_validation(error)}", "correct the named value") from None


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings' keys, over's values first, tables merged."""
    result = dict(under)
    for key, value in over.items():
        result[key] = _merged(result[key], value) if isinstance(value, Mapping) and isinstance(result.get(key), Mapping) else value
    return result
