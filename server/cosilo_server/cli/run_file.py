"""A run as an admin writes it down: a TOML of plain values, and how it becomes a manifest.

A preset fills whole sections and the file overrides single values of them. An unknown key is an error that names it.
Must not know torch, sockets or who signs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from cosilo_common.canonical import sha256
from cosilo_common.diffusion.lora import Lora, file_bytes
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Architecture, Preset
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import (
    PLAIN_AGGREGATION,
    SECURE_AGGREGATION,
    SECURE_SITES_MIN,
    CardTerms,
    CorrectionTerms,
    Deadlines,
    DownlinkTerms,
    EncodingTerms,
    EvaluationTerms,
    Manifest,
    ServerOptimiserTerms,
    WarmStartTerms,
    parse_manifest,
)
from cosilo_common.weights import TensorTable

RUN_FILE_BYTES_MAX = 1 << 20  # a thousand participants' names are 64 kB; a file beyond this is another file
ALL: Final = "all"
SECTIONS: Final = ("architecture", "schedule", "training", "sampling")  # what a preset fills
# Tables that a manifest is without where the file is.
OPTIONAL: Final[Mapping[str, Any]] = {
    "evaluation": EvaluationTerms,
    "warm_start": WarmStartTerms,
    "lora": Lora,
    "correction": CorrectionTerms,
    "downlink": DownlinkTerms,
}
TERMS: Final[Mapping[str, Any]] = {
    "encoding": EncodingTerms,
    "server_optimiser": ServerOptimiserTerms,
    "deadlines": Deadlines,
    "card": CardTerms,
}
SCALARS: Final = ("name", "aggregation", "n_min", "f", "cohort", "rounds_max", "ema_decay", "max_rounds_per_model")
WORKED_OUT: Final = frozenset({"base_bytes"})  # of [lora], from the architecture
KEYS: Final = frozenset({"preset", "participants", *SCALARS, *SECTIONS, *TERMS, *OPTIONAL})

_OPERATION = "read run file"
_UNKNOWN_KEY = "extra_forbidden"


class RunFile:
    """A run file, checked as far as it can be without knowing who takes part.

    values: the manifest's keys as the file and its preset give them, without participants, tensors, nonce and
    federation. participants: names, or None for every site of the members list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        given = _read(path)
        _refuse_unknown(path, given, KEYS, "")
        self.participants = _participants(path, given.get("participants", ALL))
        self.recipe = _recipe(path, given)
        self.seed_given = "seed" in _section(path, given, "training")
        self.values: dict[str, Any] = {key: given[key] for key in SCALARS if key in given}
        for name, kind in {**TERMS, **{name: kind for name, kind in OPTIONAL.items() if name in given}}.items():
            section = _section(path, given, name)
            _refuse_unknown(path, section, frozenset(kind.model_fields) - WORKED_OUT, f"{name}.")
            self.values[name] = section
        if "name" not in self.values:
            raise _error(path, "the key name is missing", 'give the run a name: name = "digits-1"')
        aggregation = self.values.setdefault("aggregation", SECURE_AGGREGATION)
        if aggregation not in (SECURE_AGGREGATION, PLAIN_AGGREGATION):
            raise _error(
                path,
                f"aggregation: {aggregation!r} is unknown",
                f'write "{SECURE_AGGREGATION}" or "{PLAIN_AGGREGATION}"',
            )

    @property
    def architecture(self) -> Architecture:
        """The model's shape."""
        return self.recipe.architecture

    @property
    def plain(self) -> bool:
        """Whether the coordinator would see every single update."""
        return bool(self.values["aggregation"] == PLAIN_AGGREGATION)

    @property
    def adapts(self) -> bool:
        """Whether the run trains LoRA adapters."""
        return "lora" in self.values

    def manifest(
        self,
        federation: str,
        site_keys: Mapping[str, bytes],
        table: TensorTable,
        nonce: bytes,
        adapters: Callable[[Lora], TensorTable] | None = None,
    ) -> Manifest:
        """The manifest of this file. table: of the architecture; adapters: gives that of a [lora], and is asked where there is one.

        site_keys: Ed25519 public keys (32 bytes) of every site in the verified members list, by name; nonce: 16
        random bytes. Where the file leaves them out, training.seed is drawn from the nonce; n_min is 3, or all of fewer plain-sum
        participants; f is a third of the participants, at least 1, and 0 in plain sum. Raises CosiloError naming the key that is wrong.
        """
        names = sorted(site_keys) if self.participants is None else sorted(self.participants)
        strangers = [name for name in names if name not in site_keys]
        if strangers:
            raise _error(
                self.path,
                f"participants: not in the members list as a site: {', '.join(strangers[:5])}",
                "run cosilo members for the list, cosilo site approve NAME to add one",
            )
        if not names:
            raise _error(self.path, "participants: the federation has no site yet", "run cosilo site invite NAME --out FILE")
        secure = not self.plain
        defaults = {
            "n_min": SECURE_SITES_MIN if secure else min(SECURE_SITES_MIN, len(names)),
            "f": max(1, len(names) // 3) if secure else 0,
        }
        recipe = self.recipe.model_dump()
        if not self.seed_given:
            recipe["training"]["seed"] = _own_seed(nonce)
        values, tensors = self.values, table
        if self.adapts:
            assert adapters is not None  # whoever has a file with [lora] knows how it becomes tensors
            lora = self._lora(table)
            values, tensors = {**values, "lora": lora.model_dump()}, adapters(lora)
        try:
            manifest = Manifest.model_validate(
                {
                    **defaults,
                    **values,
                    **recipe,
                    "federation": federation,
                    "nonce": nonce.hex(),
                    "participants": [{"name": name, "key": site_keys[name].hex()} for name in names],
                    "tensors": tensors.entries,
                }
            )
        except ValidationError as error:
            raise _error(self.path, _describe(error), "correct the named value") from None
        return parse_manifest(manifest.explicit().canonical())  # what is signed is what everybody else will be able to read

    def _lora(self, base: TensorTable) -> Lora:
        try:
            return Lora.model_validate({**self.values["lora"], "base_bytes": file_bytes(base)})
        except ValidationError as error:
            raise _error(self.path, _describe(error, "lora."), "correct the named value") from None


def _own_seed(nonce: bytes) -> int:
    """A seed that no other run has: two runs of one seed train alike from one model, and the difference of their sums could be one site's."""
    return int.from_bytes(sha256(b"cosilo/run-seed/1" + nonce)[:8], "big") >> 1


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(RUN_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _error(path, error.strerror or "unreadable", "check the path") from None
    if len(data) > RUN_FILE_BYTES_MAX:
        raise _error(path, f"longer than {RUN_FILE_BYTES_MAX} bytes", "check that it is the right file")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # no TOML, no text, a number of thousands of digits, thousands of brackets
        raise _error(path, f"not TOML: {error}", "correct the file") from None


def _recipe(path: Path, given: Mapping[str, Any]) -> Preset:
    """The four sections of a diffusion recipe, valid together."""
    sections = {name: _section(path, given, name) for name in SECTIONS}
    base: dict[str, Any] = {}
    if "preset" in given:
        if not isinstance(given["preset"], str):
            raise _error(path, "preset: must be a name in quotes")
        base = preset(given["preset"]).model_dump()
    elif not sections["architecture"]:
        raise _error(
            path,
            "neither preset nor [architecture] is given",
            'name a preset, as in preset = "digits", or describe the model',
        )
    merged = {name: {**base.get(name, {}), **section} for name, section in sections.items()}
    try:
        return Preset.model_validate(merged)
    except ValidationError as error:
        raise _error(path, _describe(error), "correct the named value") from None


def _section(path: Path, given: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = given.get(name, {})
    if not isinstance(section, dict):
        raise _error(path, f"{name}: must be a section", f"write [{name}] on a line of its own")
    return section


def _participants(path: Path, value: object) -> tuple[str, ...] | None:
    if value == ALL:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise _error(path, 'participants: must be "all" or a list of names')
    if len(set(value)) != len(value):
        raise _error(path, "participants: a name stands twice")
    return tuple(value)


def _refuse_unknown(path: Path, given: Mapping[str, Any], known: frozenset[str], prefix: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise _error(path, f"unknown key {prefix}{unknown[0]}", f"known are {', '.join(sorted(known))}")


def _describe(error: ValidationError, prefix: str = "") -> str:
    """One line that names each wrong key."""
    lines = []
    for item in error.errors(include_url=False)[:5]:
        key = (prefix + ".".join(str(part) for part in item["loc"])).rstrip(".") or "the run"
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"unknown key {key}" if item["type"] == _UNKNOWN_KEY else f"{key}: {message}")
    return "; ".join(lines)


def _error(path: Path, subject: str, hint: str = "") -> CosiloError:
    return CosiloError(_OPERATION, f"{path}: {subject}", hint)
