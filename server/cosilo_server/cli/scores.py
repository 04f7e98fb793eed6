"""`cosilo score`: a checkpoint's images against the sum of everybody's real ones, or a folder of one's own, on the admin's machine.

Owns what is compared and the file of scores. Must not know how features are made, and loads none by a manifest's word: a module of
somebody's own is named on the command line or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.checkpoints import SEED_MAX, STEPS_MAX, AtRound, Raw, artifact_of, choose_checkpoint, fetch_checkpoints
from cosilo_server.cli.commands import AsJson, RunName, Seat, command
from cosilo_server.cli.shapes import RoundShape
from cosilo_server.cli.terminal import say, say_json

if TYPE_CHECKING:
    from cosilo_common.evaluation.scoring import FederatedScores, LocalScores
    from cosilo_common.manifest import EvaluationTerms

FIGURES: Final = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall", "inception_score": "IS"}
DEFAULT_EXTRACTOR: Final = "efficientnet-lite0"
SAMPLES_MIN, SAMPLES_MAX = 2, 1_000_000  # a covariance needs two; a million at 16 pixels are hours on a CPU


def add_to(parent: typer.Typer) -> None:
    """Adds the command to the tree."""
    command(parent, "score", score)


def score(
    seat: Seat,
    run: RunName,
    at_round: AtRound = None,
    raw: Raw = False,
    samples: Annotated[int, typer.Option("--samples", min=SAMPLES_MIN, max=SAMPLES_MAX, help="Images to draw.")] = 5000,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, max=STEPS_MAX, help="Denoising steps; the run's own unless given.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED_MAX, help="Of the noise: the same for models that are compared.")] = 0,
    extractor: Annotated[
        str | None,
        typer.Option("--extractor", metavar="NAME", help="The run's, where it is module:callable of your own.", show_default=False),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", metavar="FILE", help="The extractor's weights.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FOLDER",
            help="Score against the real images in this folder, a sub-folder a class, not against the sites' sum.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="JSON", help="Where the scores go, for checkpoint export --scores.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint against the sites' real images, of which only a moments round's sum is known, or against a folder."""
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.downloads import download, download_base
    from cosilo_server.cli.follow import fetch_rounds
    from cosilo_server.cli.manifests import fetch_signed_manifest
    from cosilo_server.cli.run_names import find_run
    from cosilo_server.cli.torch_work import score_against_folder, score_checkpoint

    with connect(seat) as coordinator, tempfile.TemporaryDirectory(prefix="cosilo-score-") as scratch:
        summary = find_run(coordinator, run)
        manifest = fetch_signed_manifest(coordinator, summary.run).manifest
        network = named_extractor(manifest.evaluation, extractor) if against is None else local_extractor(manifest.evaluation, extractor)
        real = newest_moments(fetch_rounds(coordinator, summary.run), summary.name) if against is None else None
        checkpoint = choose_checkpoint(fetch_checkpoints(coordinator, summary.run), summary.name, at_round)
        artifact, digest = artifact_of(checkpoint, raw)
        weights, moments = Path(scratch, "weights"), Path(scratch, "moments")
        download(coordinator, bytes.fromhex(digest), weights)
        base = None if manifest.lora is None else download_base(coordinator, manifest.lora, Path(scratch))
        sampling = manifest.sampling if steps is None else manifest.sampling.model_copy(update={"steps": steps})
        if against is None:
            assert real is not None and not isinstance(network, str)
            download(coordinator, bytes.fromhex(real["moments"] or ""), moments)
            federated = score_checkpoint(weights, manifest, sampling, network, features, moments, samples=samples, seed=seed, base=base)
            figures = {"moments_round": real["round"], "moments": real["moments"], **_federated(federated, network.sha256)}
            of_whom = f"of {len(real['survivors'])} sites (round {real['round']})"
        else:
            local = score_against_folder(weights, manifest, sampling, network, features, against, samples=samples, seed=seed, base=base)
            figures = {"against": str(against), **_local(local)}
            of_whom = f"in {against}"
    shown = {
        "run": summary.run.hex(),
        "round": checkpoint["round"],
        "artifact": artifact,
        "digest": digest,
        "samples": samples,
        "steps": sampling.steps,
        "seed": seed,
        **figures,
    }
    if out is not None:
        write_scores(out, f"{summary.name}, {artifact} of round {checkpoint['round']}", shown)
    if as_json:
        say_json(shown)
        return
    told = ", ".join(f"{word} {shown[key]:.6g}" for key, word in FIGURES.items() if shown.get(key) is not None)
    say(
        f"{artifact} of round {checkpoint['round']}: {told}; {samples} images against {shown['real_images']} real ones {of_whom}, "
        f"by {shown['extractor']}"
    )
    for row in shown.get("by_class", ()):
        say(f"  class {row['label']}: FID {row['fid']:.6g}, KID {row['kid']:.6g} ({row['images']} images)")


def _federated(scores: FederatedScores, sha256: str) -> dict[str, Any]:
    """What a sum of moments can tell: no single features are in it, and KID, precision and recall compare those."""
    return {**asdict(scores), "extractor_sha256": sha256}


def _local(scores: LocalScores) -> dict[str, Any]:
    known = {"real_images": scores.real_images, "extractor": scores.extractor, "extractor_sha256": scores.digest}
    return {**asdict(scores.scores), **known, "by_class": [asdict(row) for row in scores.scores.by_class]}


def named_extractor(terms: EvaluationTerms | None, asked: str | None) -> EvaluationTerms:
    """The run's terms, once it is clear that the person here means that network."""
    if terms is None:
        raise CosiloError("score", "the run names no extractor", "create a run whose file has an [evaluation] table")
    if asked not in (None, terms.extractor):
        raise CosiloError("score", f"the run measures with {terms.extractor}, not {asked}", "figures of two extractors do not compare")
    if asked is None and ":" in terms.extractor:
        raise CosiloError(
            "score", f"the run's extractor {terms.extractor} is code", f"if it is yours, say so: --extractor {terms.extractor}"
        )
    return terms


def local_extractor(terms: EvaluationTerms | None, asked: str | None) -> EvaluationTerms | str:
    """The run's terms where it has some, as its other scores; else the extractor named here, or the default one."""
    return named_extractor(terms, asked) if terms is not None else asked or DEFAULT_EXTRACTOR


def newest_moments(rounds: Sequence[RoundShape], name: str) -> RoundShape:
    """The last closed moments round. Raises CosiloError where there is none."""
    found = [entry for entry in rounds if entry["moments"] is not None]
    if not found:
        raise CosiloError("score", f"{name} has no moments of its sites' images", f"ask for them: cosilo round start {name!r} --moments")
    return found[-1]


def write_scores(path: Path, label: str, shown: dict[str, Any]) -> None:
    """The scores as `checkpoint export --scores` reads them: a summary of one row, and all that makes the figures comparable."""
    figures = {key: shown[key] for key in FIGURES if shown.get(key) is not None}
    document = {"summary": {label: {"images": shown["samples"], **figures}}, "score": shown}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
