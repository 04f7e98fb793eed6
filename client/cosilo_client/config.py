"""A site's one TOML file, parsed once into frozen types: an unknown key is an error, and no value in it is a secret.

Owns the keys, their bounds and their defaults; `site.example.toml` beside this module shows them all. Must not know
what any of them leads to. Relative paths are relative to the file's own folder.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from datetime import time
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from cosilo_client.data.config import DataConfig
from cosilo_client.run_terms import ROUNDS_PER_MODEL, ROUNDS_PER_MODEL_MAX
from cosilo_common.errors import CosiloError
from cosilo_common.identity.proxy import Proxy, parse_proxy
from cosilo_common.manifest import PARTICIPANTS_MAX, ROUNDS_MAX, describe_validation
from cosilo_common.telemetry import LogForm, LogLevel, parse_listen

EXAMPLE_PATH: Final = Path(__file__).with_name("site.example.toml")
CONFIG_BYTES_MAX: Final = 1 << 20  # a hundred times what the example has
RUNS_MAX: Final = 1000  # runs that a policy lists: more than a site joins in its life
SPANS_MAX: Final = 48  # hours of the day: one for each half hour
THREADS_MAX: Final = 1024  # above the cores of any machine
GPUS_MAX: Final = 64  # above the GPUs of any machine
WAIT_MAX_S: Final = 7 * 86_400.0  # a week: anything longer is a mistake in the unit
HOURS_MAX: Final = 100_000.0  # eleven years
GIB: Final = 1 << 30

_READ: Final = "read configuration"
_SPAN = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])")


@dataclass(frozen=True)
class HourSpan:
    """Hours of the site's local day, from `start` up to but not including `end`; over midnight where end <= start."""

    start: time
    end: time

    def holds(self, now: time) -> bool:
        """Whether a local time of day lies within."""
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end

    @classmethod
    def parse(cls, value: object) -> Self:
        """Reads "19:00-07:00"; the end may be 24:00. Raises ValueError."""
        found = _SPAN.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ValueError('must be hours like "19:00-07:00"')
        hour, minute, end_hour, end_minute = map(int, found.groups())
        if end_hour == 24 and end_minute:
            raise ValueError("the day ends at 24:00")
        span = cls(time(hour, minute), time(end_hour % 24, end_minute))
        if span.start == span.end:
            raise ValueError("begins when it ends; leave hours out to allow the whole day")
        return span


def _path(value: object) -> object:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a path in quotes")
    return Path(value).expanduser()


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


FilePath = Annotated[Path, BeforeValidator(_path)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=WAIT_MAX_S)]
Span = Annotated[HourSpan, BeforeValidator(HourSpan.parse)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}$")]


class MetricsTable(_Table):
    """Where /metrics, /healthz and /readyz are. Loopback unless told otherwise: they have no authentication."""

    listen: str = "127.0.0.1:9465"

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str) -> str:
        try:
            parse_listen(listen)
        except CosiloError as error:
            raise ValueError(f"{error.subject}; {error.hint}") from None
        return listen


class TrainerTable(_Table):
    """How the trainer process runs.

    device: "auto" takes a CUDA device where there is one. threads: of the CPU, 0 for all that the process may use;
    where several sites share a machine, set it, or they wait for one another.
    idle_s: how long the process stays warm between rounds. gpus: processes, one a GPU, that train together.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] = "auto"
    threads: Annotated[Whole, Field(ge=0, le=THREADS_MAX)] = 0
    idle_s: Seconds = 600.0
    gpus: Annotated[Whole, Field(ge=1, le=GPUS_MAX)] = 1

    @model_validator(mode="after")
    def _several_gpus_are_cuda(self) -> Self:
        if self.gpus > 1 and self.device not in ("auto", "cuda"):
            raise ValueError(f'gpus = {self.gpus} needs device = "auto" or "cuda", not "{self.device}"')
        return self


class PolicyTable(_Table):
    """What this site lets itself be asked; see cosilo_client.policy for how it is judged.

    runs: "accepted" (a person runs `cosilo-site accept`), or a list of runs, by name or digest, that are also accepted
    without a person where every participant's key was pinned before. rounds_max, hours_max: rounds and hours of
    training in one run, in all. statistics_rounds_max: statistics rounds in one run, in all, and never more than
    rounds_max. max_rounds_per_model: R8's bound where a run's manifest asks for more. cohort_min: fewest sites invited
    to a round. f_min: least f of a run, by default max(1, floor(|P| / 3)). hours: of the site's local day, in which a
    round begins and is trained; empty for any.
    """

    runs: Literal["accepted"] | Annotated[tuple[RunName, ...], Field(max_length=RUNS_MAX)] = "accepted"
    rounds_max: Annotated[Whole, Field(ge=0, le=ROUNDS_MAX)] = ROUNDS_MAX
    statistics_rounds_max: Annotated[Whole, Field(ge=0, le=ROUNDS_MAX)] = 100
    max_rounds_per_model: Annotated[Whole, Field(ge=1, le=ROUNDS_PER_MODEL_MAX)] = ROUNDS_PER_MODEL
    hours_max: Annotated[float, Field(strict=True, ge=0, le=HOURS_MAX)] = HOURS_MAX
    cohort_min: Annotated[Whole, Field(ge=1, le=PARTICIPANTS_MAX)] = 3
    f_min: Annotated[Whole, Field(ge=0, le=PARTICIPANTS_MAX)] | None = None
    hours: Annotated[tuple[Span, ...], Field(max_length=SPANS_MAX)] = ()
    allow_insecure_plain_sum: Flag = False


class EvaluationTable(_Table):
    """The network that turns this site's images into features in a moments round; without it the site declines such rounds.

    extractor: efficientnet-lite0, inception, or module:callable of the site's own code. weights: its safetensors file; none for a module.
    A run names the extractor it means, and its digest: only the very same is used.
    """

    extractor: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{0,200}$")] = ""
    weights: FilePath | None = None


class LogTable(_Table):
    """How the log looks: "auto" is for people on a terminal and JSON elsewhere."""

    form: LogForm = "auto"
    level: LogLevel = "info"


class NetworkTable(_Table):
    """How the one outbound connection is kept; its keepalive is fixed (cosilo_common.identity.tls).

    timeout_s: how long an answer may take. stall_s: a transfer that moves nothing for so long is begun again at its
    offset. backoff_min_s, backoff_max_s: bounds of the wait between attempts; each wait is drawn below its bound.
    """

    timeout_s: Annotated[Seconds, Field(ge=0.1)] = 20.0
    stall_s: Annotated[Seconds, Field(ge=0.1)] = 60.0
    backoff_min_s: Annotated[Seconds, Field(ge=0.01)] = 1.0
    backoff_max_s: Annotated[Seconds, Field(ge=0.01)] = 60.0

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.backoff_min_s > self.backoff_max_s:
            raise ValueError(f"backoff_min_s {self.backoff_min_s} is above backoff_max_s {self.backoff_max_s}")
        return self


class CoordinatorTable(_Table):
    """The way to the coordinator; where it is, enrolment said.

    proxy: of HTTP, as "http://host:port", for every connection; "" for none, whatever the environment says; left out, the
    environment decides (https_proxy). proxy_credentials: a file of mode 0600 with user:password.
    """

    proxy: str | None = None
    proxy_credentials: FilePath | None = None

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, proxy: str | None) -> str | None:
        if proxy:
            try:
                parse_proxy(proxy)
            except CosiloError as error:
                raise ValueError(f"{error.subject}; {error.hint}") from None
        return proxy

    @model_validator(mode="after")
    def _credentials_are_for_a_proxy(self) -> Self:
        if self.proxy_credentials is not None and not self.proxy:
            raise ValueError("proxy_credentials without a proxy")
        return self

    def route(self) -> Proxy | None:
        """The proxy to go through; none where the environment decides."""
        return None if self.proxy is None else Proxy(parse_proxy(self.proxy) if self.proxy else "", self.proxy_credentials)


class CacheTable(_Table):
    """How much of the disk fetched weights may take; the newest are kept."""

    limit_gib: Annotated[float, Field(strict=True, gt=0, le=1 << 20)] = 20.0

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.limit_gib * GIB)


class SiteConfig(_Table):
    """The whole file. state: the daemon's own folder (keys, ledger, spool), which nobody else may read."""

    state: FilePath
    data: DataConfig
    metrics: MetricsTable = MetricsTable()
    trainer: TrainerTable = TrainerTable()
    policy: PolicyTable = PolicyTable()
    evaluation: EvaluationTable = EvaluationTable()
    log: LogTable = LogTable()
    network: NetworkTable = NetworkTable()
    coordinator: CoordinatorTable = CoordinatorTable()
    cache: CacheTable = CacheTable()


def load_site_config(path: Path) -> SiteConfig:
    """Reads and checks a site's TOML. Raises CosiloError, which names the file, the key and what to do."""
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise CosiloError(_READ, f"{path}: {error.strerror}", "give its path with --config, or in COSILO_SITE_CONFIG") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise CosiloError(_READ, f"{path} is longer than {CONFIG_BYTES_MAX} bytes", "check that it is the right file")
    try:
        config = SiteConfig.model_validate(tomllib.loads(raw.decode("utf-8")))
    except UnicodeDecodeError:
        raise CosiloError(_READ, f"{path} is not UTF-8", "save it as UTF-8") from None
    except ValidationError as error:
        raise CosiloError(_READ, f"{path}: {describe_validation(error)}", f"see {EXAMPLE_PATH.name} for the keys") from None
    except (ValueError, RecursionError) as error:  # no TOML, a number of thousands of digits, thousands of brackets
        raise CosiloError(_READ, f"{path}: {error}", "correct that line") from None
    return _rooted(config, path.absolute().parent)


def _rooted(config: SiteConfig, folder: Path) -> SiteConfig:
    data = config.data
    paths = {"path": data.path, "index_file": data.index_file}
    rooted = data.model_copy(update={name: folder / path.expanduser() for name, path in paths.items() if path is not None})
    way = config.coordinator
    if way.proxy_credentials is not None:
        way = way.model_copy(update={"proxy_credentials": folder / way.proxy_credentials.expanduser()})
    features = config.evaluation
    if features.weights is not None:
        features = features.model_copy(update={"weights": folder / features.weights.expanduser()})
    return config.model_copy(update={"state": folder / config.state, "data": rooted, "coordinator": way, "evaluation": features})
