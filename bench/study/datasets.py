"""The study's images: which are trained on, at which site, and which only score.

Owns where they lie and the division over sites. Must not know training or processes. Every image goes through the sites' own decoding,
so that a model is scored against what it was trained on.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.study.scenario import Data, Division
from cosilo_client.data import DataConfig, LocalImages, load_images, open_source, split_heldout
from cosilo_client.data.idx import read_idx
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError
from tests.federation.digits import site_names
from tests.federation.splitting import dirichlet_label_skew, dirichlet_quantity_skew

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
HOLDOUT = "holdout"
_TEST_ORDER_SEED = 0


@dataclass(frozen=True)
class StudyData:
    """sites: each site's [data] table, parsed; pooled: all sites' images in the order of `sites`; test: images that no site has."""

    sites: dict[str, DataConfig]
    pooled: LocalImages
    test: LocalImages
    sizes: dict[str, int]
    train_sizes: dict[str, int]
    class_counts: dict[str, list[int]]


def study_data(
    data: Data, split: Division, architecture: Architecture, heldout_fraction: float, root: Path, given: Path | None
) -> StudyData:
    """Divides and decodes the images. root: a folder for index files and unpacked archives; given: --data. Raises CosiloError."""
    root.mkdir(parents=True, exist_ok=True)
    if data.kind == "fashion-mnist":
        sites, test = _fashion(data, split, root, given or FASHION_MNIST)
    else:
        sites, test = _folders(root, given)
    local = {name: load_images(open_source(config), architecture) for name, config in sites.items()}
    if any(part.full_scale != 255 for part in local.values()):
        raise CosiloError("read data", "16-bit images", "the study scores 8-bit images")
    pooled = LocalImages(
        np.concatenate([part.images for part in local.values()]),
        np.concatenate([part.labels for part in local.values()]),
        255,
        sum(part.skipped for part in local.values()),
    )
    return StudyData(
        sites,
        pooled,
        _first(load_images(open_source(test), architecture), data.test_images),
        {name: len(part.labels) for name, part in local.items()},
        {name: len(split_heldout(part, heldout_fraction).train) for name, part in local.items()},
        {name: np.bincount(part.labels, minlength=architecture.num_classes).tolist() for name, part in local.items()},
    )


def _fashion(data: Data, split: Division, root: Path, folder: Path) -> tuple[dict[str, DataConfig], DataConfig]:
    files = [folder / f"train-labels-idx1-ubyte{end}" for end in ("", ".gz")]
    found = next((path for path in files if path.is_file()), None)
    if found is None:
        raise CosiloError(
            "read data", f"{folder}: Fashion-MNIST is not there", "apt-get install dataset-fashion-mnist, or give --data FOLDER"
        )
    labels = read_idx(found).astype(np.int64)
    if data.images > len(labels):
        raise CosiloError("read data", f"{data.images} images of {len(labels)}", "ask for fewer in [data]")
    chosen = np.sort(np.random.default_rng(data.subset_seed).permutation(len(labels))[: data.images])
    parts = _divided(labels[chosen], split)
    sites = {}
    for name, part in zip(site_names(split.sites), parts, strict=True):
        index_file = root / f"{name}.txt"
        index_file.write_text("".join(f"{index}\n" for index in chosen[part]), encoding="ascii")
        sites[name] = DataConfig(kind="idx", path=folder, index_file=index_file)
    return sites, DataConfig(kind="idx", path=folder, split="test")


def _divided(labels: NDArray[np.int64], split: Division) -> tuple[NDArray[np.int64], ...]:
    try:
        if split.kind == "quantity":
            return dirichlet_quantity_skew(len(labels), split.sites, alpha=split.beta, least=split.least, seed=split.seed)
        return dirichlet_label_skew(labels, split.sites, alpha=split.beta, least=split.least, seed=split.seed)
    except ValueError as error:
        raise CosiloError("divide data", str(error), "change [split]") from None


def _folders(root: Path, given: Path | None) -> tuple[dict[str, DataConfig], DataConfig]:
    """Sites by the sub-folders of `given`, which are SITE/CLASS/*.jpeg, or SITE.tar of the same; HOLDOUT is the test set."""
    if given is None or not given.is_dir():
        raise CosiloError("read data", f"{given}: not a folder", "give --data FOLDER with a folder (or .tar) for each site, and holdout")
    for archive in sorted(given.glob("*.tar")):
        if not (root / archive.stem).exists():
            with tarfile.open(archive) as tar:
                tar.extractall(root / archive.stem, filter="data")
    found = {path.name: path for base in (given, root) for path in sorted(base.iterdir()) if path.is_dir()}
    test = found.pop(HOLDOUT, None)
    if test is None or len(found) < 3:
        raise CosiloError(
            "read data", f"{given}: {len(found)} sites, {'no ' if test is None else ''}holdout", "3 sites and a holdout are needed"
        )
    classes = tuple(sorted({path.name for site in found.values() for path in site.iterdir() if path.is_dir()}))
    return {name: DataConfig(kind="folder", path=path, classes=classes) for name, path in sorted(found.items())}, DataConfig(
        kind="folder", path=test, classes=classes
    )


def _first(local: LocalImages, count: int) -> LocalImages:
    """So many images in an order of our own: a folder's is by class."""
    order = np.random.default_rng(_TEST_ORDER_SEED).permutation(len(local.labels))[:count]
    return LocalImages(local.images[order], local.labels[order], local.full_scale, local.skipped)
