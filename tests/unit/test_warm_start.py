"""A run's named first weights: found by digest, taken only whole and for the run's tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cosilo_common.errors import CosiloError
from cosilo_common.transfer import file_digest
from cosilo_common.weights import TensorTable
from cosilo_server.artifacts import Artifacts
from cosilo_server.warm_start import check_named, copy_weights, named_weights

TABLE = TensorTable((("bias", (2,)), ("weight", (3, 2))))


def public(path: Path, **changes: np.ndarray) -> Path:
    """As docs/levers.md says to write one."""
    tensors = {"weight": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.ones(2, np.float32), **changes}
    save_file(tensors, path)
    return path


def test_a_file_as_safetensors_writes_it_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = public(tmp_path / "public.safetensors")
    copy_weights(source, TABLE, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": np.zeros((2, 3), np.float32)}, r"tensor weight \[2, 3\] where the run's model has weight \[3, 2\]"),
        ({"weight": np.zeros((3, 2), np.float16)}, "dtype F16, must be F32"),
        ({"wider": np.zeros(1, np.float32)}, "has 3 tensors, the run's model has 2"),
        ({"bias": np.array([1, np.nan], np.float32)}, "finite|NaN"),
    ],
)
def test_another_model_is_refused_by_the_tensor_that_differs(tmp_path: Path, changes: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(CosiloError, match=said):
        copy_weights(public(tmp_path / "public.safetensors", **changes), TABLE, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_weights_are_found_among_artifacts_then_in_the_warm_folder(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    source = public(tmp_path / "public.safetensors")
    digest = file_digest(source)
    with pytest.raises(CosiloError, match=f"no weights with the digest {digest}"), named_weights(artifacts, digest):
        pass
    (tmp_path / "warm").mkdir()
    place = tmp_path / "warm" / f"{digest}.safetensors"
    place.write_bytes(source.read_bytes())
    with named_weights(artifacts, digest) as found:
        assert found == place
    with artifacts.scratch() as path:
        path.write_bytes(source.read_bytes())
        artifacts.put_file(path)
    with named_weights(artifacts, digest) as found:
        assert found == artifacts.path(digest)


def test_a_file_is_not_trusted_for_its_name() -> None:
    check_named("a" * 64, "a" * 64)
    with pytest.raises(CosiloError, match="has the digest b"):
        check_named("a" * 64, "b" * 64)
