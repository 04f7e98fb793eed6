"""The signed description of a run: who takes part, what is trained, how updates are encoded, opened and applied.

A manifest is plain values only: it names an architecture, a schedule and hyper-parameters that both sides already have. Its canonical
JSON is what an admin signs; the SHA-256 of those bytes is the run. Must not import torch or grpc: the command line loads this at start.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cosilo_common.canonical import canonical_json, lp, sha256
from cosilo_common.diffusion.lora import Lora
from cosilo_common.diffusion.parts import Split, split_of
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule, Training, check_fits
from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable

SECURE_AGGREGATION = "cosilo-secagg/1"
PLAIN_AGGREGATION = "insecure-plain-sum"

PARTICIPANTS_MAX = 1000  # the complete graph of masks costs N^2 share messages: past this another protocol is the right one
MANIFEST_BYTES_MAX = 16 << 20  # 100,000 tensors at 160 bytes a row; larger is refused before it is parsed
ROUNDS_MAX = 100_000  # a round a minute for two months
SECURE_SITES_MIN = 3  # PROTOCOL.md, R1: with two, a sum tells each site the other's update
FEATURES_MAX = 4096  # twice Inception's; 8.4 million values, 34 MB an upload
IMAGES_MAX = 1 << 24  # of all sites: a count that float32 holds exactly
CORRECTION_SAMPLES_MAX = 10_000  # held in memory: 492 MB at 64 pixels in colour; a CPU draws no more of them in the time limit
CORRECTION_STEPS_MAX = 10_000  # a step takes a tenth of a second and more on a CPU: beyond the time limit
LOSS_WORDS_EXTRA = 1  # the round's training loss stands after the buckets in the tail

SiteName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")]
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400, allow_inf_nan=False)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Participant(_Plain):
    """A site that may take part, by the Ed25519 key (32 bytes, hex) that signs for it."""

    name: SiteName
    key: Hex32


class EncodingTerms(_Plain):
    """PROTOCOL.md, Encoding: b, c, cap and the bound of the losses.

    bits: 32 (deterministic) or 24 (stochastic, three bytes a value). clip: c, the largest absolute change of a weight in one round.
    cap: the largest sample weight; weights far below it lose precision. loss_max: losses are clipped to [0, loss_max].
    """

    bits: Literal[24, 32] = 32
    clip: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)
    cap: int = Field(default=4096, ge=1, le=1 << 24)
    loss_max: float = Field(default=16.0, gt=0, le=1e6, allow_inf_nan=False)


class ServerOptimiserTerms(_Plain):
    """How the coordinator steps the global model along the mean update (the negative pseudo-gradient).

    kind: fedavg (McMahan et al. 2017), fedavgm (Hsu et al. 2019), fedadam or fedyogi (Reddi et al. 2021).
    learning_rate: of the server; momentum: fedavgm's beta and the adaptive methods' beta1; beta2, tau: the adaptive methods'.
    """

    kind: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0, le=1)


class Deadlines(_Plain):
    """Seconds without any progress after which a site is left out of the phase. One deadline a phase; none nests."""

    gather_s: Seconds = 60.0
    training_s: Seconds = 1800.0
    sharing_s: Seconds = 120.0
    uploading_s: Seconds = 300.0
    consenting_s: Seconds = 120.0
    revealing_s: Seconds = 120.0


class DownlinkTerms(_Plain):
    """Every checkpoint is rounded to a step from the one before it, so that a site that holds that one fetches `bits` a value (step.py)."""

    bits: Literal[24] = 24


class CardTerms(_Plain):
    """What the model card of an exported checkpoint may say. license: as model hubs list them, such as cc-by-4.0; empty for none.

    name_participants: by their names rather than their number; sites see it before they accept.
    """

    license: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.+-]{0,64}$")] = ""
    name_participants: bool = False


class EvaluationTerms(_Plain):
    """Which features of its real images a site sums in a moments round, and how they are encoded (docs/protocol.md, Moments).

    extractor: a name, or module:callable; it names what each site has and chose itself, nothing is loaded because it stands here.
    sha256: of its weights, or of the module's file. side_pixels: images are fitted to that size. features: d, of one image. feature_max:
    no feature is larger in magnitude; moments beyond what follows from it are clipped, and the opened sum says so. images_max: the
    largest weight, and the most images that a site measures; weights far below it lose precision.
    """

    extractor: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,200}$")]
    sha256: Hex32
    side_pixels: int = Field(ge=1, le=1024)
    features: int = Field(ge=1, le=FEATURES_MAX)
    feature_max: float = Field(ge=1e-6, le=1e3, allow_inf_nan=False)
    images_max: int = Field(default=4096, ge=1, le=IMAGES_MAX)

    @property
    def key(self) -> bytes:
        """What R9 counts by, 32 bytes: the network alone, whatever size or bounds a manifest gives beside it."""
        return sha256(lp(b"cosilo/moments/1", self.extractor.encode(), bytes.fromhex(self.sha256)))


class WarmStartTerms(_Plain):
    """The weights that the first round begins from, instead of untrained ones. sha256: of a canonical weights file for the run's tensors."""

    sha256: Hex32


class CorrectionTerms(_Plain):
    """After every `every`-th round the coordinator trains the average on images that the global model draws (docs/levers.md, Correction).

    samples: labelled images drawn; steps: of Adam at learning_rate on them, 0 for none; sampler_steps: of denoising, 0 for sampling.steps.
    """

    every: int = Field(default=1, ge=1, le=ROUNDS_MAX)
    samples: int = Field(default=512, ge=1, le=CORRECTION_SAMPLES_MAX)
    steps: int = Field(default=8, ge=0, le=CORRECTION_STEPS_MAX)
    learning_rate: float = Field(default=1e-4, gt=0, le=1, allow_inf_nan=False)
    sampler_steps: int = Field(default=0, ge=0, le=1000)

    def due(self, round_number: int) -> bool:
        """Whether this round's average is corrected; rounds of every kind are counted, and only training ones have an average."""
        return self.steps > 0 and round_number % self.every == 0


class Manifest(_Plain):
    """One run, whole.

    What a manifest leaves unsaid has its default, which is what a release did that did not know the value: a default never changes.
    A table that may be absent (None) is no part of the canonical bytes then.

    participants: sorted by name, unique; f: most participants that may collude with the coordinator (R1); n_min: fewest sites in a sum;
    cohort: sites invited to a round, 0 for all; rounds_max: highest round number of any kind; ema_decay: of the global model, 0 for none.
    tensors: of what sites fetch and train: the model's, or with lora its adapters', and the base's are then those of the architecture.
    """

    version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}$")]
    federation: SiteName
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    participants: tuple[Participant, ...] = Field(min_length=1, max_length=PARTICIPANTS_MAX)
    architecture: Architecture
    schedule: Schedule
    training: Training
    sampling: Sampling
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    aggregation: Literal["cosilo-secagg/1", "insecure-plain-sum"] = "cosilo-secagg/1"
    encoding: EncodingTerms = EncodingTerms()
    server_optimiser: ServerOptimiserTerms = ServerOptimiserTerms()
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    n_min: int = Field(default=3, ge=1)
    f: int = Field(default=1, ge=0)
    cohort: int = Field(default=0, ge=0)
    rounds_max: int = Field(default=1000, ge=1, le=ROUNDS_MAX)
    max_rounds_per_model: int = Field(default=2, ge=1, le=100)
    deadlines: Deadlines = Deadlines()
    card: CardTerms = CardTerms()
    evaluation: EvaluationTerms | None = None
    warm_start: WarmStartTerms | None = None
    lora: Lora | None = None
    correction: CorrectionTerms | None = None
    downlink: DownlinkTerms | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [p.name for p in self.participants]
        if names != sorted(set(names)):
            raise ValueError("participants must be sorted by name, each once")
        if len({p.key for p in self.participants}) != len(names):
            raise ValueError("participants: two sites have one key")
        least = self.least_invited
        if self.cohort and not least <= self.cohort <= len(names):
            raise ValueError(f"cohort must be 0 (all) or from {least} to {len(names)}, not {self.cohort}")
        if least > len(names):
            raise ValueError(f"{len(names)} participants cannot make a round: n_min {self.n_min}, f {self.f} need {least}")
        if self.secure and self.n_min < SECURE_SITES_MIN:
            raise ValueError(f"n_min must be at least {SECURE_SITES_MIN} under {SECURE_AGGREGATION}, not {self.n_min}")
        if len(names) * self.encoding.cap > (1 << (self.encoding.bits - 1)) - 1:
            raise ValueError(f"encoding: {len(names)} participants times cap {self.encoding.cap} do not fit {self.encoding.bits} bits")
        if self.evaluation is not None and len(names) * self.evaluation.images_max > IMAGES_MAX:
            raise ValueError(f"evaluation: {len(names)} participants times images_max {self.evaluation.images_max} are above {IMAGES_MAX}")
        check_fits(self.architecture, self.schedule, self.training, self.sampling)
        self.split.base_table  # noqa: B018 - building it checks names, shapes and order, and that something is left to sum
        if self.training.control_variates and self.encoding.bits == 24:
            raise ValueError("control_variates need encoding.bits = 32: b = 24 lives on clip ranges that follow each tensor's own changes")
        if self.training.control_variates and self.downlink is not None:
            raise ValueError(
                "downlink: a checkpoint with control_variates is fetched whole: its model stands in two files, which must agree"
            )
        if self.correction is not None and (self.training.personal or self.training.control_variates or self.lora is not None):
            raise ValueError("correction: needs a whole model at the coordinator: no personal layers, control_variates or lora")
        if self.correction is not None and self.correction.sampler_steps > self.schedule.train_timesteps:
            raise ValueError("correction: sampler_steps are more than schedule.train_timesteps")
        return self

    @property
    def secure(self) -> bool:
        """Whether updates are masked."""
        return self.aggregation == SECURE_AGGREGATION

    @property
    def least_invited(self) -> int:
        """The fewest sites that a round may invite: R1 when masked, n_min otherwise."""
        return max(self.n_min, self.f + 2) if self.secure else self.n_min

    @property
    def tensor_table(self) -> TensorTable:
        """The order in which weights are one float32 vector."""
        return TensorTable(self.tensors)

    @property
    def split(self) -> Split:
        """Which tensors are summed, and which stay at the sites (`Training.personal`)."""
        return split_of(self.tensor_table, self.architecture, self.training.personal, self.training.control_variates, self.lora)

    @property
    def shared_table(self) -> TensorTable:
        """The tensors that are summed: the order in which an update is one float32 vector."""
        return self.split.shared_table

    @property
    def loss_words(self) -> int:
        """Losses in the tail: the held-out loss of each timestep bucket, then the training loss."""
        return self.training.loss_buckets + LOSS_WORDS_EXTRA

    def canonical(self) -> bytes:
        """The bytes that are signed: what is said and nothing else, so that those of an older release stay as they were signed."""
        said = self.model_dump(mode="json", exclude_unset=True)
        return canonical_json({name: value for name, value in said.items() if value is not None})

    def explicit(self) -> Self:
        """The same run with every default said, so that its bytes mean the same to whoever has other defaults."""
        return self.model_validate(self.model_dump())

    def digest(self) -> bytes:
        """The run: SHA-256 of the canonical bytes."""
        return sha256(self.canonical())

    def participant_keys(self) -> dict[str, bytes]:
        """Ed25519 public keys by site name."""
        return {p.name: bytes.fromhex(p.key) for p in self.participants}


def parse_manifest(data: bytes) -> Manifest:
    """Parses canonical bytes. Refuses unknown keys, impossible shapes, and bytes that are not canonical."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise CosiloError("read manifest", f"{len(data)} bytes are more than {MANIFEST_BYTES_MAX}", "ask its author for a smaller model")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CosiloError("read manifest", describe_validation(error), "correct the named value and create the run again") from None
    if manifest.canonical() != data:
        raise CosiloError("read manifest", "its bytes are not in canonical form", "create it with `cosilo run create`")
    return manifest


def signed_bytes(federation: str, run: bytes) -> bytes:
    """What an admin signs for a run."""
    return lp(b"cosilo/manifest/1", federation.encode(), run)


def sign_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """Signs a manifest: 64 bytes."""
    return key.sign(signed_bytes(manifest.federation, manifest.digest()))


def verify_manifest(data: bytes, signature: bytes, admin_keys: dict[str, bytes], federation: str) -> tuple[Manifest, str]:
    """Parses a manifest and finds the admin who signed it: (manifest, admin's name). admin_keys: Ed25519 public keys by name."""
    manifest = parse_manifest(data)
    run = sha256(data)
    if manifest.federation != federation:
        raise CosiloError("verify manifest", f"run {run.hex()[:12]} belongs to federation {manifest.federation!r}, not {federation!r}")
    for name, key in sorted(admin_keys.items()):
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_bytes(federation, run))
        except InvalidSignature:
            continue
        return manifest, name
    raise CosiloError(
        "verify manifest",
        f"run {run.hex()[:12]} is not signed by an admin of {federation!r}",
        "ask the admin to create the run again, or to add their key to the members list",
    )


def describe_validation(error: ValidationError) -> str:
    """A pydantic error in one line that names each field."""
    return "; ".join((".".join(str(part) for part in item["loc"]) or "manifest") + ": " + item["msg"] for item in error.errors()[:5])
