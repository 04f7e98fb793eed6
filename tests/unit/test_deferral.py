"""The packages of networks that diffusers imports whole are imported in part, and whole as soon as anybody asks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cosilo_common.diffusion import deferral

# In a process of its own: in this one other tests may have asked already.
SCRIPT = """
import sys
from cosilo_common.diffusion.model import build_unet
from cosilo_common.diffusion.presets import PRESETS
build_unet(PRESETS["digits"].architecture).to("cpu")
loaded = [name for name in sys.modules if name.startswith("diffusers.models.transformers.")]
assert "diffusers.models.transformers.dual_transformer_2d" in loaded, loaded
assert len(loaded) < 5, loaded
assert not {"scipy.stats", "peft", "diffusers.models.unets.unet_1d"} & set(sys.modules)
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `networks` whose own code says so on being run, and imports all of it."""
    folder = tmp_path / "networks"
    folder.mkdir()
    (folder / "__init__.py").write_text("from networks.large import Large\nRUN = __name__\n")
    (folder / "small.py").write_text("class Small: ...\n")
    (folder / "large.py").write_text("from networks import small\nclass Large(small.Small): ...\n")
    monkeypatch.setattr(deferral, "DEFERRED", frozenset({"networks"}))
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "networks"]:
        del sys.modules[name]


def loaded() -> list[str]:
    return sorted(name for name in sys.modules if name.partition(".")[0] == "networks")


def networks_now() -> ModuleType:
    return importlib.import_module("networks")


def test_a_module_is_imported_without_its_package_s_code(networks: Path) -> None:
    small = importlib.import_module("networks.small")
    assert loaded() == ["networks", "networks.small"]
    package = networks_now()
    assert package.small is small
    assert package.__file__ == str(networks / "__init__.py")
    assert not hasattr(package, "__wrapped__")
    assert loaded() == ["networks", "networks.small"]


def test_the_first_name_that_is_not_there_runs_the_package(networks: Path) -> None:
    small = importlib.import_module("networks.small")
    assert networks_now().RUN == "networks"
    assert loaded() == ["networks", "networks.large", "networks.small"]
    assert networks_now().Large.__mro__[1] is small.Small
    assert type(networks_now()) is ModuleType
    with pytest.raises(AttributeError, match="module 'networks' has no attribute 'nothing'"):
        _ = networks_now().nothing


def test_a_package_that_fails_says_so_each_time(networks: Path) -> None:
    (networks / "large.py").write_text("raise ImportError('no such accelerator')\n")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such accelerator"):
            _ = networks_now().Large


def test_of_diffusers_only_the_network_that_is_built_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
