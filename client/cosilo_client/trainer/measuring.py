"""A moments round in the trainer process: features of this site's images, summed into their first and second moments.

Owns which images are measured and the way from integers to the vector that is masked. Must not know rounds, masks or what the sum is for.
Features of single images never leave this function.
"""

import hashlib
import time
from collections.abc import Callable

import numpy as np
import torch

from cosilo_client.trainer.jobs import FailureCode, MomentsJob, Progress, Result, TrainerFailed
from cosilo_client.trainer.training import DeviceImages
from cosilo_client.trainer.update import write_update
from cosilo_common.diffusion.objective import to_model_range
from cosilo_common.diffusion.sampling import to_uint8
from cosilo_common.evaluation.extractors import Extractor, named
from cosilo_common.evaluation.moments import Moments, pooled
from cosilo_common.manifest import EvaluationTerms

BATCH_IMAGES = 500  # features at once: 4 MB at Inception's width, and enough for the product of their moments to be worth it
TENTHS = 10


def measure(data: DeviceImages, job: MomentsJob, report: Callable[[Progress], None]) -> Result:
    """Writes `Moments.vector` of all images, or of `images_max` of them at even distances, to `job.update`.

    Raises CosiloError (TrainerFailed) where the extractor is missing or not the run's, or a feature is not finite.
    """
    began, terms = time.monotonic(), job.terms
    network = extractor_of(job, terms)
    chosen = even_choice(len(data.images), terms.images_max)
    digest, total = hashlib.sha256(), None
    for start in range(0, len(chosen), BATCH_IMAGES):
        picked = torch.from_numpy(chosen[start : start + BATCH_IMAGES]).to(data.images.device)
        pixels = to_uint8(to_model_range(data.images[picked], data.full_scale))
        digest.update(repr(pixels.shape).encode() + pixels.tobytes())
        rows = network.features(pixels).vectors
        if rows.shape[1] != terms.features:
            raise _not_as_named(f"{network.name} has {rows.shape[1]} features, the run says {terms.features}")
        if not np.isfinite(rows).all():
            raise TrainerFailed(FailureCode.NON_FINITE, f"{network.name}: a feature is not finite", "tell the run's admin")
        part = Moments.of(rows)
        total = part if total is None else pooled((total, part))
        report(_progress(total.count, len(chosen), time.monotonic() - began))
    assert total is not None  # a site without an image is refused when its data is loaded
    vector, seconds = total.vector(), time.monotonic() - began
    write_update(job.update, [vector], np.zeros(len(vector), np.float32))
    return Result(
        weight=total.count,
        heldout_losses=(),
        train_loss=0.0,
        steps=0,
        images=total.count,
        seconds=seconds,
        images_per_second=total.count / max(seconds, 1e-9),
        gpu_memory_bytes=0,
        device="cpu",
        skipped=data.skipped,
        data=digest.hexdigest(),
    )


def extractor_of(job: MomentsJob, terms: EvaluationTerms) -> Extractor:
    """The site's own network, once it has proved to be the run's. Nothing is loaded by the run's word."""
    if job.network != terms.extractor:
        raise _not_as_named(f"the run measures with {terms.extractor}, this site has {job.network or 'no extractor'}")
    return named(terms, job.weights)


def even_choice(images: int, images_max: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Indices of all images, or of `images_max` at even distances: in proportion from every folder, and the same ones each time."""
    count = min(images, images_max)
    return np.arange(count, dtype=np.int64) * images // count


def _progress(done: int, images: int, seconds: float) -> Progress:
    return Progress(tenths=TENTHS * done // images, images=done, images_per_second=done / max(seconds, 1e-9), loss=0.0)


def _not_as_named(subject: str) -> TrainerFailed:
    return TrainerFailed(FailureCode.DATA, subject, "ask the run's admin for the network's file, and set it in [evaluation]")
