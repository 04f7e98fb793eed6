"""docs/cli.md names every command, and every key of every JSON shape and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from cosilo_server.cli import shapes
from tests.unit.test_cli_start import COMMANDS

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
SHAPES = {
    "run": shapes.RunShape,
    "round": shapes.RoundShape,
    "losses": shapes.LossShape,
    "progress": shapes.ProgressShape,
    "trace": shapes.TraceShape,
    "phase": shapes.PhaseShape,
    "span": shapes.SpanShape,
    "checkpoint": shapes.CheckpointShape,
    "ca": shapes.CaShape,
    "enrolment": shapes.EnrolmentShape,
    "status": shapes.StatusShape,
    "site": shapes.SiteShape,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"^\| `cosilo {command}[ `]", DOCS, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_key_is_documented(name: str) -> None:
    section = DOCS.split(f"\n### {name}\n")[1].split("\n### ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(get_type_hints(SHAPES[name]))
