"""The demo's division of Fashion-MNIST (deploy/docker/deal.py): every image has one owner, and a seed is a division."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "docker" / "deal.py"
LABELS = bytes(random.Random(1).randrange(10) for _ in range(60_000))


@pytest.fixture(scope="module")
def dealer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deal", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_image_is_dealt_to_exactly_one_site(dealer: ModuleType) -> None:
    parts = dealer.deal(LABELS, 7, 1.0)
    assert sorted(index for part in parts for index in part) == list(range(60_000))
    assert [part == sorted(part) for part in parts] == [True] * 4
    assert min(map(len, parts)) >= dealer.LEAST


def test_a_seed_is_a_deal_and_another_seed_another(dealer: ModuleType) -> None:
    assert dealer.deal(LABELS, 7, 1.0) == dealer.deal(LABELS, 7, 1.0)
    assert dealer.deal(LABELS, 7, 1.0) != dealer.deal(LABELS, 8, 1.0)


def test_a_deal_that_cannot_be_says_what_to_change(dealer: ModuleType) -> None:
    with pytest.raises(SystemExit, match="a larger COSILO_DEMO_ALPHA"):
        dealer.deal(bytes([0]) * 100, 7, 1.0)
