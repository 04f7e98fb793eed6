"""coordinator.toml, parsed once into frozen values. An unknown key is an error; relative paths are taken from the file's own folder."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import SiteName, describe_validation
from cosilo_common.telemetry import LogLevel

HostPort = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}$")]
HostName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
CONFIG_BYTES_MAX = 1 << 20


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Listen(_Section):
    """host:port each. Port 0 takes a free one, which endpoints.json in the data folder then names.

    page: "" for none, which is the default, so that several federations share a machine; `cosilo init` writes 127.0.0.1:7480. page_hosts: names
    by which a browser may ask for the page, beside localhost and addresses.
    """

    federation: HostPort = "0.0.0.0:7443"
    enrolment: HostPort = "0.0.0.0:7444"
    metrics: HostPort = "127.0.0.1:9464"
    page: HostPort | Literal[""] = ""
    page_hosts: tuple[HostName, ...] = ()


class Paths(_Section):
    """identity: the folder with certificates and keys that `cosilo init` made. data: state.db, artifacts/ and spool/."""

    identity: Path = Path()
    data: Path = Path("data")


class Limits(_Section):
    """Bounds of what the coordinator takes on. free_bytes_min: disk space that is never used."""

    free_bytes_min: int = Field(default=256 << 20, ge=0)
    sample_images_max: int = Field(default=1024, ge=1, le=16384)
    streams_per_site: int = Field(default=8, ge=2, le=64)


class Retention(_Section):
    """What the data folder keeps of each run, beside the newest checkpoint and those that an admin named (cosilo checkpoint keep).

    keep_last: newest checkpoints; keep_every: and that of every so many rounds, 0 for none; grids: newest sample grids; traced_rounds: newest
    rounds of which it is known what moved them when.
    """

    keep_last: int = Field(default=5, ge=1)
    keep_every: int = Field(default=10, ge=0)
    grids: int = Field(default=100, ge=1)
    traced_rounds: int = Field(default=200, ge=1)


class Log(_Section):
    """json: one object a line (for journald and collectors), or lines for people."""

    json_lines: bool = Field(default=True, alias="json")
    level: LogLevel = "info"


class CoordinatorConfig(_Section):
    """The coordinator's one TOML."""

    federation: SiteName
    listen: Listen = Listen()
    paths: Paths = Paths()
    limits: Limits = Limits()
    retention: Retention = Retention()
    log: Log = Log()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parses a file. Raises CosiloError naming the key that is wrong."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CosiloError("read config", f"{path}: {error.strerror}", "run `cosilo init DIR` to make one") from None
        if len(data) > CONFIG_BYTES_MAX:
            raise CosiloError("read config", f"{path}: {len(data)} bytes are more than {CONFIG_BYTES_MAX}")
        try:
            parsed = cls.model_validate(tomllib.loads(data.decode()))
        except ValidationError as error:
            raise CosiloError("read config", f"{path}: {describe_validation(error)}", "correct the named key") from None
        except (ValueError, RecursionError) as error:  # no TOML, no text, a number of thousands of digits, thousands of brackets
            raise CosiloError("read config", f"{path}: {error}", "correct the file") from None
        here = path.resolve().parent
        paths = Paths(identity=here / parsed.paths.identity, data=here / parsed.paths.data)
        return parsed.model_copy(update={"paths": paths})


def split_host_port(address: str) -> tuple[str, int]:
    """host and port of "host:port"; an IPv6 host stands in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
