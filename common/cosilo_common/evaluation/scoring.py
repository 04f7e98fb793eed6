"""A model against real images: draw from it, take features, give every score.

Owns which images are drawn (the same classes and the same noise for every model compared) and the cache of real features. Must not know
where weights or images come from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cosilo_common.canonical import lp, sha256
from cosilo_common.diffusion.sampling import draw_images, to_uint8
from cosilo_common.diffusion.specification import Sampling, Schedule
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation.distances import (
    NEIGHBOURS,
    frechet_distance,
    gaussian,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cosilo_common.evaluation.extractors import Extractor, Features, Pixels
from cosilo_common.evaluation.moments import Moments

KID_SUBSETS: Final = 50
KID_SUBSET_SIZE: Final = 500  # half of the authors' 1,000: sets here have 2,000 images and more; the estimate stays unbiased

_LABEL = b"cosilo/features/1"


@dataclass(frozen=True)
class Scored:
    """A set of images as scores need it: features of each, and its class (n,)."""

    features: Features
    labels: NDArray[np.int64]

    @property
    def vectors(self) -> NDArray[np.float64]:
        """(n, d), wide enough for sums of squares."""
        return self.features.vectors.astype(np.float64)


@dataclass(frozen=True)
class ClassScore:
    """One class's images against that class's real ones. images: generated; few of them make the FID large, compare only like with like."""

    label: int
    images: int
    fid: float
    kid: float


@dataclass(frozen=True)
class Scores:
    """fid: lower is better, as is kid; precision, recall: 0 to 1; inception_score: None where the extractor has no classes."""

    fid: float
    kid: float
    kid_deviation: float
    precision: float
    recall: float
    inception_score: float | None
    by_class: tuple[ClassScore, ...]


def draw_for_scoring(
    unet: torch.nn.Module, schedule: Schedule, sampling: Sampling, *, count: int, classes: int, seed: int
) -> tuple[Pixels, NDArray[np.int64]]:
    """(images (count, C, S, S) uint8, labels (count,)): classes in turn, and noise that depends on the seed and on nothing else.

    The generator is this call's own, so that no caller's state repeats in it or is changed by it.
    """
    labels = torch.arange(count) % classes
    images = draw_images(unet, schedule, labels, sampling, torch.Generator().manual_seed(seed))
    return to_uint8(images), labels.numpy()


def scored(extractor: Extractor, images: Pixels, labels: NDArray[np.int64]) -> Scored:
    """A set of images with its features."""
    return Scored(extractor.features(images), labels)


def scored_real(extractor: Extractor, images: Pixels, labels: NDArray[np.int64], cache: Path) -> Scored:
    """The same, read from the folder `cache` where this extractor has seen these very images before.

    A file's name is the digest of the extractor and every pixel; one that does not parse is written anew.
    """
    key = sha256(lp(_LABEL, extractor.name.encode(), extractor.digest.encode(), repr(images.shape).encode(), sha256(images.tobytes())))
    path = cache / f"{key.hex()}.safetensors"
    try:
        found = load_file(path)
        return Scored(Features(found["vectors"], found.get("logits")), labels)
    except (OSError, SafetensorError, KeyError):
        pass  # absent or torn: computed below
    features = extractor.features(images)
    cache.mkdir(parents=True, exist_ok=True)
    arrays = {"vectors": features.vectors} | ({} if features.logits is None else {"logits": features.logits})
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(arrays, temporary)
    temporary.replace(path)
    return Scored(features, labels)


def score(real: Scored, generated: Scored, *, seed: int, by_class: bool = False) -> Scores:
    """Every score of a generated set. seed: of KID's subsets and of the real rows that precision and recall compare (as many as are
    generated); by_class: the single classes as well, those with two images or more on both sides."""
    random = np.random.default_rng(seed)
    ours, theirs = generated.vectors, real.vectors
    kid = kernel_distance(theirs, ours, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, random=random)
    same = min(len(ours), len(theirs))
    pick = random.choice(len(theirs), same, replace=False)
    manifold = precision_recall(theirs[pick], ours[:same], neighbours=NEIGHBOURS)
    logits = generated.features.logits
    return Scores(
        fid=frechet_distance(gaussian(theirs), gaussian(ours)),
        kid=kid.mean,
        kid_deviation=kid.deviation,
        precision=manifold.precision,
        recall=manifold.recall,
        inception_score=None if logits is None else inception_score(logits.astype(np.float64)),
        by_class=tuple(_class_scores(real, generated, random)) if by_class else (),
    )


@dataclass(frozen=True)
class FederatedScores:
    """What can be said against real images of which only the summed moments are known. extractor: its name with its input size."""

    fid: float
    inception_score: float | None
    real_images: int
    extractor: str


def score_against_moments(extractor: Extractor, real: Moments, images: Pixels) -> FederatedScores:
    """Scores drawn images (n, C, H, W) against a moments round's sum. Raises CosiloError where it is of another width."""
    features = extractor.features(images)
    if features.vectors.shape[1] != len(real.first):
        width = features.vectors.shape[1]
        raise CosiloError("score", f"{extractor.name} has {width} features, the sum {len(real.first)}", "use the run's extractor")
    logits = features.logits
    return FederatedScores(
        fid=frechet_distance(real.gaussian(), gaussian(features.vectors.astype(np.float64))),
        inception_score=None if logits is None else inception_score(logits.astype(np.float64)),
        real_images=real.count,
        extractor=extractor.name,
    )


@dataclass(frozen=True)
class LocalScores:
    """Every score against real images that lie here. extractor: its name with its input size; digest: of its weights or module."""

    scores: Scores
    real_images: int
    extractor: str
    digest: str


def score_against_images(
    extractor: Extractor, real: tuple[Pixels, NDArray[np.int64]], drawn: tuple[Pixels, NDArray[np.int64]], *, seed: int
) -> LocalScores:
    """Scores drawn images (n, C, H, W) with labels (n,) against real ones, the single classes as well. Raises CosiloError for too few."""
    least = NEIGHBOURS + 1
    if min(len(real[0]), len(drawn[0])) < least:
        subject = f"{len(real[0])} real and {len(drawn[0])} drawn images"
        raise CosiloError("score", subject, f"precision and recall need {least} of each at the least; thousands say something")
    scores = score(scored(extractor, *real), scored(extractor, *drawn), seed=seed, by_class=True)
    return LocalScores(scores, len(real[0]), extractor.name, extractor.digest)


def _class_scores(real: Scored, generated: Scored, random: np.random.Generator) -> list[ClassScore]:
    theirs, ours = real.vectors, generated.vectors
    scores = []
    for label in np.unique(generated.labels):
        a, b = theirs[real.labels == label], ours[generated.labels == label]
        if len(a) < 2 or len(b) < 2:
            continue
        kid = kernel_distance(a, b, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, random=random)
        scores.append(ClassScore(int(label), len(b), frechet_distance(gaussian(a), gaussian(b)), kid.mean))
    return scores
