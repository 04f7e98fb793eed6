"""Exported folders: Cosilo's own pipeline and the stock one draw from them what the class-conditional UNet draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline

from cosilo_common.diffusion.export import export_pipeline, fold_class
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, tensor_table
from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.diffusion.sampling import draw_images
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule
from cosilo_common.errors import CosiloError
from cosilo_common.weights import open_vector, write_weights

TINY = Architecture(
    sample_size=8,
    in_channels=1,
    num_classes=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=4,
)
SCHEDULE = Schedule()
STEPS = 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    write_weights(path, tensor_table(TINY), [tensor.numpy().ravel() for tensor in initial_state(TINY, 3).values()])
    return path


@pytest.fixture(scope="module")
def unet(weights: Path) -> torch.nn.Module:
    module = build_unet(TINY)
    load_vector(module, open_vector(weights, tensor_table(TINY)))
    return module.eval()


def expected(unet: torch.nn.Module, labels: list[int]) -> np.ndarray:
    drawn = draw_images(unet, SCHEDULE, torch.tensor(labels), Sampling(steps=STEPS), torch.Generator().manual_seed(9))
    return (drawn / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def test_the_class_conditional_folder_draws_the_chosen_classes(weights: Path, unet: torch.nn.Module, tmp_path: Path) -> None:
    export_pipeline(weights, TINY, SCHEDULE, tmp_path / "out")
    pipe = CosiloPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        class_labels=[0, 1, 2, 3],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(9),
        output_type="np",
    ).images
    assert np.allclose(images, expected(unet, [0, 1, 2, 3]), atol=1e-6)
    assert pipe(class_labels=[1], num_inference_steps=2).images[0].size == (8, 8)


def test_the_one_class_folder_is_for_stock_pipelines(weights: Path, unet: torch.nn.Module, tmp_path: Path) -> None:
    export_pipeline(weights, TINY, SCHEDULE, tmp_path / "out", class_index=2)
    pipe = DDIMPipeline.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=3, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(9), output_type="np").images
    assert np.allclose(images, expected(unet, [2, 2, 2]), atol=1e-5)
    assert not np.allclose(images, expected(unet, [1, 1, 1]), atol=1e-3)


def test_folding_a_class_keeps_the_function(unet: torch.nn.Module) -> None:
    folded = fold_class(unet, TINY, 3)
    noisy, timesteps = torch.randn(5, 1, 8, 8), torch.tensor([0, 10, 400, 998, 999])
    with torch.no_grad():
        one = folded(noisy, timesteps).sample
        other = unet(noisy, timesteps, class_labels=torch.full((5,), 3)).sample
    assert torch.allclose(one, other, atol=1e-5)


def test_an_exported_folder_holds_safetensors_and_json_only(weights: Path, tmp_path: Path) -> None:
    export_pipeline(weights, TINY, SCHEDULE, tmp_path / "out")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "out/model_index.json",
        "out/scheduler/scheduler_config.json",
        "out/unet/config.json",
        "out/unet/diffusion_pytorch_model.safetensors",
    ]


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match=r"no model_index\.json; give a folder that an export wrote"):
        CosiloPipeline.from_pretrained(tmp_path)


def test_an_export_never_overwrites_and_leaves_nothing_half(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(CosiloError, match="not an empty folder"):
        export_pipeline(weights, TINY, SCHEDULE, tmp_path / "out")
    with pytest.raises(CosiloError, match="class 4 does not exist"):
        export_pipeline(weights, TINY, SCHEDULE, tmp_path / "other", class_index=4)
    with pytest.raises(CosiloError, match="weights of another model"):
        wider = TINY.model_copy(update={"num_classes": 5})
        export_pipeline(weights, wider, SCHEDULE, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_pipeline_refuses_a_class_that_does_not_exist(unet: torch.nn.Module, weights: Path, tmp_path: Path) -> None:
    export_pipeline(weights, TINY, SCHEDULE, tmp_path / "out")
    pipe = CosiloPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(CosiloError, match="class 4 does not exist"):
        pipe(class_labels=[4])
