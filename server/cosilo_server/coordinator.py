"""`cosilo-coordinator serve`: builds the coordinator from its parts, serves until it is told to stop, stops gracefully.

The one place where the parts are put together. Must not import torch, nor decide anything.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import grpc
import grpc.aio
import structlog
import typer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from sqlalchemy.exc import DatabaseError

from cosilo_common.allocation import allocate_for_chunks
from cosilo_common.audit import AUDIT_FILE, AuditLog, AuditTrail
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX
from cosilo_common.identity.folder import MEMBERS_FILE, load_identity
from cosilo_common.identity.keys import load_tls_key
from cosilo_common.identity.members import MEMBERS_BYTES_MAX
from cosilo_common.identity.names import Role, expect_peer, peer_from_certificate
from cosilo_common.identity.renewal import renewal_due, take_renewed
from cosilo_common.identity.secret_files import read_public
from cosilo_common.identity.tls import (
    enrolment_server_credentials,
    enrolment_server_options,
    server_credentials,
    server_options,
)
from cosilo_common.rpc.v1 import admin_pb2_grpc, enrolment_pb2_grpc
from cosilo_common.supervision import Supervisor
from cosilo_common.telemetry import configure_logging, serve_telemetry
from cosilo_common.transfer import free_bytes
from cosilo_server.artifacts import Artifacts
from cosilo_server.authority import Authority
from cosilo_server.backup import back_up, check_restored, data_folder_after, newest_weights, read_backup
from cosilo_server.backup import restore as put_back
from cosilo_server.certificates import CertificateBook
from cosilo_server.closing import RoundCloser
from cosilo_server.conductor import Conductor
from cosilo_server.config import CoordinatorConfig, split_host_port
from cosilo_server.enrolment import EnrolmentDesk
from cosilo_server.evaluation import Evaluation
from cosilo_server.membership import StoredInvitations, StoredMembers
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.page.app import page_app
from cosilo_server.page.board import Board
from cosilo_server.page.feed import Feed
from cosilo_server.page.server import PagePort
from cosilo_server.registry import RunRegistry
from cosilo_server.retention import COLLECT_S, HOLD_FILE, Collector
from cosilo_server.rotation import Rotation, describe_expiry
from cosilo_server.rounds.state import ENDED, Phase, Round
from cosilo_server.services.admin import AdminService
from cosilo_server.services.admission import ENROLMENT_LIMITS, FEDERATION_LIMITS, FrontDoor
from cosilo_server.services.ca import CaDesk
from cosilo_server.services.enrolment import EnrolmentService
from cosilo_server.services.federation import SiteService
from cosilo_server.services.gate import Gate
from cosilo_server.services.summaries import Summaries
from cosilo_server.services.uploads import UploadDesk
from cosilo_server.spool import Spool
from cosilo_server.store import Store

log = structlog.get_logger(__name__)

RENEWAL_LOOK_S = 3600.0  # a third of a certificate's life is weeks
REASON_CHARS = 300  # of a round's reason, in the audit log
PRESENCE_S = 5.0  # between looks at who is connected: a site that says nothing for hours is still seen
STOP_GRACE_S = 5.0  # calls in flight may end; sites resume the rest
PRESENCE_KEPT_S = 60.0  # and between writing that down, which outlives a crash
SERVICES = ("cosilo.v1.SiteService", "cosilo.v1.AdminService")

app = typer.Typer(add_completion=False, help="The coordinator of a Cosilo federation.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """The coordinator of a Cosilo federation."""


@app.command()
def serve(
    config: Annotated[Path, typer.Option(help="coordinator.toml, as `cosilo init` made it")] = Path("/etc/cosilo/coordinator.toml"),
) -> None:
    """Serve the federation until SIGTERM or SIGINT."""
    with _in_words():
        settings = CoordinatorConfig.read(config)
        configure_logging("json" if settings.log.json_lines else "console", settings.log.level)
        allocate_for_chunks()
        asyncio.run(_serve(settings))


@app.command()
def backup(
    to: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder; keys will lie in it.")],
    config: Annotated[Path, typer.Option(help="coordinator.toml, as `cosilo init` made it")] = Path("/etc/cosilo/coordinator.toml"),
) -> None:
    """Write a backup, while the coordinator serves or not: database, artifacts, identity and configuration."""
    with _in_words():
        made = back_up(config, to)
        typer.echo(f"{to}: backup of {made.federation}, {made.files} files, {made.bytes} bytes; it holds keys: keep it like them")
        for newest in newest_weights(to):
            typer.echo(f"run {newest.run[:12]}, newest weights, of round {newest.round}: {newest.weights}")


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(metavar="DIR", help="A backup.")],
    config: Annotated[
        Path, typer.Option(help="coordinator.toml that says where to; if there is none, the backup's own is put there")
    ] = Path("/etc/cosilo/coordinator.toml"),
) -> None:
    """Verify a backup and put it in the place of a coordinator that is lost; its data folder must be empty."""
    with _in_words():
        read_backup(backup)
        with _only_one(data_folder_after(backup, config)):
            put = put_back(backup, config)
        typer.echo(f"{put.federation}: restored as it was at {put.made_at}")
        typer.echo("next: start it, then have an admin run `cosilo members --put-back`; see docs/operating/recover.md", err=True)


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except CosiloError as error:
        typer.echo(f"error: {error.operation}: {error.subject}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point."""
    app()


async def _serve(config: CoordinatorConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    config.paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(config.paths.data):
        check_restored(config.paths.data)
        supervisor = Supervisor.of_this_process()
        coordinator = Coordinator(config)
        await coordinator.start()
        supervisor.ready()
        beside = [
            asyncio.create_task(supervisor.feed_for_ever(coordinator.healthy, coordinator.standing), name="watchdog"),
            asyncio.create_task(coordinator.watch_presence(), name="presence"),
        ]
        try:
            await stopping.wait()
        finally:
            supervisor.stopping()
            for task in beside:
                task.cancel()
            await coordinator.stop()


class Coordinator:
    """One coordinator, whole. `endpoints` are the addresses that it listens on, once it has started."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        identity = load_identity(config.paths.identity)
        expect_peer(peer_from_certificate(read_public(identity.tls.certificate, CHAIN_BYTES_MAX)), config.federation, Role.COORDINATOR)
        self._identity = identity
        self._tls = identity.tls
        data = config.paths.data
        self._artifacts = Artifacts(data / "artifacts")
        _refuse_lost_database(data / "state.db", self._artifacts.root)
        self._store = Store(data / "state.db")
        self._spool = Spool(data / "spool", config.limits.free_bytes_min)
        self.metrics = CoordinatorMetrics()
        founding = read_public(config.paths.identity / MEMBERS_FILE, MEMBERS_BYTES_MAX)
        self._members = StoredMembers(self._store, config.federation, founding)
        self._collector = Collector(self._store, self._artifacts, config.retention, self.metrics, data / HOLD_FILE)
        self._closer = RoundCloser(self._store, self._artifacts, self._spool)
        self.conductor = Conductor(self._store, self._spool, self._closer, self.metrics)
        self._audit = AuditTrail(AuditLog(data / AUDIT_FILE), self.metrics.audit_failures.inc)
        self.conductor.on_round(self._note_round)
        self.conductor.on_begin(lambda participant: self._members.has_site(participant.name, bytes.fromhex(participant.key)))
        self._authority = Authority.load(config.paths.identity)
        self._rotation = Rotation(identity, self._authority, lambda: self._members.newest().admins(), datetime.now(UTC))
        self._certificates = CertificateBook(self._store, self.metrics, self._rotation.issuers)
        self._servers: list[grpc.aio.Server] = []
        self._page: PagePort | None = None
        self._serving = False
        self.endpoints: dict[str, str] = {}

    async def start(self) -> None:
        """Opens the ports, resumes what was in progress, writes endpoints.json into the data folder. Raises CosiloError on a port in use."""
        config, loop = self._config, asyncio.get_running_loop()
        self._page = PagePort(config.listen.page) if config.listen.page else None

        def announce() -> None:
            self._show_expiries()
            loop.call_soon_threadsafe(self.conductor.announce)

        self._members.on_change(announce)
        self._rotation.on_change(announce)
        desk = EnrolmentDesk(self._authority, StoredInvitations(self._store), self._members)
        gate = Gate(config.federation, self._members.is_member, self._members.removal, self.metrics, self._certificates)
        ca = CaDesk(self._rotation, self._authority, self._certificates, self._members)
        uploads = UploadDesk(self.conductor, self._store, self._spool, self.metrics)
        registry = RunRegistry(
            self._store,
            self._artifacts,
            Evaluation(),
            self.conductor,
            self._members,
            config.federation,
            config.limits.sample_images_max,
        )
        software = f"cosilo-coordinator {version('cosilo-server')}"
        summaries = Summaries(
            config.federation,
            software,
            self._store,
            self._artifacts,
            self.conductor,
            self._members,
            self._collector,
            self._certificate_expires,
        )
        site_service = SiteService(
            gate,
            self.conductor,
            self._store,
            self._artifacts,
            uploads,
            self._members,
            self._authority,
            self.metrics,
            config.limits.streams_per_site,
            ca,
            self._audit.note,
        )
        admin_service = AdminService(gate, self.conductor, self._store, self._members, desk, registry, summaries, ca, self._audit)

        federation = grpc.aio.server(options=server_options(), interceptors=[FrontDoor(self.metrics, FEDERATION_LIMITS)])
        site_service.add_to(federation)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin_service, federation)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, federation)
        enrolment = grpc.aio.server(options=enrolment_server_options(), interceptors=[FrontDoor(self.metrics, ENROLMENT_LIMITS)])
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(EnrolmentService(desk, self.metrics, self._audit.note), enrolment)

        await self._audit.write("coordinator", "started", software=software)
        await self.conductor.start()
        self.endpoints = {
            "federation": await self._open(federation, config.listen.federation, server_credentials(self._tls)),
            "enrolment": await self._open(enrolment, config.listen.enrolment, enrolment_server_credentials(self._tls)),
        }
        self._prepare_gauges()
        self._telemetry, port = serve_telemetry(
            config.listen.metrics, self.metrics.registry, self.healthy, self._ready, refused=self.metrics.count_refusal
        )
        self.endpoints["metrics"] = f"{split_host_port(config.listen.metrics)[0]}:{port}"
        if self._page is not None:
            self._serve_page(self._page, Board(summaries, self._store, self._artifacts, config.limits.free_bytes_min))
        for name in ("", *SERVICES):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._serving = True
        self._renewing = asyncio.create_task(self._renew_for_ever())
        self._collecting = asyncio.create_task(self._collect_for_ever())
        _write_endpoints(config.paths.data / "endpoints.json", self.endpoints)
        log.info("coordinator ready", federation_name=config.federation, **self.endpoints)

    async def stop(self) -> None:
        """Stops taking calls, lets those in flight end within a grace, leaves every round resumable."""
        self._serving = False
        self._renewing.cancel()
        self._collecting.cancel()
        await asyncio.gather(self._collecting, return_exceptions=True)
        if self._page is not None:
            await self._page.close()
        await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in self._servers))
        await self.conductor.stop()
        self._closer.stop()
        self._telemetry.close()
        self._audit.note("coordinator", "stopped")
        await asyncio.to_thread(self._audit.close)
        self._store.close()
        log.info("coordinator stopped")

    async def _open(self, server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials) -> str:
        try:
            port = server.add_secure_port(listen, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise CosiloError("listen", f"{listen} cannot be bound", "stop what uses the port, or choose another in coordinator.toml")
        await server.start()
        self._servers.append(server)
        return f"{split_host_port(listen)[0]}:{port}"

    def _note_round(self, state: Round) -> None:
        of = {"run": state.run.hex(), "round": state.number, "kind": state.kind.value}
        if not state.ended:
            self._audit.note("coordinator", "round begun", **of, invited=sorted(state.invited))
        elif state.reason:
            self._audit.note("coordinator", "round abandoned", **of, reason=state.reason[:REASON_CHARS])
        else:
            self._audit.note("coordinator", "round closed", **of, survivors=sorted(state.survivors), checkpoint=state.checkpoint.hex())

    def _serve_page(self, port: PagePort, board: Board) -> None:
        feed = Feed(self.conductor, board.standing)
        port.serve(page_app(board, feed, self._config.listen.page_hosts), feed, self.metrics.count_refusal)
        self.endpoints["page"] = port.address

    async def _renew_for_ever(self) -> None:
        """Renews the coordinator's own certificate when it is due; new handshakes see the new one, streams that stand go on."""
        while True:
            try:
                await asyncio.to_thread(self._renew_if_due)
            except CosiloError as error:
                log.error("certificate not renewed", reason=str(error))
            await asyncio.sleep(RENEWAL_LOOK_S)

    async def _collect_for_ever(self) -> None:
        """Collects at the start, for a crash may have left files; after each round; and once an hour."""
        while True:
            self.conductor.round_over.clear()
            collecting = asyncio.ensure_future(asyncio.to_thread(self._collector.collect))
            try:
                await asyncio.shield(collecting)
            except asyncio.CancelledError:  # the store closes next, so what was begun is ended first
                await asyncio.wait({collecting})
                raise
            except (CosiloError, DatabaseError, OSError) as error:  # a full disk, most likely: nothing is lost but time
                log.error("nothing collected", reason=str(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self.conductor.round_over.wait(), COLLECT_S)

    def _renew_if_due(self) -> None:
        now = datetime.now(UTC)
        if renewal_due(self._identity, now):
            key = load_tls_key(self._tls.key).public_key()
            ends = take_renewed(self._identity, self._authority.issue_coordinator_certificate(key, now), now)
            log.info("certificate renewed", until=ends.isoformat())

    def _prepare_gauges(self) -> None:
        self.metrics.disk_free.set_function(lambda: free_bytes(self._artifacts.root))
        self.metrics.certificate_expiry.labels(subject="coordinator").set_function(self._certificate_expires)
        self._show_expiries()
        for phase in Phase:  # counters that are there from the first: `increase` does not see one that begins with 1
            (self.metrics.rounds.labels(outcome=phase) if phase in ENDED else self.metrics.dropouts.labels(phase=phase)).inc(0)
        for outcome in ("opened", "repeated", "abandoned"):
            self.metrics.attempts.labels(outcome=outcome).inc(0)

    def _show_expiries(self) -> None:
        """Puts into the metrics when the CA's certificates and the members' end."""
        found = describe_expiry(self._rotation.roots(), self._authority.intermediate)
        for subject, at in found.items():
            self.metrics.certificate_expiry.labels(subject=subject).set(at)
        if "root/old" not in found:
            self.metrics.certificate_expiry.remove("root/old")
        self._certificates.show(self._members.newest().everyone())

    def _certificate_expires(self) -> float:
        return peer_from_certificate(read_public(self._tls.certificate, CHAIN_BYTES_MAX)).not_after.timestamp()

    def healthy(self) -> tuple[bool, str]:
        """Whether the round machine ticks: what /healthz and the watchdog mean."""
        stalled_s = time.monotonic() - self.conductor.ticked_at
        return stalled_s < 30.0, "ok" if stalled_s < 30.0 else f"the round machine has not ticked for {stalled_s:.0f} s"

    def _ready(self) -> tuple[bool, str]:
        if not self._serving:
            return False, "not serving"
        free = free_bytes(self._artifacts.root)
        if free < self._config.limits.free_bytes_min:
            return False, f"{free} bytes are free and {self._config.limits.free_bytes_min} are wanted"
        if self._certificate_expires() < time.time():
            return False, "the certificate has expired"
        return self.healthy()

    def standing(self) -> tuple[bool, str]:
        """For `systemctl status`: what keeps it from being ready, or who is there."""
        ready, reason = self._ready()
        return ready, f"{len(self.conductor.connected_sites())} sites connected" if ready else reason

    async def watch_presence(self) -> None:
        """Keeps "last seen" of connected sites fresh: their streams are alive by keepalive even where nobody says a word."""
        kept, kept_at = set[str](), 0.0
        while True:
            present, now = self.conductor.connected_sites(), time.time()
            for site in present:
                self.metrics.site_last_seen.labels(site=site).set(now)
            if present != kept or now - kept_at >= PRESENCE_KEPT_S:
                with suppress(DatabaseError):  # a full disk: the next look tries again
                    await asyncio.to_thread(self._store.sites_were_there, present | kept, now)
                    kept, kept_at = present, now
            await asyncio.sleep(PRESENCE_S)


def _refuse_lost_database(database: Path, artifacts: Path) -> None:
    """Raises CosiloError where there are artifacts and no database that knows of them: an empty one would forget every run and member.

    One that was only just made may be empty too, with its first rows in the log beside it.
    """
    log_beside = database.with_name(f"{database.name}-wal")
    if any(file.exists() and file.stat().st_size for file in (database, log_beside)) or not any(
        path.is_file() for path in artifacts.iterdir()
    ):
        return
    raise CosiloError(
        "start coordinator",
        f"{database} is gone or empty, and {artifacts} holds what it knew of",
        "put the newest backup back: docs/operating/recover.md",
    )


@contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Holds the data folder's lock. Raises CosiloError where another coordinator does."""
    path = data / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise CosiloError("start coordinator", f"{data}: process {holder} serves it already", "stop that one first") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _write_endpoints(path: Path, endpoints: dict[str, str]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(endpoints) + "\n")
    scratch.replace(path)


if __name__ == "__main__":
    main()
