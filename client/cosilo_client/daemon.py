"""The site daemon, whole: what is built in which order, what runs, and how it ends.

Owns the wiring, the signals and the port of the daemon's own health. Everything that decides anything is elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from datetime import time as time_of_day
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.auditing import DAEMON, site_log
from cosilo_client.config import SiteConfig, TrainerTable
from cosilo_client.durable import unlink_durably, write_durably
from cosilo_client.duties import Site
from cosilo_client.joining import PolicyAcceptance
from cosilo_client.journal import Journal
from cosilo_client.metrics import SiteMetrics
from cosilo_client.participation import Participation
from cosilo_client.pause import give_back_while, read_pause
from cosilo_client.policy import outside_hours
from cosilo_client.session import Session
from cosilo_client.spending import Spending
from cosilo_client.trainer import TrainerConfig, TrainerLink
from cosilo_client.training import Training
from cosilo_common.allocation import allocate_for_chunks
from cosilo_common.audit import AuditTrail, Note, no_note
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import Identity, load_identity
from cosilo_common.identity.keys import public_bytes
from cosilo_common.identity.names import Role
from cosilo_common.supervision import Supervisor
from cosilo_common.telemetry import configure_logging, get_logger, parse_listen, serve_telemetry

IDENTITY_FOLDER: Final = "identity"
ARTIFACTS_FOLDER: Final = "artifacts"
ENDPOINTS_FILE: Final = "endpoints.json"
BEAT_S: Final = 1.0
BEAT_LATE_S: Final = 30.0  # an event loop that is later than this is stuck: nothing in it blocks for so long

log = get_logger("cosilo.daemon")


def serve(config: SiteConfig) -> None:
    """Runs the daemon until SIGTERM or SIGINT. Raises CosiloError where it cannot start."""
    configure_logging(config.log.form, config.log.level)
    os.environ.update(device_environment(config.trainer))
    allocate_for_chunks()
    asyncio.run(_serve(config))


def site_identity(state: Path) -> Identity:
    """Who this site is, from its state folder. Raises CosiloError where it has not enrolled."""
    identity = load_identity(state / IDENTITY_FOLDER)
    if identity.membership.role is not Role.SITE:
        raise CosiloError("read identity", f"{identity.peer} is not a site", "give the site's own state folder")
    return identity


def take_members(identity: Identity, data: bytes, note: Note = no_note) -> None:
    """Verifies a members list that came, and keeps it where it is newer. Raises CosiloError."""
    known = identity.members().version
    members = identity.take_members(data)
    if members.version > known:
        log.info("members list taken", version=members.version, members=len(members.everyone()))
        note(DAEMON, "took a members list", version=members.version, signer=members.signer)


def device_environment(trainer: TrainerTable) -> dict[str, str]:
    """What the trainer's environment must say so that it sees the configured device and no other."""
    if trainer.device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    kind, _, index = trainer.device.partition(":")
    return {"CUDA_VISIBLE_DEVICES": index} if kind == "cuda" and index else {}


async def _serve(config: SiteConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    supervisor = Supervisor.of_this_process()
    async with _daemon(config, supervisor) as session:
        attending = asyncio.create_task(session.run(), name="session")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait({attending, stopped}, return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping")
        supervisor.stopping()
        for task in (attending, stopped):
            task.cancel()
        await asyncio.gather(attending, stopped, return_exceptions=True)
        if not stop.is_set():
            attending.result()  # the session ends only by a fault: say it
    log.info("stopped")


@asynccontextmanager
async def _daemon(config: SiteConfig, supervisor: Supervisor) -> AsyncIterator[Session]:
    """Everything of the daemon but its session's loop, taken down in the opposite order."""
    state, identity = config.state, site_identity(config.state)
    key = identity.signing_key()
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(Journal.open(state, site_key=public_bytes(key)))
        metrics = SiteMetrics()
        audit = AuditTrail(site_log(config), metrics.audit_failed)
        stack.callback(audit.close)
        await audit.write(DAEMON, "started", software=f"cosilo-site {version('cosilo-client')}")
        stack.callback(audit.note, DAEMON, "stopped")
        trainer = TrainerLink(TrainerConfig(folder=state, idle_s=config.trainer.idle_s, processes=config.trainer.gpus))
        stack.push_async_callback(trainer.close)
        session = Session(
            identity=identity,
            cache=ArtifactCache(state / ARTIFACTS_FOLDER, config.cache.limit_bytes),
            network=config.network,
            metrics=metrics,
            on_snapshot=lambda snapshot: participation.owe(snapshot),
            on_members=lambda data: take_members(identity, data, audit.note),
            random=random.Random(),  # noqa: S311 - jitter, no secret
            proxy=config.coordinator.route(),
        )
        identity.settle_trust()
        session.show_expiry()
        spending = Spending(state)
        site = Site(
            name=identity.membership.name,
            key=key,
            journal=journal,
            coordinator=session,
            training=Training(
                identity.membership.name,
                journal,
                session,
                trainer,
                config.data,
                config.trainer.threads,
                spending,
                metrics,
                config.evaluation,
            ),
            spending=spending,
            policy=config.policy,
            accept=PolicyAcceptance(identity, journal.ledger, config.policy, session.manifest, _now),
            local_time=_local_time,
            role_lock=asyncio.Lock(),
            note=audit.note,
            pause=lambda: read_pause(state, _now()),
        )
        participation = Participation(site)
        stack.push_async_callback(participation.close)
        giving_back = asyncio.create_task(
            give_back_while(lambda: site.pause() is not None or bool(outside_hours(config.policy, _local_time())), trainer),
            name="give back",
        )
        stack.callback(giving_back.cancel)
        pulse = Pulse()
        beating = asyncio.create_task(pulse.beat_for_ever(), name="pulse")
        stack.callback(beating.cancel)
        server, port = serve_telemetry(config.metrics.listen, metrics.registry, pulse.state, session.state)
        stack.callback(server.close)
        endpoints = state / ENDPOINTS_FILE
        host = parse_listen(config.metrics.listen)[0]
        metrics_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        write_durably(endpoints, json.dumps({"metrics": metrics_address}).encode())
        stack.callback(unlink_durably, endpoints)
        log.info("site ready", site=identity.peer.uri(), coordinator=identity.membership.address, metrics=metrics_address)
        supervisor.ready()
        feeding = asyncio.create_task(supervisor.feed_for_ever(pulse.state, session.state), name="watchdog")
        stack.callback(feeding.cancel)
        yield session
        with suppress(asyncio.CancelledError):
            beating.cancel()
            await beating


class Pulse:
    """Whether the daemon's event loop still turns: what /healthz means."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    async def beat_for_ever(self) -> None:
        """Beats each second, from within the event loop."""
        while True:
            self._last_s = time.monotonic()
            await asyncio.sleep(BEAT_S)

    def state(self) -> tuple[bool, str]:
        """Safe to call from any thread."""
        late_s = time.monotonic() - self._last_s
        return late_s < BEAT_LATE_S, f"the event loop turned {late_s:.1f} s ago"


def _local_time() -> time_of_day:
    return datetime.now().astimezone().time()


def _now() -> datetime:
    return datetime.now(UTC)
