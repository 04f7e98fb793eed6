"""What holds for every test: one thread a process, no deadline by the clock of a shared machine, and nothing left running."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch or numpy is imported: five processes share the machine

from collections.abc import Iterator

import psutil
import pytest
from hypothesis import settings

settings.register_profile("cosilo", deadline=None)  # a shared machine's clock says nothing about our code
settings.load_profile("cosilo")


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    """A module that ends with a child process still running has lost it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child not in before and child.is_running()]
    running = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    for child in running:
        child.kill()
    assert not running, f"left running: {running}"
