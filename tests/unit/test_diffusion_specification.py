"""Plain values: what a manifest may say of a model, and that the daemons can read it without torch."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.presets import PRESETS, preset
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.diffusion.specification import Architecture, Preset, Sampling, Schedule, Training
from cosilo_common.errors import CosiloError

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 9}, "not divisible by 2"),
        ({"sample_size": 10, "block_out_channels": (8, 8, 8)}, "not divisible by 4"),
        ({"block_out_channels": (8, 18)}, "not divisible into norm_num_groups"),
        ({"norm_num_groups": 5}, "not divisible into norm_num_groups"),
        ({"attention_head_dim": 6}, "not divisible into heads"),
        ({"attention": (True,)}, "1 flags for 2 levels"),
        ({"attention": (True, False), "attention_head_dim": 16}, "level 0: 8 channels are not divisible into heads"),
        ({"block_out_channels": (9, 18), "norm_num_groups": 3, "mid_attention": False}, "must be even"),
        ({"block_out_channels": ()}, "at least 1 item"),
        ({"num_classes": 0}, "greater than or equal to 1"),
        ({"in_channels": True}, "valid integer"),
        ({"sample_size": 8.0}, "valid integer"),
        ({"dropout": 1.0}, "less than 1"),
        ({"dropout": float("nan")}, "finite number"),
        ({"pretrained": "somewhere"}, "Extra inputs are not permitted"),
    ],
)
def test_an_impossible_architecture_is_refused_with_its_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Architecture(**(SMALL | change))


@settings(max_examples=30, deadline=None)
@given(
    levels=st.lists(st.sampled_from([4, 8, 12, 16]), min_size=1, max_size=3),
    size=st.sampled_from([4, 6, 8, 12]),
    groups=st.sampled_from([1, 2, 3, 4, 8]),
    head=st.sampled_from([None, 2, 3, 4, 8]),
    flags=st.data(),
    middle=st.booleans(),
)
def test_every_architecture_that_is_accepted_can_be_built(
    levels: list[int], size: int, groups: int, head: int | None, flags: st.DataObject, middle: bool
) -> None:
    attention = tuple(flags.draw(st.booleans()) for _ in levels)
    try:
        architecture = Architecture(
            sample_size=size,
            in_channels=1,
            num_classes=2,
            block_out_channels=tuple(levels),
            layers_per_block=1,
            attention=attention,
            mid_attention=middle,
            attention_head_dim=head,
            norm_num_groups=groups,
        )
    except ValidationError:
        return
    assert dict(tensor_table(architecture).entries)["class_embedding.weight"] == (2, 4 * levels[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_start": 0.03}, "above beta_end"),
        ({"train_timesteps": 1}, "greater than or equal to 2"),
        ({"prediction_type": "sample"}, "epsilon"),
        ({"beta_schedule": "sigmoid"}, "squaredcos_cap_v2"),
    ],
)
def test_an_impossible_schedule_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schedule(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": 0.1}, "needs optimiser = adamw"),
        ({"learning_rate": 0.0}, "greater than 0"),
        ({"learning_rate": float("inf")}, "finite number"),
        ({"heldout_fraction": 0.0}, "greater than 0"),
        ({"proximal_mu": -1.0}, "greater than or equal to 0"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"max_steps": 0}, "greater than or equal to 1"),
        ({"seed": 2**63}, "less than or equal to"),
        ({"horizontal_flip": 1}, "valid boolean"),
        ({"optimizer": "adam"}, "Extra inputs"),
    ],
)
def test_impossible_training_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Training(**change)


def test_parts_that_do_not_fit_one_another_are_refused() -> None:
    digits = PRESETS["digits"]
    with pytest.raises(ValidationError, match="loss_buckets 4 exceed the schedule's 3 timesteps"):
        Preset(**(dict(digits) | {"schedule": Schedule(train_timesteps=3)}))
    with pytest.raises(ValidationError, match="sampling steps 1001 exceed"):
        Preset(**(dict(digits) | {"sampling": Sampling(steps=1001)}))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("digits", 652_321), ("fashion-16", 637_105), ("mednist-32", 636_657), ("ddpm-cifar10", 35_751_427)],
)
def test_presets_have_the_sizes_they_promise(name: str, parameters: int) -> None:
    assert tensor_table(preset(name).architecture).size == parameters


def test_a_preset_survives_json() -> None:
    for recipe in PRESETS.values():
        assert Preset.model_validate_json(recipe.model_dump_json()) == recipe


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(CosiloError, match="ddpm-cifar10, digits, fashion-16, mednist-32"):
        preset("imagenet")


def test_site_seed_is_this_number_for_ever() -> None:
    assert site_seed(1, "north", 0) == 7497874980928340190


def test_site_seeds_differ_in_every_field() -> None:
    seeds = [site_seed(1, "north", 0), site_seed(2, "north", 0), site_seed(1, "south", 0), site_seed(1, "north", 1)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_the_daemons_read_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "import cosilo_common.diffusion.presets, cosilo_common.diffusion.seeding\n"
        "import cosilo_client.trainer\n"
        "from cosilo_client.data import DataConfig, census, open_source\n"
        "census(open_source(DataConfig(kind='digits')))\n"
        "print([name for name in ('torch', 'diffusers', 'sklearn', 'scipy') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
