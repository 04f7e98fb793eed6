"""What the documents point at is there: tests that they name, files and headings that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
TESTS_LEAST = 80  # that the threat model names: far fewer means that the pattern below no longer fits the page
LINKS_LEAST = 8  # of the README
TEST_NAME = re.compile(r"\btest_\w+(?:\.py)?")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose_of(document: Path) -> str:
    """A page without its code blocks, whose names and brackets are examples."""
    return FENCED.sub("", document.read_text(encoding="utf-8"))


def links_of(document: str) -> list[str]:
    """Targets of its links to files here, anchors included."""
    return [target for target in LINK.findall(prose_of(ROOT / document)) if "://" not in target]


def anchors_of(document: Path) -> set[str]:
    """Names of its headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def known_tests() -> set[str]:
    """Every test function, and every test module with and without its ending."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {
        name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    return functions | {file.name for file in files} | {file.stem for file in files}


def test_the_threat_model_names_tests() -> None:
    assert len(set(TEST_NAME.findall(prose_of(ROOT / "docs/threat-model.md")))) >= TESTS_LEAST


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_a_document_names_exists(document: str, known_tests: set[str]) -> None:
    assert set(TEST_NAME.findall(prose_of(ROOT / document))) - known_tests == set()


def test_the_readme_leads_on() -> None:
    assert len(links_of("README.md")) >= LINKS_LEAST


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_resolves(document: str) -> None:
    broken = []
    for link in links_of(document):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []
