"""What an end-to-end test found, line by line as it finds it: each check with its seconds, then the figures, then one closing line.

Owns the words. Must not know what is checked.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tests.federation.processes import FederationError

Found = TypeVar("Found")

POLL_S = 0.3  # beside seconds; each look may start a process


class CheckFailed(Exception):
    """Something that must hold does not."""


class Checklist:
    """Prints and counts. figures: name to text, printed at the end in the order in which they came."""

    def __init__(self, title: str) -> None:
        self._began_s = time.monotonic()
        self.passed = self.failed = 0
        self.figures: dict[str, str] = {}
        print(f"--- {title} ---", flush=True)

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """One thing that must hold; what goes wrong inside is told, counted, and ends the test."""
        began_s = time.monotonic()
        try:
            yield
        except BaseException:
            self.failed += 1
            print(f"FAILED  {what} ({time.monotonic() - began_s:.1f} s)", flush=True)
            raise
        self.passed += 1
        print(f"ok      {what} ({time.monotonic() - began_s:.1f} s)", flush=True)

    def figure(self, name: str, text: str) -> None:
        """Something measured."""
        self.figures[name] = text
        print(f"        {name}: {text}", flush=True)

    def close(self) -> None:
        """The figures again, together, and the line that counts."""
        self.figure("seconds in all", f"{time.monotonic() - self._began_s:.0f}")
        print("\n--- figures ---")
        for name, text in self.figures.items():
            print(f"  {name}: {text}")
        print(f"\n{self.passed} passed, {self.failed} failed", flush=True)


def run(title: str, test: Callable[[Checklist], None]) -> int:
    """Runs a whole test; returns the exit code."""
    checklist = Checklist(title)
    try:
        test(checklist)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        for one in _first_to_last(error):
            expected = isinstance(one, CheckFailed | FederationError)
            print(f"\n{one}" if expected else "".join(traceback.format_exception(one, chain=False)), file=sys.stderr, flush=True)
        checklist.failed = max(1, checklist.failed)
    finally:
        checklist.close()
    return 1 if checklist.failed else 0


def _first_to_last(error: BaseException) -> list[BaseException]:
    """What clearing up met too must not hide what failed first. One raised `from None` speaks for what it replaced."""
    found = [error]
    while (before := found[0].__context__) is not None and not found[0].__suppress_context__:
        found.insert(0, before)
    return found


def expect(holds: object, why: str) -> None:
    """Raises CheckFailed with the reason where it does not hold."""
    if not holds:
        raise CheckFailed(why)


def wait_for(look: Callable[[], Found], what: str, timeout_s: float, explain: Callable[[], str] = str) -> Found:
    """Looks until the answer is truthy and returns it; raises CheckFailed with `explain`'s words after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline_s:
            raise CheckFailed(f"waited {timeout_s:.0f} s in vain until {what}\n{explain()}")
        time.sleep(POLL_S)
    return found
