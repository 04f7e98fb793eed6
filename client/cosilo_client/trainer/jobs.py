"""What the daemon and the trainer say to one another: jobs one way; progress, a result or a failure the other.

Owns the messages and their one-line JSON form. Must not know sockets, processes or torch. Nothing here leaves the site.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from cosilo_client.data.config import DataConfig
from cosilo_common.diffusion.lora import LoraBase
from cosilo_common.diffusion.specification import (
    BATCH_MAX,
    BUCKETS_MAX,
    SEED_MAX,
    Architecture,
    Plain,
    Schedule,
    Training,
)
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import EvaluationTerms

THREADS_MAX = 1024  # more cores than any machine that trains


class FailureCode(Enum):
    """Why a job gave no result."""

    OUT_OF_MEMORY = "out-of-memory"
    DATA = "data"  # images, weights or a job that cannot be used as they are
    NON_FINITE = "non-finite"
    DISK = "disk"
    CRASHED = "crashed"
    KILLED = "killed"  # by somebody, and not because memory ran out


class TrainerFailed(CosiloError):
    """A job that failed in the trainer; the daemon lives on. code: why."""

    def __init__(self, code: FailureCode, subject: str, hint: str = "") -> None:
        self.code = code
        super().__init__("train", subject, hint)


class _Measures(Plain):
    data: DataConfig
    architecture: Architecture
    training: Training
    threads: Annotated[int, Field(ge=0, le=THREADS_MAX)] = 0


class _Job(_Measures):
    weights: Path  # of the model, or, over a base, of its adapters
    schedule: Schedule
    lora: LoraBase | None = None
    personal: Path | None = None


class TrainJob(_Job):
    """Train one round.

    personal: this site's own values of the tensors that stay at home (`Training.personal`), safetensors; None where it has none yet, and
    the weights' own are meant. keep_personal: where those go that it has afterwards; only where something stays.

    weights: the round's global weights, canonical safetensors. update: where the update goes, raw little-endian float32
    in the tensor table's order. seed: `seeding.site_seed`. threads: of the CPU, 0 for torch's choice. micro_batch: most
    images a forward pass, for each GPU; None for the whole batch.
    """

    kind: Literal["train"] = "train"
    update: Path
    keep_personal: Path | None = None
    seed: Annotated[int, Field(ge=0, le=SEED_MAX)]
    micro_batch: Annotated[int, Field(ge=1, le=BATCH_MAX)] | None = None


class EvaluateJob(_Job):
    """Measure the weights on the held-out part and train nothing: a statistics round."""

    kind: Literal["evaluate"] = "evaluate"


class MomentsJob(_Measures):
    """Take the moments of the features of this site's images, the held-out ones among them; no model is needed.

    update: where they go, raw little-endian float32 (`Moments.vector`). network: the site's own extractor, as `extractor` takes it, and
    weights its file; terms: the run's, whose digest the extractor must have.
    """

    kind: Literal["moments"] = "moments"
    update: Path
    network: str
    weights: Path | None = None
    terms: EvaluationTerms


Job = TrainJob | EvaluateJob | MomentsJob


class Hello(Plain):
    """A rank's first line."""

    kind: Literal["hello"] = "hello"
    rank: Annotated[int, Field(ge=0)]


class Progress(Plain):
    """How far a round is, at each tenth and at least every few seconds. loss: mean since the last report."""

    kind: Literal["progress"] = "progress"
    tenths: Annotated[int, Field(ge=0, le=10)]
    images: int
    images_per_second: float
    loss: float


class Result(Plain):
    """A finished job.

    weight: W, the number of images trained on (of the training part, for `evaluate`; measured, for `moments`). heldout_losses: of the incoming
    global weights, the mean in each timestep bucket; none for `moments`. train_loss: mean over the round, 0.0 where nothing was trained.
    images: drawn in all epochs. skipped: images that did not decode. data: digest of the images measured, for `moments`.
    """

    kind: Literal["result"] = "result"
    weight: Annotated[int, Field(ge=1)]
    heldout_losses: Annotated[tuple[float, ...], Field(max_length=BUCKETS_MAX)]
    train_loss: float
    steps: int
    images: int
    seconds: float
    images_per_second: float
    gpu_memory_bytes: int
    device: str
    skipped: int
    data: str = ""


class Notice(Plain):
    """A line for the daemon's log."""

    kind: Literal["notice"] = "notice"
    text: str


class Failure(Plain):
    """A job that failed in a way the trainer could name."""

    kind: Literal["failure"] = "failure"
    code: FailureCode
    subject: str
    hint: str = ""


Report = Hello | Progress | Result | Notice | Failure

_JOBS: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])
_REPORTS: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def to_line(message: Job | Report) -> bytes:
    """One message as one line of JSON."""
    return message.model_dump_json().encode() + b"\n"


def job_from_line(line: bytes) -> Job:
    """Parse a job; raises pydantic.ValidationError."""
    return _JOBS.validate_json(line)


def report_from_line(line: bytes) -> Report:
    """Parse a report; raises pydantic.ValidationError."""
    return _REPORTS.validate_json(line)
