"""Federated FID under the masks: sites' moments of features go through the whole protocol, and the opened sum scores as pooled images do.

Real features (EfficientNet-lite0 of scikit-learn's digits) at their full width: a covariance that is far from full rank, the hardest case for
anything that is rounded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cosilo_client.secagg import Start
from cosilo_common.encoding import Encoding, Section
from cosilo_common.evaluation import lite0
from cosilo_common.evaluation.distances import frechet_distance, gaussian
from cosilo_common.evaluation.extractors import extractor
from cosilo_common.evaluation.moments import Moments, clip_needed, packed_size, pooled
from cosilo_common.manifest import EncodingTerms
from cosilo_common.secagg.messages import RoundKind
from tests.protocol.parties import BASE, Coordinator, close_all, federation, make_terms, names
from tools.convert_efficientnet import CHECKPOINT_SHA256, convert, package_file

CAP = 1024
CLIP = clip_needed(lite0.FEATURE_MAX)
SIZE = packed_size(lite0.FEATURES)
SITES = dict(zip(names(4), ((0, 300), (300, 350), (350, 750), (750, 900)), strict=True))  # images by site: as uneven as hospitals
GENERATED = (900, 1400)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    weights = tmp_path_factory.mktemp("features") / "lite0.safetensors"
    convert(package_file(), CHECKPOINT_SHA256, weights)
    images = (load_digits().images[: GENERATED[1]] * 15.9).astype(np.uint8)[:, None]
    return extractor("efficientnet-lite0", weights=weights).features(images).vectors


@pytest.mark.parametrize("dropped", [None, "site-01"])
def test_a_fid_against_an_opened_sum_of_moments_equals_the_pooled_one(tmp_path: Path, features: np.ndarray, dropped: str | None) -> None:
    moments = {name: Moments.of(features[start:stop]) for name, (start, stop) in SITES.items()}
    terms = make_terms(names(4), SIZE, encoding=EncodingTerms(clip=CLIP, cap=CAP, loss_max=16.0))
    encoding = Encoding(32, 4, CAP, (Section(SIZE, CLIP),), 16.0, 2)
    start = Start(1, RoundKind.TRAIN, names(4), BASE, encoding, encoding.digest())
    sites = federation(tmp_path, terms, start, {name: (part.vector(), part.count) for name, part in moments.items()})
    opened = Coordinator(terms, start, sites, {dropped: "upload"} if dropped else {}).run()
    assert opened.survivors == tuple(name for name in names(4) if name != dropped)
    images = np.concatenate([features[slice(*SITES[name])] for name in opened.survivors]).astype(np.float64)
    assert opened.tail.total_weight == len(images)

    mean = np.empty(SIZE, np.float32)
    encoding.dequantise(opened.words, 0, opened.tail.total_weight, mean)
    exact = pooled(moments[name] for name in opened.survivors).vector()
    rounding = 2 * np.spacing(np.abs(exact))  # each site's moments are float32, and so is the mean
    assert np.all(np.abs(mean - exact) <= encoding.error_bound(CLIP, len(opened.survivors), len(images)) + rounding)

    generated = gaussian(features[slice(*GENERATED)].astype(np.float64))
    federated = frechet_distance(Moments.from_vector(len(images), mean).gaussian(), generated)
    direct = frechet_distance(gaussian(images), generated)
    assert direct > 1.0
    assert federated == pytest.approx(direct, rel=1e-5)  # asked for: 1e-3
    close_all(sites)
    for site in sites.values():
        site.close()
