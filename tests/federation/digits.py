"""scikit-learn's digits over the sites of a local federation: which site owns which images.

Owns the division and the index files. Must not know processes or training. A site reads its own images only: those that the index
file in its own folder lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.federation.local import SiteSpec
from tests.federation.splitting import dirichlet_label_skew
from tests.federation.toml_files import Toml

SITE_NAMES = ("northgate", "riverside", "lakeview", "st-anna", "hillcrest", "westend", "seaview", "oakfield")


def site_names(sites: int) -> list[str]:
    """Names for so many sites."""
    return [SITE_NAMES[k] if k < len(SITE_NAMES) else f"site-{k + 1}" for k in range(sites)]


def digit_labels() -> NDArray[np.int64]:
    """The classes of all digits, in the data set's order: (1797,)."""
    from sklearn.datasets import load_digits

    return np.asarray(load_digits().target, dtype=np.int64)


def digits_sites(
    root: Path, sites: int, *, alpha: float, least: int, seed: int, policy: Mapping[str, Toml] | None = None
) -> list[SiteSpec]:
    """Sites that share the digits with label skew; writes root/NAME/images.txt for each. See `dirichlet_label_skew`."""
    split = dirichlet_label_skew(digit_labels(), sites, alpha=alpha, least=least, seed=seed)
    specs = []
    for name, indices in zip(site_names(sites), split, strict=True):
        (root / name).mkdir(parents=True, exist_ok=True)
        index_file = root / name / "images.txt"
        index_file.write_text("".join(f"{index}\n" for index in indices), encoding="ascii")
        specs.append(SiteSpec(name, {"kind": "digits", "index_file": str(index_file)}, policy or {}))
    return specs
