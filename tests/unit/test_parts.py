"""Which tensors belong to which part of a network, and what is summed when some of them stay at the sites."""

import numpy as np
import pytest
from pydantic import ValidationError

from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.parts import Split, split_of
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Training
from cosilo_common.weights import TensorTable

FASHION = preset("fashion-16").architecture
TUN = preset("tun2023").architecture


def sizes(name: str, *parts: str) -> tuple[int, int]:
    """Values that are summed, and that stay."""
    architecture = preset(name).architecture
    split = split_of(tensor_table(architecture), architecture, parts)
    return split.shared_table.size, 0 if split.personal_table is None else split.personal_table.size


def test_without_personal_parts_everything_is_summed() -> None:
    table = tensor_table(FASHION)
    split = split_of(table, FASHION, ())
    assert (split.shared_table, split.personal_table) == (table, None)
    assert (split.shared_runs, split.personal_runs) == ((slice(0, table.size),), ())


def test_norms_are_the_scales_and_shifts_of_every_normalisation_and_nothing_else() -> None:
    split = split_of(tensor_table(FASHION), FASHION, ["norms"])
    assert split.personal_table is not None
    assert all(len(shape) == 1 and "norm" in name for name, shape in split.personal_table.entries)
    assert not [name for name, _ in split.shared_table.entries if "norm" in name]


@pytest.mark.parametrize(
    ("part", "share"),
    [("encoder", 11.8), ("bottleneck", 72.3), ("decoder", 15.9)],  # PAPER.md, of 23,211,315
)
def test_the_papers_network_is_cut_where_the_paper_cuts_it(part: str, share: float) -> None:
    shared, stays = sizes("tun2023", part)
    assert shared + stays == 23_211_315
    assert round(100 * stays / 23_211_315, 1) == share


@pytest.mark.parametrize("name", ["digits", "fashion-16", "ddpm-cifar10", "tun2023"])
def test_encoder_bottleneck_decoder_and_embeddings_are_the_whole_network_each_tensor_once(name: str) -> None:
    architecture = preset(name).architecture
    table = tensor_table(architecture)
    found = [
        split_of(table, architecture, [part]).personal for part in ("encoder", "bottleneck", "decoder", "class_embedding", "time_embedding")
    ]
    assert sum(map(len, found)) == len(table.entries)
    assert frozenset().union(*found) == {entry for entry, _ in table.entries}


def test_feddiffuse_shares_so_much() -> None:
    """arXiv 2406.12575: ULatDec keeps the encoder at home, UDec the bottleneck as well."""
    assert sizes("tun2023", "encoder")[0] == 20_462_771
    assert sizes("tun2023", "encoder", "bottleneck")[0] == 3_681_715


def test_runs_put_both_parts_back_together() -> None:
    table = TensorTable((("a", (3,)), ("b", (2,)), ("c", (2, 2)), ("d", (1,)), ("e", (5,))))
    split = Split(table, frozenset({"b", "d"}))
    assert split.shared_runs == (slice(0, 3), slice(5, 9), slice(10, 15))
    assert split.personal_runs == (slice(3, 5), slice(9, 10))
    whole = np.arange(table.size)
    parts = [np.concatenate([whole[run] for run in runs]) for runs in (split.shared_runs, split.personal_runs)]
    assert [len(part) for part in parts] == [split.shared_table.size, 3]
    assert sorted(np.concatenate(parts).tolist()) == whole.tolist()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="this network has no norms"):
        split_of(tensor_table(TUN), TUN, ["norms"])
    everything = ("encoder", "bottleneck", "decoder", "class_embedding", "time_embedding")
    with pytest.raises(ValueError, match="nothing would be trained together"):
        split_of(tensor_table(FASHION), FASHION, everything)
    with pytest.raises(ValidationError, match="a part stands twice"):
        Training(personal=("norms", "norms"))
    with pytest.raises(ValidationError):
        Training.model_validate({"personal": ["head"]})
