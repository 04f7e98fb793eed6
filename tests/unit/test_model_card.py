"""The model card: every figure that it names is the coordinator's, names only where the manifest says so, and nobody's words make Markdown."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import CardTerms, Manifest, Participant, parse_manifest
from cosilo_server.cli.model_card import CardFacts, escaped, model_card, read_scores
from cosilo_server.cli.shapes import LossShape, RoundShape
from tests.protocol.manifests import a_manifest

SITES = ("st-anna", "st-beda", "st-clara")
MANIFEST = a_manifest(tuple(Participant(name=n, key=sha256(n.encode()).hexdigest()) for n in SITES))


def with_card(**values: Any) -> Manifest:
    return parse_manifest(MANIFEST.model_copy(update={"card": CardTerms(**values)}).canonical())


def a_round(number: int, heldout: float | None = 0.5, **changes: Any) -> RoundShape:
    losses: LossShape = {
        "heldout": heldout, "heldout_by_bucket": [], "train": 0.25, "clip_ratio": 0.0, "total_weight": 10, "update_norm": 1.0
    }  # fmt: skip
    plain: dict[str, Any] = {
        "round": number,
        "kind": "train",
        "phase": "closed",
        "started_unix_s": 1_772_366_400.0,
        "survivors": list(SITES),
    }
    return {**plain, "losses": losses, **changes}  # type: ignore[typeddict-item]  # what a card reads of it


def facts(**changes: Any) -> CardFacts:
    checkpoint = {"round": 2, "created_unix_s": 1_772_370_000.0}
    plain: dict[str, Any] = {
        "manifest": MANIFEST,
        "signer": "anna",
        "signature": b"\x5a" * 64,
        "members_version": 3,
        "software": "cosilo 0.1.0",
        "checkpoint": checkpoint,
        "artifact": "weights",
        "digest": "ab" * 32,
        "rounds": [a_round(1), a_round(2, 0.375)],
    }
    return CardFacts(**{**plain, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def front(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_front_matter_is_as_model_hubs_read_it(folder: Path) -> None:
    plain = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusion", "federated-learning", "cosilo"],
    }
    assert front(model_card(facts(), folder)) == plain
    assert front(model_card(facts(manifest=with_card(license="cc-by-4.0")), folder)) == {"license": "cc-by-4.0", **plain}


def test_participants_are_a_number_unless_the_manifest_says_otherwise(folder: Path) -> None:
    card = model_card(facts(), folder)
    assert "| participants | 3 sites |" in card
    assert "anna" not in card.replace("anna, an admin", "")
    named = model_card(facts(manifest=with_card(name_participants=True)), folder)
    assert "| participants | 3 sites: st-anna, st-beda, st-clara |" in named


def test_digests_signature_and_files_are_there_to_be_checked(folder: Path) -> None:
    card = model_card(facts(), folder)
    for known in (MANIFEST.digest().hex(), "ab" * 32, "5a" * 64, sha256(b"weights").hexdigest()):
        assert f"| `{known}` |" in card


def test_values_and_levers_are_those_of_the_manifest(folder: Path) -> None:
    card = model_card(facts(), folder)
    for section in (MANIFEST.architecture, MANIFEST.schedule, MANIFEST.training, MANIFEST.server_optimiser, MANIFEST.encoding):
        for key in type(section).model_fields:
            assert f"| {escaped(key)} | " in card


def test_losses_by_round_stop_at_the_checkpoint_and_long_runs_are_thinned(folder: Path) -> None:
    rounds = [a_round(1), a_round(2, 0.375), a_round(3, 0.3125), a_round(4, 0.125), a_round(5, phase="abandoned")]
    card = model_card(facts(rounds=rounds), folder)
    assert "| 2 | 0.375 | 0.25 |" in card
    assert "| 3 | 0.3125 | 0.25 |" in card  # of the weights that round 2 made
    assert "| 4 | " not in card
    assert "| training rounds in this checkpoint | 2 |" in card
    long = model_card(facts(checkpoint={"round": 1000, "created_unix_s": 1.0}, rounds=[a_round(n) for n in range(1, 1001)]), folder)
    shown = [int(line.split(" ")[1]) for line in long.splitlines() if line.endswith("| 0.5 | 0.25 |")]
    assert (shown[0], shown[-1], len(shown)) == (1, 1000, 41)


def test_it_is_honest_about_what_it_is_not_for(folder: Path) -> None:
    card = model_card(facts(), folder)
    assert "- Diagnosis, treatment or any decision about a person." in card
    assert "it\n  is not differential privacy" in card
    assert "None is named in the run's manifest" in card
    assert "No evaluation was given" in card


def test_scores_come_from_a_results_file_and_say_so(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    row = {"seeds": 3, "fid": {"mean": 120.25, "std": 2.5}, "kid": {"mean": 0.0625, "std": None}, "recall": None}
    file.write_text(json.dumps({"summary": {"fedavg": row}}))
    card = model_card(facts(scores=read_scores(file)), folder)
    assert "the coordinator did not measure it." in card
    assert "| arm | seeds | fid | kid |" in card
    assert "| fedavg | 3 | 120.2 ± 2.5 | 0.0625 |" in card


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"summary": {}}', '{"summary": {"a": 1}}', "[" * 100_000])
def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CosiloError, match="read scores"):
        read_scores(tmp_path / "x.json")


FORGED = (
    "x](http://a.example) ![p](http://b.example/x.png) <img src=x> | # h `c` **b** www.c.example\n\n# Safe for diagnosis\n---\nlicense: mit"
)


@pytest.mark.parametrize("place", ["signer", "software", "arm", "score"])
def test_nobodys_words_make_markdown(folder: Path, place: str) -> None:
    scores = {FORGED if place == "arm" else "arm": {"fid": FORGED if place == "score" else 1.0}}
    changes = {place: FORGED} if place in ("signer", "software") else {}
    forged, plain = (model_card(facts(**{"scores": s, **c}), folder) for s, c in ((scores, changes), ({"arm": {"fid": 1.0}}, {})))
    assert structure(forged) == structure(plain)
    assert front(forged) == front(plain)


def test_addresses_names_and_emoji_do_not_come_alive_on_a_hub() -> None:
    assert escaped("http://a.example www.b.example WWW.c @who :tada: 12:00 $x$") == (
        r"http\://a.example www\.b.example WWW\.c \@who \:tada: 12:00 \$x\$"
    )


@given(st.text(max_size=200) | st.text("\\`*_[]()<>|#!&~-+= \n:a", max_size=60))
def test_escaped_text_is_text(text: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(f"| a |\n| --- |\n| {escaped(text)} |")
    kinds = [token.type for token in tokens]
    assert kinds.count("td_open") == 1
    cell = tokens[kinds.index("td_open") + 1]
    assert {child.type for child in cell.children or []} <= {"text", "text_special"}


def structure(card: str) -> list[str]:
    """Everything in a card that is not text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    return [kind for token in tokens for kind in (token.type, *(c.type for c in token.children or [] if c.type != "text"))]
