"""What the trainer process keeps warm between rounds, model and decoded images, and how it does one job with them.

Owns the caches and the order of a job: weights in, held-out losses, training, update out. Must not know sockets or the
daemon.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parallel import DistributedDataParallel

from cosilo_client.data import data_stamp, load_images, open_source, split_heldout
from cosilo_client.trainer.control import ControlVariates
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.jobs import EvaluateJob, FailureCode, Job, MomentsJob, Progress, Result, TrainerFailed, TrainJob
from cosilo_client.trainer.measuring import measure
from cosilo_client.trainer.training import DeviceImages, Trained, train
from cosilo_client.trainer.update import write_update
from cosilo_common.diffusion.adapters import adapted_unet, adapter_table
from cosilo_common.diffusion.lora import LoraBase
from cosilo_common.diffusion.model import build_unet, load_vector, ordered_parameters, tensor_table, vector_blocks
from cosilo_common.diffusion.objective import heldout_count, heldout_losses, noise_schedule
from cosilo_common.diffusion.parts import Split, split_of
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.weights import TensorTable, Vector, open_vector, write_weights

GPU_SHARE_FOR_IMAGES = 0.25  # of a GPU's free memory; a larger set stays on the host and travels batch by batch


class Workshop:
    """One rank's model and images. Each cache holds one entry: a site works on one run at a time."""

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self._model: tuple[tuple[Architecture, LoraBase | None], torch.nn.Module, torch.nn.Module] | None = None
        self._images: tuple[tuple[object, ...], DeviceImages] | None = None

    def perform(self, job: Job, report: Callable[[Progress], None]) -> Result:
        """Do one job.

        Raises CosiloError (TrainerFailed where the cause has a code), or torch's error when memory runs out.
        """
        place = self._place
        if job.threads:
            torch.set_num_threads(job.threads)
        if place.cuda:
            torch.cuda.reset_peak_memory_stats(place.device)
        data = self._load_images(job)
        if isinstance(job, MomentsJob):
            return measure(data, job, report) if place.rank == 0 else _nothing_measured(place.device)
        split = _split(job)
        fetched = open_vector(job.weights, split.base_table)
        base, kept = fetched[: split.table.size], _kept(split, job.personal)
        unet, module = self._load_model(job.architecture, job.lora)
        load_vector(unet, _with_personal(base, split, kept))
        losses = self._measure(unet, data, job)
        trained = Trained(0.0, 0, 0, 0.0)
        if isinstance(job, TrainJob):
            own = np.zeros(0, np.float32) if not split.controlled else _own_control(split, kept)
            control = ControlVariates(unet, split.shared_table, fetched[split.table.size :], own) if split.controlled else None
            trained = train(module, data, job.schedule, job.training, job.seed, job.micro_batch, place, report, control)
            if place.rank == 0:
                if split.kept_table is not None and job.keep_personal is not None:
                    stays = () if split.personal_table is None else _part(unet, split.personal_table)
                    write_weights(job.keep_personal, split.kept_table, chain(stays, control.own_next() if control else ()))
                shared = base if not split.unsummed else np.concatenate([base[run] for run in split.shared_runs])
                moved = _part(unet, split.shared_table)
                if control is None:
                    write_update(job.update, moved, shared)
                else:
                    write_update(job.update, chain(moved, control.own_next()), np.concatenate([shared, own]))
            unet.zero_grad(set_to_none=True)  # gradients need not wait in memory for the next round
        return Result(
            weight=len(data.train),
            heldout_losses=losses,
            train_loss=trained.mean_loss,
            steps=trained.steps,
            images=trained.images,
            seconds=trained.seconds,
            images_per_second=trained.images / max(trained.seconds, 1e-9),
            gpu_memory_bytes=torch.cuda.max_memory_allocated(place.device) if place.cuda else 0,
            device=str(place.device),
            skipped=data.skipped,
        )

    def _measure(self, unet: torch.nn.Module, data: DeviceImages, job: TrainJob | EvaluateJob) -> tuple[float, ...]:
        kept = data.heldout[: heldout_count(len(data.heldout))].to(data.images.device)
        with self._place.autocast():
            sums = heldout_losses(
                unet,
                noise_schedule(job.schedule),
                data.images[kept],
                data.labels[kept],
                data.full_scale,
                job.training.loss_buckets,
                job.micro_batch if isinstance(job, TrainJob) else None,
                self._place.rank,
                self._place.world,
            )
        losses = tuple(float(loss) for loss in self._place.total(sums) / len(kept))
        if not np.isfinite(losses).all():
            raise TrainerFailed(
                FailureCode.NON_FINITE,
                f"{job.weights.name}: the global weights give a loss that is not finite",
                "tell the run's admin",
            )
        return losses

    def _load_model(self, architecture: Architecture, lora: LoraBase | None) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The UNet, with adapters over its base where the run has them, and what training calls: the same, or its DDP wrapper."""
        if self._model is None or self._model[0] != (architecture, lora):
            self._model = None  # frees the old model before the new one is built
            unet = build_unet(architecture) if lora is None else adapted_unet(architecture, lora)
            unet = unet.to(self._place.device, memory_format=self._place.memory_format())
            devices = [self._place.device.index] if self._place.cuda else None
            # Every rank loads the same weights itself before each round.
            module = DistributedDataParallel(unet, device_ids=devices) if self._place.world > 1 else unet
            self._model = ((architecture, lora), unet, module)
        return self._model[1], self._model[2]

    def _load_images(self, job: Job) -> DeviceImages:
        key = (job.data, job.architecture, job.training.heldout_fraction, data_stamp(job.data))
        if self._images is None or self._images[0] != key:
            self._images = None
            local = load_images(open_source(job.data), job.architecture)
            split = split_heldout(local, job.training.heldout_fraction)
            self._images = (
                key,
                DeviceImages(
                    self._near_device(_as_torch(local.images)),
                    self._near_device(torch.from_numpy(local.labels)),
                    torch.from_numpy(split.train),
                    torch.from_numpy(split.heldout),
                    local.full_scale,
                    local.skipped,
                ),
            )
        return self._images[1]

    def _near_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._place.cuda:
            free, _ = torch.cuda.mem_get_info(self._place.device)
            if tensor.nbytes <= free * GPU_SHARE_FOR_IMAGES:
                return tensor.to(self._place.device)
        return tensor


def _nothing_measured(device: torch.device) -> Result:
    """What ranks say that had no part in a moments round: one is enough."""
    return Result(
        weight=1,
        heldout_losses=(),
        train_loss=0.0,
        steps=0,
        images=0,
        seconds=0.0,
        images_per_second=0.0,
        gpu_memory_bytes=0,
        device=str(device),
        skipped=0,
    )


def _split(job: TrainJob | EvaluateJob) -> Split:
    """What of the job's weights is summed, and what is not."""
    terms = None if job.lora is None else job.lora.terms
    table = tensor_table(job.architecture) if terms is None else adapter_table(job.architecture, terms)
    return split_of(table, job.architecture, job.training.personal, job.training.control_variates, terms)


def _kept(split: Split, path: Path | None) -> Vector | None:
    """What this site keeps between rounds; None before it has any."""
    return None if path is None or split.kept_table is None else open_vector(path, split.kept_table)


def _own_control(split: Split, kept: Vector | None) -> Vector:
    """c_i: zero before the first round."""
    size = split.shared_table.size
    return np.zeros(size, np.float32) if kept is None else np.array(kept[-size:])


def _with_personal(base: Vector, split: Split, kept: Vector | None) -> Vector:
    """The round's weights, with this site's own values where it has any."""
    if not split.personal or kept is None:
        return base
    whole, offset = np.array(base), 0
    for run in split.personal_runs:
        whole[run] = kept[offset : offset + run.stop - run.start]
        offset += run.stop - run.start
    return whole


def _part(unet: torch.nn.Module, table: TensorTable) -> Iterator[Vector]:
    """Blocks of `vector_blocks`, those of the table's tensors."""
    names = {name for name, _ in table.entries}
    for (name, _), block in zip(ordered_parameters(unet), vector_blocks(unet), strict=True):
        if name in names:
            yield block


def _as_torch(images: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> torch.Tensor:
    """uint8 as it is; uint16 as the same bits in int16 (see `objective.to_model_range`)."""
    return torch.from_numpy(images.view(np.int16) if images.dtype == np.uint16 else images)
