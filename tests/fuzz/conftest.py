"""Says at the end how many inputs were given to what."""

from __future__ import annotations

import pytest

from tests.fuzz.mutation import inputs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if inputs:
        terminalreporter.write_line(f"inputs fuzzed: {inputs.total()}")
        if terminalreporter.verbosity > 0:
            for name, count in sorted(inputs.items()):
                terminalreporter.write_line(f"  {name}: {count}")
