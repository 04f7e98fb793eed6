"""The [data] table of a site's TOML: which images the site trains on.

Owns the keys and what each kind of source needs. Must not know how images are read.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

CLASSES_MAX = 10_000  # as many as a model may have
SIXTEEN_BITS = 65_535


class DataConfig(BaseModel):
    """Where a site's images are.

    kind: "folder" (path/CLASS/*.jpg, .jpeg, .png), "idx" (a folder with Fashion-MNIST's four files, .gz or plain),
    "npz" (MedMNIST's layout) or "digits" (scikit-learn's, no path). classes: names in the order of the run's labels;
    for a folder these are the sub-folders, and a site that lacks one still numbers the rest as everybody does. split:
    which part of idx or npz. index_file: one image number a line, the images that this site owns (idx, npz, digits).
    full_scale: the value that counts as white in 16-bit images, 65535 unless the scanner writes fewer bits (12 bits:
    4095).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["folder", "idx", "npz", "digits"]
    path: Path | None = None
    classes: Annotated[tuple[Annotated[str, StringConstraints(min_length=1, max_length=255)], ...], Field(max_length=CLASSES_MAX)] = ()
    split: Literal["train", "val", "test"] = "train"
    index_file: Path | None = None
    full_scale: Annotated[int, Field(ge=256, le=SIXTEEN_BITS)] = SIXTEEN_BITS

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Self:
        if self.kind == "digits":
            if self.path is not None:
                raise ValueError("kind = digits takes no path: the images come with scikit-learn")
        elif self.path is None:
            raise ValueError(f"kind = {self.kind} needs a path")
        if self.kind == "folder" and self.index_file is not None:
            raise ValueError("kind = folder takes no index_file: leave only the site's own files in the folder")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name stands twice")
        if self.kind == "folder" and any(name in {".", ".."} or "/" in name for name in self.classes):
            raise ValueError("classes: each must be the name of one sub-folder")
        return self
