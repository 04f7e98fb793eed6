"""What tests need that repeat in this process what trainers compute in theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def as_a_trainer_does() -> Iterator[None]:
    """The trainer's own settings on a CPU: one thread, as the sites' TOML says, and deterministic kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
