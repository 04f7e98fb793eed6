"""What holds for every test: one thread a process, no deadline by the clock of a shared machine, and nothing left running."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch or numpy is imported: five processes share the machine

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

settings.register_profile("cosilo", deadline=None)  # a shared machine's clock says nothing about our code
settings.load_profile("cosilo")


LONGEST_FIRST = ("system", "integration")  # folders; beside the rest their files are minutes, and the last one to begin is waited for alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The Makefile's --no-loadscope-reorder keeps this order; xdist by itself would put files with few tests last, and those are the longest."""
    ranks = {Path(__file__).parent / folder: rank for rank, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.parent, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep for next time (`cosilo_server.cli.known_tables`) is kept for this session, and nobody's own is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
