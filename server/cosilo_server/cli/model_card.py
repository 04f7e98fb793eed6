"""The model card of an exported checkpoint: a README.md as model hubs read it, YAML front matter and sections, from what the coordinator knows.

Front matter after https://huggingface.co/docs/hub/model-cards; sections after Mitchell et al. 2019, "Model Cards for Model Reporting". Owns the
words. Whatever somebody else chose (names, software, scores) is escaped: it can be read, and makes no heading, link, image or HTML. Must not know
the wire.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cosilo_common.errors import CosiloError, one_line
from cosilo_common.manifest import Manifest
from cosilo_common.transfer import file_digest
from cosilo_server.cli.shapes import CheckpointShape, RoundShape
from cosilo_server.cli.terminal import number_words, time_words

SCORES_BYTES_MAX: Final = 16 << 20  # a study's results.json with every cell is below 1 MB
ROUNDS_SHOWN: Final = 40  # rows of losses: a screen; longer runs are thinned, and their first and last rounds stay
SCORE_ROWS_MAX: Final = 100
_SCORE_COLUMNS: Final = ("seeds", "images", "fid", "fid_test", "inception_score", "kid", "precision", "recall", "loss_test")
_CELL_CHARS: Final = 80
# What means something within a line: CommonMark's own, and on hubs also addresses that link themselves, :emoji:, @names and $formulas$.
_MEANING: Final = re.compile(r"([\\`*_\[\]<>|#!&~@$]|:(?=[^\s\d])|(?<=www)\.)", re.IGNORECASE)


@dataclass(frozen=True)
class CardFacts:
    """What is known of an exported checkpoint.

    artifact: "ema" or "weights"; class_index: of a folder of one class; scores: a results.json's summary.
    """

    manifest: Manifest
    signer: str
    signature: bytes
    members_version: int
    software: str
    checkpoint: CheckpointShape
    artifact: str
    digest: str
    rounds: Sequence[RoundShape]
    class_index: int | None = None
    scores: Mapping[str, Mapping[str, Any]] | None = None


def read_scores(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The summary of a results.json (bench/study): by arm, what was scored. Raises CosiloError where it is none."""
    try:
        if path.stat().st_size > SCORES_BYTES_MAX:
            raise CosiloError("read scores", f"{path} is larger than {SCORES_BYTES_MAX} bytes", "give a results.json of the study")
        summary = json.loads(path.read_bytes())["summary"]
    except OSError as error:
        raise CosiloError("read scores", f"{path}: {error.strerror}", "name a results.json") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CosiloError("read scores", f"{path} is no JSON object with a summary", "give a results.json of the study") from None
    if not isinstance(summary, dict) or not summary or not all(isinstance(row, dict) for row in summary.values()):
        raise CosiloError("read scores", f"{path}: its summary names no arm", "give a results.json of the study")
    return summary


def model_card(facts: CardFacts, folder: Path) -> str:
    """The card of the exported folder, as Markdown."""
    return "\n".join([*_front_matter(facts), *_sections(facts, folder)]) + "\n"


def escaped(text: object, chars: int = _CELL_CHARS) -> str:
    """Somebody else's words as Markdown that shows them and does nothing else: one line, at most so many characters of them."""
    line = one_line(str(text))
    return _MEANING.sub(r"\\\1", line if len(line) <= chars else line[: chars - 3] + "...")


def _front_matter(facts: CardFacts) -> Iterator[str]:
    """YAML, of which JSON's strings are a part."""
    license_id = facts.manifest.card.license
    yield "---"
    if license_id:
        yield f"license: {json.dumps(license_id)}"
    yield "library_name: diffusers"
    yield "pipeline_tag: unconditional-image-generation"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("diffusers", "diffusion", "federated-learning", "cosilo"))
    yield "---"


def _sections(facts: CardFacts, folder: Path) -> Iterator[str]:
    manifest = facts.manifest
    yield from ("", f"# {escaped(manifest.name, 100)}", "")
    yield "A diffusion model of images, trained by federated learning with Cosilo: the images stayed with those who hold them."
    yield from _use(facts)
    yield from _training(facts)
    yield from _scores(facts)
    yield from _provenance(facts, folder)


def _use(facts: CardFacts) -> Iterator[str]:
    pipeline = "CosiloPipeline" if facts.class_index is None else "DDIMPipeline"
    module = "cosilo_common.diffusion.pipeline" if facts.class_index is None else "diffusers"
    yield from ("", "## Use", "")
    yield from ("```python", f"from {module} import {pipeline}", "", f'pipeline = {pipeline}.from_pretrained("path/to/this/folder")', "```")
    if facts.class_index is not None:
        yield from ("", f"This folder draws class {facts.class_index} only.")
    yield from (
        "",
        "**Intended**: research on image generation and on federated learning; looking at what a model of the participants' images draws.",
    )
    yield from ("", "**Not intended**", "")
    yield "- Diagnosis, treatment or any decision about a person. The model is no medical device, and nobody has validated it as one."
    yield "- Standing in for real images as evidence: what it draws shows no patient, place or thing that exists."
    yield "- Training or testing of a medical device on drawn images alone."
    yield from ("", "## Limits", "")
    yield "- A model may have kept single training images and draw them again. Secure aggregation hides each site's update from the coordinator; it"
    yield "  is not differential privacy, and says nothing about what the finished model gives away. Nobody has measured that here."
    yield "- Images that sites hold few of are drawn worse, and biases of the sites' collections are the model's."
    yield "- The images themselves are not described here: the coordinator never saw them, and the sites' own records have to say where they"
    yield "  are from, who consented, and to what."
    yield "- Sites were trusted to train on what they said. A site that did not would not show in these figures."


def _training(facts: CardFacts) -> Iterator[str]:
    manifest = facts.manifest
    closed = [r for r in facts.rounds if r["phase"] == "closed" and r["kind"] == "train" and r["round"] <= facts.checkpoint["round"]]
    yield from ("", "## Training", "")
    yield from ("| | |", "| --- | --- |")
    yield _line("participants", _participants(manifest))
    yield _line("training rounds in this checkpoint", str(len(closed)))
    if closed:
        in_sum = [len(r["survivors"]) for r in closed]
        yield _line("sites in a round's sum", f"{min(in_sum)} to {max(in_sum)}")
        yield _line("from", time_words(closed[0]["started_unix_s"]))
        yield _line("to", time_words(facts.checkpoint["created_unix_s"]))
    yield _line("secure aggregation", f"yes, {manifest.aggregation}" if manifest.secure else "no: the coordinator saw each site's update")
    summed = f"{manifest.shared_table.size:,} parameters" if manifest.split.unsummed else "all parameters"
    if manifest.lora is None:
        yield _line("parameters", f"{manifest.tensor_table.size:,}")
        yield _line("trained and summed", summed)
    else:
        yield _line("method", "LoRA adapters (arXiv 2106.09685) over a base that no site changed; this folder has them added to it")
        yield _line("parameters of the adapters", f"{manifest.tensor_table.size:,}")
        yield _line("of these trained and summed", summed)
        yield _code("base (SHA-256)", manifest.lora.base)
    for name, values in (
        *((("adapters", manifest.lora),) if manifest.lora is not None else ()),
        *((("correction on own samples", manifest.correction),) if manifest.correction is not None else ()),
        ("architecture", manifest.architecture),
        ("schedule", manifest.schedule),
        ("training", manifest.training),
        ("sampling", manifest.sampling),
        ("server optimiser", manifest.server_optimiser),
        ("encoding", manifest.encoding),
    ):
        yield from ("", f"### {name.capitalize()}", "", "| value | |", "| --- | --- |")
        yield from (_line(key, _told(value)) for key, value in values.model_dump(mode="json").items())
    yield from ("", f"Moving average of the global model: {manifest.ema_decay or 'none'}; this folder holds the "
                f"{'average' if facts.artifact == 'ema' else 'weights themselves'}.")  # fmt: skip


def _participants(manifest: Manifest) -> str:
    count = f"{len(manifest.participants)} sites"
    return f"{count}: " + ", ".join(p.name for p in manifest.participants) if manifest.card.name_participants else count


def _scores(facts: CardFacts) -> Iterator[str]:
    yield from ("", "## Scores", "", "### Held-out loss by round", "")
    measured = [(r["round"], loss) for r in facts.rounds if r["phase"] == "closed" and (loss := r["losses"]) is not None]
    rows = [(number, loss) for number, loss in measured if loss["heldout"] is not None and number <= facts.checkpoint["round"] + 1]
    if not rows:
        yield "None was measured."
    else:
        yield "Mean over the sites' held-out images, of the weights that each round **started** from, and the round's own training loss."
        yield from ("", "| round | held-out loss | training loss |", "| ---: | ---: | ---: |")
        step = math.ceil(len(rows) / ROUNDS_SHOWN)
        for place, (number, loss) in enumerate(rows):
            if place % step == 0 or place == len(rows) - 1:
                yield f"| {number} | {number_words(loss['heldout'])} | {number_words(loss['train']) or '-'} |"
    yield from ("", "### Evaluation", "")
    if facts.scores is None:
        yield "No evaluation was given when this folder was written (`cosilo checkpoint export --scores FILE`)."
        return
    yield "As given by whoever wrote this folder; the coordinator did not measure it."
    columns = [name for name in _SCORE_COLUMNS if any(row.get(name) is not None for row in facts.scores.values())]
    yield from ("", "| arm | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns))
    for arm, row in list(facts.scores.items())[:SCORE_ROWS_MAX]:
        yield "| " + " | ".join([escaped(arm), *(_score(row.get(name)) for name in columns)]) + " |"


def _score(value: Any) -> str:
    """A number, or a mean with its standard deviation."""
    if isinstance(value, dict):
        spread = value.get("std", value.get("sd"))
        return _score(value.get("mean")) + (f" ± {_score(spread)}" if spread is not None else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else escaped(value)
    return str(value) if isinstance(value, int) else number_words(value) or "-"


def _provenance(facts: CardFacts, folder: Path) -> Iterator[str]:
    manifest = facts.manifest
    yield from ("", "## Provenance", "", "| | |", "| --- | --- |")
    yield _line("federation", manifest.federation)
    yield _code("run (SHA-256 of the manifest)", manifest.digest().hex())
    yield _line("round", str(facts.checkpoint["round"]))
    yield _code(f"checkpoint, {facts.artifact} (SHA-256)", facts.digest)
    yield _line(
        "manifest signed by", f"{facts.signer}, an admin in version {facts.members_version} of the members list; verified at export"
    )
    yield _code("signature (Ed25519)", facts.signature.hex())
    yield _line("coordinator", facts.software)
    for path in sorted(folder.rglob("*.safetensors")):
        yield _code(f"{path.relative_to(folder).as_posix()} (SHA-256)", file_digest(path))
    yield from (
        "",
        "The signature is over the run, so over every value above that the manifest has; it does not cover this text or the scores.",
    )
    license_id = manifest.card.license
    yield from (
        "",
        "## Licence",
        "",
        escaped(license_id) if license_id else "None is named in the run's manifest: ask the participants before use.",
    )


def _line(name: str, value: str) -> str:
    return f"| {escaped(name)} | {escaped(value, 2000)} |"


def _code(name: str, hexadecimal: str) -> str:
    return f"| {escaped(name)} | `{hexadecimal}` |"


def _told(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
