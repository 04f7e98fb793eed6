"""`cosilo-site check`: everything that a first round would need, tried beforehand, one line each.

Owns what is tried and what a person should do about a failure. Changes nothing. Must not import torch: the device is
asked for in a process of its own, as the trainer's would be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from typing import Final

from cosilo_client.config import GIB, SiteConfig
from cosilo_client.coordinator import Refused
from cosilo_client.daemon import device_environment, site_identity
from cosilo_client.data import census, open_source
from cosilo_client.obstacles import explain, trusted_roots
from cosilo_client.transport import Transport
from cosilo_common.diffusion.lora import require_peft
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.keys import fingerprint, public_bytes
from cosilo_common.identity.names import peer_from_certificate
from cosilo_common.identity.secret_files import read_public
from cosilo_common.identity.tls import check_tls_files
from cosilo_common.transfer import free_bytes

DEVICE_TIMEOUT_S: Final = 120.0  # torch from a cold, slow disk
FREE_LEAST_BYTES: Final = GIB  # a small model's weights, update and upload, with room to spare
EXPIRY_SOON_DAYS: Final = 14  # time enough to reach an admin
CLASSES_SHOWN: Final = 50

_ASK_DEVICE: Final = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "threads": torch.get_num_threads(),
}))
"""


class Outcome(Enum):
    """How one thing stands."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line of the report. hint: what to do, empty where nothing is."""

    what: str
    outcome: Outcome
    text: str
    hint: str = ""


async def preflight(config: SiteConfig) -> list[Finding]:
    """Tries everything and reports in the order in which a person would mend it."""
    identity: Identity | None = None
    findings = []
    try:
        identity = site_identity(config.state)
        findings.append(Finding("identity", Outcome.OK, f"{identity.peer.uri()}, key {_key(identity)}"))
    except CosiloError as error:
        findings.append(_failed("identity", error, "run cosilo-site enrol with an invitation"))
    if identity is not None:
        findings += _certificate(identity)
        findings += await _coordinator(config, identity)
    for what, look in (("data", _data), ("device", _device), ("lora", _lora), ("disk", _disk)):
        findings += _guarded(what, config, look)
    return findings


def _certificate(identity: Identity) -> Iterator[Finding]:
    """The certificate against this machine's clock is a warning only: the coordinator judges by its own."""
    try:
        peer = peer_from_certificate(read_public(identity.tls.certificate, CHAIN_BYTES_MAX))
        if peer.name != identity.peer:
            yield Finding("certificate", Outcome.FAILED, f"it is for {peer.name.uri()}", "put the right file in its place")
            return
    except CosiloError as error:
        yield _failed("certificate", error)
        return
    now = datetime.now(UTC)
    until = f"valid until {peer.not_after:%Y-%m-%d %H:%M} UTC"
    try:
        check_tls_files(identity.tls, now)
    except CosiloError as error:
        outcome = Outcome.WARNING if now > peer.not_after or "not valid before" in error.subject else Outcome.FAILED
        yield Finding("certificate", outcome, error.subject, error.hint)
        return
    if (peer.not_after - now).days < EXPIRY_SOON_DAYS:
        yield Finding("certificate", Outcome.WARNING, until, "ask an admin for an invitation and enrol again before then")
        return
    yield Finding("certificate", Outcome.OK, until)


async def _coordinator(config: SiteConfig, identity: Identity) -> list[Finding]:
    address = identity.membership.address
    findings: list[Finding] = []
    try:
        network, way = config.network, config.coordinator.route()
        transport = Transport.open(address, identity.tls, timeout_s=network.timeout_s, stall_s=network.stall_s, proxy=way)
    except CosiloError as error:
        return [_failed("coordinator", error)]
    try:
        serving = await transport.serving()
        outcome = Outcome.OK if serving else Outcome.FAILED
        text = f"{address} over mutual TLS, " + ("serving" if serving else "not serving")
        findings.append(Finding("coordinator", outcome, text, "" if serving else "ask its admin, or wait"))
        members = identity.take_members(await transport.members())
        mine = members.member(identity.membership.name)
        if mine is None:
            text, hint = "this site is not approved yet", f"ask an admin to run cosilo site approve {identity.membership.name}"
            findings.append(Finding("membership", Outcome.FAILED, text, hint))
        else:
            count = len(members.everyone())
            findings.append(Finding("membership", Outcome.OK, f"a member, of {count}, in version {members.version}"))
    except Refused as error:
        findings.append(Finding("membership", Outcome.FAILED, error.subject, "read those words to an admin of the federation"))
    except CosiloError as error:
        what = "membership" if findings else "coordinator"
        error = await explain(error, address, identity.membership.federation, trusted_roots(identity.tls), way)
        findings.append(_failed(what, error, f"check the address {address}, the firewall and the coordinator"))
    finally:
        await transport.close()
    return findings


def _data(config: SiteConfig) -> Iterator[Finding]:
    counts = census(open_source(config.data))
    total = sum(counts.values())
    shown = ", ".join(f"{name}: {count}" for name, count in list(counts.items())[:CLASSES_SHOWN])
    more = f" and {len(counts) - CLASSES_SHOWN} more classes" if len(counts) > CLASSES_SHOWN else ""
    if total < 2:
        yield Finding("data", Outcome.FAILED, f"{total} images", "at least two are needed: one is held out")
        return
    yield Finding("data", Outcome.OK, f"{total} images ({shown}{more})")


def _device(config: SiteConfig) -> Iterator[Finding]:
    answer = subprocess.run(
        [sys.executable, "-c", _ASK_DEVICE],
        env={**os.environ, **device_environment(config.trainer)},
        capture_output=True,
        text=True,
        timeout=DEVICE_TIMEOUT_S,
        check=False,
    )
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding("device", Outcome.FAILED, f"torch does not load: {last[:200]}", "install cosilo-client again")
        return
    found = json.loads(answer.stdout)
    gpus: list[str] = found["cuda"]
    wanted = config.trainer
    if wanted.device.startswith("cuda") and not gpus:
        hint = 'check the driver (nvidia-smi), or set device = "auto"'
        yield Finding("device", Outcome.FAILED, f"torch {found['torch']} sees no CUDA device", hint)
        return
    if wanted.gpus > max(1, len(gpus)):
        yield Finding("device", Outcome.FAILED, f"{len(gpus)} GPUs for gpus = {wanted.gpus}", "lower gpus in [trainer]")
        return
    text = f"{wanted.gpus} x {gpus[0]}" if gpus else f"CPU, {wanted.threads or found['threads']} threads"
    yield Finding("device", Outcome.OK, f"{text} (torch {found['torch']})")


def _lora(config: SiteConfig) -> Iterator[Finding]:
    """An extra: a site without it trains every other run."""
    try:
        require_peft("check", "cosilo-client")
    except CosiloError as error:
        yield Finding("lora", Outcome.OK, f"no run with [lora] is trained here: peft is not installed; {error.hint}")
        return
    yield Finding("lora", Outcome.OK, f"runs with [lora] can be trained here (peft {version('peft')})")


def _disk(config: SiteConfig) -> Iterator[Finding]:
    free = free_bytes(config.state)
    text = f"{free / GIB:.1f} GiB free at {config.state}"
    if free < FREE_LEAST_BYTES:
        yield Finding("disk", Outcome.FAILED, text, f"free {(FREE_LEAST_BYTES - free) / GIB:.1f} GiB more")
        return
    yield Finding("disk", Outcome.OK, text)


def _guarded(what: str, config: SiteConfig, look: Callable[[SiteConfig], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(look(config))
    except CosiloError as error:
        return [_failed(what, error)]
    except subprocess.TimeoutExpired:
        return [Finding(what, Outcome.FAILED, f"no answer in {DEVICE_TIMEOUT_S:g} s", "look for a hung driver")]


def _failed(what: str, error: CosiloError, hint: str = "") -> Finding:
    return Finding(what, Outcome.FAILED, error.subject, error.hint or hint)


def _key(identity: Identity) -> str:
    return fingerprint(public_bytes(identity.signing_key()))
