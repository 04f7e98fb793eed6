"""CosiloPipeline: diffusers' pipeline interface for a class-conditional UNet.

Owns the pipeline class that exported folders name. Must not know runs or files' layout beyond diffusers' own.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from cosilo_common.diffusion.sampling import denoise
from cosilo_common.errors import CosiloError


class CosiloPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Draws images of chosen classes: `CosiloPipeline.from_pretrained(DIR)(class_labels=[0, 1, 2]).images`."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler | DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load an exported folder: local files and safetensors only, whatever diffusers' defaults are."""
        if not Path(folder, "model_index.json").is_file():
            raise CosiloError("load pipeline", f"{folder}: no model_index.json", "give a folder that an export wrote")
        options |= {"local_files_only": True, "use_safetensors": True}
        return super().from_pretrained(str(folder), **options)  # type: ignore[no-any-return]  # untyped base

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image a label.

        Output_type: "pil", "np" (n, H, W, C) or "pt" (n, C, H, W), values in [0, 1]. Raises CosiloError for a wrong
        label.
        """
        classes = self.unet.config.num_class_embeds
        wrong = [label for label in class_labels if not 0 <= label < classes]
        if wrong:
            raise CosiloError("draw", f"class {wrong[0]} does not exist", f"choose from 0 to {classes - 1}")
        device = self._execution_device
        size = self.unet.config.sample_size
        shape = (len(class_labels), self.unet.config.in_channels, size, size)
        noise = torch.randn(shape, generator=generator, device=generator.device if generator else "cpu").to(device)
        labels = torch.tensor(class_labels, dtype=torch.int64, device=device)
        images = (denoise(self.unet, self.scheduler, noise, labels, num_inference_steps, generator) / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        shown: Any = images
        if output_type != "pt":
            shown = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                shown = self.numpy_to_pil(shown)
        return ImagePipelineOutput(images=shown) if return_dict else (shown,)
