"""docs/limits.md says what the code has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from cosilo_server.services.admission import ENROLMENT_LIMITS, FEDERATION_LIMITS, MethodLimit

PAGE = (Path(__file__).parents[2] / "docs/limits.md").read_text(encoding="utf-8")
CONSTANT = re.compile(r"^\| [^|]+ \| `(cosilo_[\w.]+)\.(\w+)` \| ([\d.]+) \|", re.MULTILINE)
METHOD = re.compile(r"^\| (?:`(\w+)`|(any other)) \| (\d+) \| (\d+) \| (\d+) \|", re.MULTILINE)
CONSTANTS_LEAST = 30  # far fewer means that the pattern no longer fits the page


@pytest.mark.parametrize(("module", "name", "value"), CONSTANT.findall(PAGE))
def test_every_limit_is_what_the_code_has(module: str, name: str, value: str) -> None:
    assert str(getattr(importlib.import_module(module), name)) == value


def test_every_method_s_limit_is_what_the_code_has() -> None:
    shown = {name or "any other": tuple(map(int, numbers)) for name, _, *numbers in METHOD.findall(PAGE)}
    limits = {**FEDERATION_LIMITS, **ENROLMENT_LIMITS, "any other": MethodLimit()}
    assert shown == {name: (limit.each, limit.everybody, limit.request_bytes) for name, limit in limits.items()}


def test_the_page_names_its_limits() -> None:
    assert len(CONSTANT.findall(PAGE)) >= CONSTANTS_LEAST
