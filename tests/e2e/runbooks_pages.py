"""A runbook's own lines, found in its page: blocks by their first comment or by their section, and commands that stand in a sentence or a table.

Owns the finding, and the replacing of what a page has as an example by what it is here; an example that does not stand there fails. Must not
know who types, nor where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from tests.e2e.checklist import expect

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "operating"
TYPED_TABLE = "README.md"  # whose last table says what types what
AT_THE_ROOT = ("SECURITY.md",)  # of the repository; every other page is an operating page
BEGINNING = "(above the first heading)"
_HEADING = re.compile(r"(?m)^#{2,4} (.*)$")


def page_text(page: str) -> str:
    """The page as it is in this checkout."""
    return ((ROOT if page in AT_THE_ROOT else PAGES) / page).read_text(encoding="utf-8")


def block(page: str, comment: str) -> str:
    """The page's one block of shell that begins with that comment, without it. Fails where there is none."""
    found = re.findall(rf"```sh\n# {re.escape(comment)}\n(.*?)```", page_text(page), re.DOTALL)
    expect(len(found) == 1, f"{page} has {len(found)} blocks that begin with '# {comment}'")
    return str(found[0])


def filled(page: str, comment: str, named: Mapping[str, str]) -> str:
    """A block with what stands there as an example replaced by what it is here."""
    return put_in(f"{page}, under '# {comment}'", block(page, comment), named)


def section_block(page: str, heading: str, number: int = 0, language: str = "sh") -> str:
    """The number-th block of that language under a heading, from 0. Fails where there is none."""
    found = re.findall(rf"```{language}\n(.*?)```", _sections(page).get(heading, ""), re.DOTALL)
    expect(number < len(found), f"{page} has {len(found)} {language} blocks under '{heading}'")
    return str(found[number])


def part_of(text: str, comment: str) -> str:
    """A block's lines from that comment to the next: one of several people who type in turn. Fails where there is none."""
    found = re.findall(rf"(?m)^# {re.escape(comment)}\n((?:(?!# ).*\n)*)", text)
    expect(len(found) == 1, f"there are {len(found)} comments '# {comment}' in:\n{text}")
    return str(found[0])


def spoken(page: str, heading: str, command: str) -> str:
    """A command that stands in a sentence or a table under a heading. Fails where it does not."""
    expect(f"`{command}`" in _sections(page).get(heading, ""), f"{page}: `{command}` does not stand under '{heading}'")
    return command


def put_in(where: str, text: str, named: Mapping[str, str]) -> str:
    """The text with each example replaced by what it is here. Fails where an example does not stand there."""
    for example, here in named.items():
        expect(example in text, f"{where}: '{example}' does not stand there")
        text = text.replace(example, here)
    return text


def stands(page: str, words: str, said: str) -> None:
    """That the words on the page are the words on the screen: `...` on the page is anything, `NAME` and other capitals are themselves."""
    expect(f"`{words}`" in page_text(page), f"{page} does not say `{words}`")
    parts = (part for part in re.split(r"\.\.\.", words) if part)
    flat = " ".join(said.split())
    expect(
        re.search(".*".join(re.escape(" ".join(part.split())) for part in parts), flat), f"{page} says `{words}`; the screen says:\n{said}"
    )


def sections(page: str, *, with_shell: bool) -> set[str]:
    """The page's headings; with_shell: only those that have a block of shell under them."""
    return {heading for heading, text in _sections(page).items() if "```sh\n" in text or not with_shell}


def who_types() -> dict[tuple[str, str], str]:
    """(page, section) to who types it, as the table at the end of the operating pages' README has it."""
    rows = re.findall(r"(?m)^\| \[([\w./-]+\.md)\]\([^)]*\) \| (.*?) \| (.*?) \|$", _sections(TYPED_TABLE)["What types what"])
    return {(page, section): by for page, section, by in rows}


def shell_lines(text: str) -> set[str]:
    """The lines of a block that somebody is to type: no comments, nothing empty."""
    return {line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")}


def left_out(page: str, heading: str, typed: AbstractSet[str], target: str) -> set[str]:
    """The lines of a section's blocks that the table gives to this target and nobody typed.

    A row's clauses are parted by semicolons. `WORDS`: TARGET gives that target the lines with those words; a clause without words, all others.
    """
    spans = {clause: _WORDS.match(clause) for clause in who_types()[page, heading].split("; ")}
    named = {clause: re.findall(r"`([^`]+)`", found[1]) if found else [] for clause, found in spans.items()}
    here = [clause for clause in spans if target in clause]
    elsewhere = [word for clause, words in named.items() if clause not in here for word in words]
    every = {line for text in re.findall(r"```sh\n(.*?)```", _sections(page)[heading], re.DOTALL) for line in shell_lines(text)}
    if all(named[clause] for clause in here):
        wanted = {line for line in every if any(word in line for clause in here for word in named[clause])}
    else:
        wanted = {line for line in every if not any(word in line for word in elsewhere)}
    return wanted - typed


_WORDS = re.compile(r"((?:`[^`]+`(?:, )?)+): ")


def _sections(page: str) -> dict[str, str]:
    parts = _HEADING.split(page_text(page))
    return {BEGINNING: parts[0], **{heading.strip(): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}}
