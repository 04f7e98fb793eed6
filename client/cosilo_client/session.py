"""The site's standing with the coordinator: one stream that is set up again for ever, and transfers that outlive it.

A connection is built whole (certificate files read anew, stream opened, first snapshot in) before anything uses it, and
every failure leads back to the same place: wait, jittered, and build another. Owns reconnection, retries and what was
last said. Must not know what is owed: snapshots are handed on whole, and calls are made for whoever asks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import grpc
import grpc.aio

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.backoff import Backoff
from cosilo_client.config import NetworkTable
from cosilo_client.coordinator import OnBytes, Refused, SignedRun, Unreachable, UploadHeader
from cosilo_client.metrics import SiteMetrics
from cosilo_client.obstacles import explain, trusted_roots
from cosilo_client.owed import Decline, Owed, Progress, WeightsStep
from cosilo_client.transport import AttendCall, Transport, failure, failure_of
from cosilo_client.wire import RUNS_MAX, hello, owed_from, statement_to
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX, read_chain
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.proxy import Proxy
from cosilo_common.identity.renewal import renewal_due, renewal_request, superseded, take_renewed
from cosilo_common.identity.secret_files import read_public
from cosilo_common.identity.tls import check_tls_files
from cosilo_common.protocol_version import PROTOCOL_VERSION, version_gap
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.step import expected_step
from cosilo_common.telemetry import get_logger
from cosilo_common.threads import in_thread, opened_in_thread
from cosilo_common.transfer import FileSource, Refusal, TransferError

TRIES_MAX: Final = 6  # of one call in a row that moved nothing while connected; then the next snapshot decides
CORRUPT_MAX: Final = 3  # fetches whose bytes had another digest: a link corrupts once, a disk or a liar always
STABLE_S: Final = 10.0  # a connection that stood for less is one more failure: a revoked site must not come each second
RENEWAL_LOOK_S: Final = 3600.0  # and at each connecting; a third of a certificate's life is weeks
SAY_INTERVAL_S: Final = 0.2  # between messages about progress: a transfer moves hundreds of chunks a second
SUPERSEDED_WORDS: Final = (
    "this site's certificate is of the federation's old CA: if that was retired meanwhile, enrol again with a new invitation of an admin"
)

log = get_logger("cosilo.session")
Answer = TypeVar("Answer")


class Session:
    """Attends for ever, and makes calls on whichever connection stands. Implements participation's `Coordinator`.

    on_snapshot: called with everything that is owed, whole, before any waiting call goes on. on_members: called with
    the coordinator's newest members list, not verified; it may raise CosiloError, which is logged.
    """

    def __init__(
        self,
        identity: Identity,
        cache: ArtifactCache,
        network: NetworkTable,
        metrics: SiteMetrics,
        on_snapshot: Callable[[Sequence[Owed]], None],
        on_members: Callable[[bytes], None],
        random: random.Random,
        proxy: Proxy | None = None,
    ) -> None:
        self._identity = identity
        self._cache = cache
        self._network = network
        self._metrics = metrics
        self._on_snapshot = on_snapshot
        self._on_members = on_members
        self._backoff = Backoff(network.backoff_min_s, network.backoff_max_s, random)
        self._transport: Transport | None = None
        self._connected = asyncio.Event()
        self._connected_at = self._stood_s = 0.0
        self._proxy = proxy
        self._renewed = False  # a certificate that the coordinator was not shown yet
        self._said: dict[bytes, Progress | Decline] = {}
        self._to_say = asyncio.Event()
        self._reason = "starting"
        metrics.connected(False)

    def state(self) -> tuple[bool, str]:
        """Whether the coordinator answers, and the reason in words. Safe to call from any thread."""
        return (True, "connected") if self._connected.is_set() else (False, f"not connected: {self._reason}")

    async def run(self) -> None:
        """Connects, attends, and connects again, until it is cancelled."""
        failures = 0
        while True:
            error: CosiloError | None = None
            self._stood_s = 0.0
            try:
                await self._attend()
            except CosiloError as raised:
                error = raised
            except Exception:  # a fault of this program must not end the daemon's one link to its federation
                log.exception("session failed unexpectedly")
            if error is not None:
                error = await self._in_words(error)
            failures = 1 if self._stood_s >= STABLE_S else failures + 1
            wait_s = self._backoff.wait_s(failures)
            self._explain(error, wait_s)
            await asyncio.sleep(wait_s)

    # What participation asks

    async def fetch(self, owed: Owed, forced: bool, on_bytes: OnBytes) -> Path:
        """The round's weights as a file whose digest is right; fetched unless they are here, or if `forced`. Where the weights that a step
        leads from are here, only that is fetched.

        Raises Refused, Unreachable after TRIES_MAX tries that moved nothing, CosiloError where the disk lacks room or
        the bytes are wrong again and again.
        """
        self._cache.use(owed.run, owed.base_digest)
        if not forced:
            found = await in_thread(self._cache.find, owed.base_digest)
            if found is not None:
                return found
            if owed.step is not None and await in_thread(self._cache.has, owed.step.base):
                stepped = await self._stepped(owed, owed.step, on_bytes)
                if stepped is not None:
                    return stepped
                in_vain = owed.step.bytes
                return await self._fetched(owed.base_digest, owed.base_bytes, lambda moved: on_bytes(in_vain + moved))
        return await self._fetched(owed.base_digest, owed.base_bytes, on_bytes)

    async def _stepped(self, owed: Owed, step: WeightsStep, on_bytes: OnBytes) -> Path | None:
        """The round's weights, made from those that are here; None where that fails: whatever a step does, the whole may be fetched."""
        self._cache.use(owed.run, step.base, "step from")
        self._cache.use(owed.run, step.digest, "step")
        try:
            base = self._cache.path(step.base)
            header = await in_thread(expected_step, base, step.base.hex(), owed.base_digest.hex(), owed.base_bytes, step.bytes)
            if not await in_thread(self._cache.has, step.digest):
                await self._fetched(step.digest, step.bytes, on_bytes)
            return await in_thread(self._cache.stepped, header, step.digest, owed.base_bytes)
        except Unreachable:
            raise
        except CosiloError as error:
            log.warning("no step to the round's weights: fetching them whole", round=owed.label, reason=str(error))
            await in_thread(self._cache.forget, step.digest)
            return None
        finally:
            self._cache.release(owed.run, "step")
            self._cache.release(owed.run, "step from")

    async def fetch_base(self, run: bytes, digest: bytes, size_bytes: int, on_bytes: OnBytes) -> Path:
        """The frozen base of a run's adapters, by the digest and length that its signed manifest names. Raises as `fetch`."""
        self._cache.use(run, digest, "lora base")
        found = await in_thread(self._cache.find, digest)
        if found is not None:
            return found
        try:
            return await self._fetched(digest, size_bytes, on_bytes)
        except TransferError as error:
            if error.refusal is not Refusal.DIGEST:
                raise
            subject = f"run {run.hex()[:12]}: what came is not {digest.hex()}, which the signed manifest names"
            raise CosiloError("fetch lora base", subject, "tell the coordinator's admin; nothing was trained") from None

    async def _fetched(self, digest: bytes, size_bytes: int, on_bytes: OnBytes) -> Path:
        for left in reversed(range(CORRUPT_MAX)):
            async with opened_in_thread(self._cache.sink, digest, size_bytes) as sink:
                try:
                    await self._retrying(lambda to, s=sink: to.fetch(digest, s, on_bytes), lambda s=sink: s.offset)  # type: ignore[misc]  # mypy cannot type a lambda's default
                    return await in_thread(sink.finish)
                except TransferError as error:
                    if error.refusal is not Refusal.DIGEST or not left:
                        raise
                    log.warning("fetched weights are corrupt: fetching them again", digest=digest.hex()[:12])
        raise AssertionError("the last pass returns or raises")

    async def put(self, header: UploadHeader, spool: Path, on_bytes: OnBytes) -> None:
        """Uploads a spool, resuming for as long as it moves. Raises as `fetch`."""
        moved = 0

        def note(offset: int) -> None:
            nonlocal moved
            moved = max(moved, offset)
            on_bytes(offset)

        async with opened_in_thread(FileSource, spool) as source:
            await self._retrying(lambda to: to.put(header, source, note), lambda: moved)

    async def submit(self, message: bytes) -> None:
        """Hands in one signed message. Raises Refused, or Unreachable after TRIES_MAX tries."""
        await self._retrying(lambda to: to.submit(message), lambda: 0)

    async def manifest(self, run: bytes) -> SignedRun:
        """A run's signed manifest, not verified. Raises as `submit`."""
        return await self._retrying(lambda to: to.run(run), lambda: 0)

    def say(self, said: Progress | Decline) -> None:
        """Tells the coordinator how this site stands in a run. The last word counts, and is said again on connecting."""
        if self._said.get(said.run) != said:
            self._said.pop(said.run, None)  # to the end, so that the longest silent run stands first
            self._said[said.run] = said
            while len(self._said) > RUNS_MAX:
                del self._said[next(iter(self._said))]
            self._to_say.set()

    # One connection

    async def _attend(self) -> None:
        transport = self._open()
        call = transport.attend()
        try:
            async with asyncio.timeout(self._network.timeout_s):
                await call.write(hello(f"cosilo-site {version('cosilo-client')}"))
                first = await call.read()
            if not isinstance(first, site_pb2.AttendResponse):
                raise Unreachable("attend", "the coordinator ended the stream at once")
            if gap := version_gap(PROTOCOL_VERSION, first.protocol_version):
                raise Refused("attend", gap, "FAILED_PRECONDITION")
            self._connect(transport, first)
            await self._converse(call, transport, first)
        except grpc.aio.AioRpcError as error:
            raise failure("attend", error) from None
        except asyncio.InvalidStateError:  # it ended before this site had said hello: the status says why
            raise failure_of("attend", await call.code(), await call.details()) from None
        except TimeoutError:
            raise Unreachable("attend", f"no answer in {self._network.timeout_s:g} s") from None
        finally:
            self._disconnected()
            call.cancel()
            await transport.close()

    def _open(self) -> Transport:
        return Transport.open(
            self._identity.membership.address,
            self._identity.tls,
            timeout_s=self._network.timeout_s,
            stall_s=self._network.stall_s,
            proxy=self._proxy,
        )

    async def _in_words(self, error: CosiloError) -> CosiloError:
        membership, tls = self._identity.membership, self._identity.tls
        return await explain(error, membership.address, membership.federation, trusted_roots(tls), self._proxy)

    def _connect(self, transport: Transport, first: site_pb2.AttendResponse) -> None:
        self._hand_on(first)
        self._transport = transport
        self._connected_at = asyncio.get_running_loop().time()
        self._connected.set()
        self._metrics.connected(True)
        self._renewed = False  # this connection shows what is in the folder
        self.show_expiry()
        try:
            check_tls_files(self._identity.tls, datetime.now(UTC))
        except CosiloError as error:  # the coordinator took it, so it is good enough; a clock may be wrong
            log.warning("certificate", problem=str(error))
        log.info("connected", address=self._identity.membership.address)

    def show_expiry(self) -> None:
        """Puts into the metrics when this site's certificate and its federation's CA end, connected or not."""
        with suppress(CosiloError):
            leaf = read_chain(read_public(self._identity.tls.certificate, CHAIN_BYTES_MAX))[0]
            self._metrics.certificate_expires(leaf.not_valid_after_utc)
            newest = read_chain(read_public(self._identity.tls.ca, CHAIN_BYTES_MAX))[0]
            self._metrics.ca_expires(newest.not_valid_after_utc)

    def _disconnected(self) -> None:
        if self._connected.is_set():
            self._stood_s = asyncio.get_running_loop().time() - self._connected_at
        self._transport = None
        self._connected.clear()
        self._metrics.connected(False)

    async def _converse(self, call: AttendCall, transport: Transport, first: site_pb2.AttendResponse) -> None:
        """Reads snapshots and says what there is to say, until the stream ends; raises CosiloError with the reason."""
        ended: CosiloError | None = None
        news, looked = asyncio.Event(), asyncio.Event()
        news.set()
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._speak(call), name="attend: speak"),
                group.create_task(self._take_members(transport, news, looked), name="members"),
                group.create_task(self._renew_for_ever(transport, looked), name="renewal"),
            ]
            try:
                seen, trusted = first.members_version, first.trust_version
                while isinstance(response := await call.read(), site_pb2.AttendResponse):
                    self._hand_on(response)
                    if response.members_version > seen or response.trust_version > trusted:
                        seen, trusted = response.members_version, response.trust_version
                        news.set()
            except grpc.aio.AioRpcError as error:
                ended = failure("attend", error)
            finally:
                for task in beside:
                    task.cancel()
        raise ended or Unreachable("attend", "the coordinator ended the stream")

    async def _speak(self, call: AttendCall) -> None:
        told: dict[bytes, Progress | Decline] = {}
        try:
            while True:
                self._to_say.clear()
                for run, said in list(self._said.items()):
                    if told.get(run) != said:
                        await call.write(statement_to(said))
                        told[run] = said
                told = {run: said for run, said in told.items() if run in self._said}
                await asyncio.sleep(SAY_INTERVAL_S)
                await self._to_say.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reading side finds out why

    async def _take_members(self, transport: Transport, news: asyncio.Event, looked: asyncio.Event) -> None:
        """Takes the members list and, once its admins are known, the trust document; then the certificate is looked at."""
        while await news.wait():
            news.clear()
            try:
                data, trust = await transport.announced()
                await in_thread(self._on_members, data)
                await in_thread(self._identity.take_trust, trust)
                self.show_expiry()
            except CosiloError as error:
                log.warning("members list or trust document not taken", reason=str(error))
            looked.set()

    async def _renew_for_ever(self, transport: Transport, looked: asyncio.Event) -> None:
        """Renews the certificate when it is due, or of a CA that goes; this connection goes on, and a short one shows the new."""
        while True:
            with suppress(TimeoutError):  # the trust document first: a new CA's certificate is not taken without it
                async with asyncio.timeout(RENEWAL_LOOK_S):  # `wait_for` loses a cancellation that comes with the event (Python 3.11)
                    await looked.wait()
            looked.clear()
            try:
                if await in_thread(self._is_due):
                    chain = await transport.renew(await in_thread(renewal_request, self._identity))
                    ends = await in_thread(take_renewed, self._identity, chain, datetime.now(UTC))
                    self._renewed = True
                    self._metrics.certificate_expires(ends)
                    log.info("certificate renewed", until=ends.isoformat())
                if self._renewed:
                    await self._show_renewed()
            except CosiloError as error:
                log.warning("certificate not renewed", reason=str(error))

    def _is_due(self) -> bool:
        return renewal_due(self._identity, datetime.now(UTC)) or superseded(self._identity)

    async def _show_renewed(self) -> None:
        """Shows the coordinator the new certificate on a connection of its own: from then on it knows that it may stop taking the old."""
        transport = self._open()
        try:
            await transport.announced()
            self._renewed = False
        finally:
            await transport.close()

    def _hand_on(self, response: site_pb2.AttendResponse) -> None:
        owed = []
        for message in response.owed[:RUNS_MAX]:
            try:
                owed.append(owed_from(message))
            except CosiloError as error:
                log.warning("assignment not understood", reason=str(error))
        self._on_snapshot(owed)

    # Trying again

    async def _retrying(self, call: Callable[[Transport], Awaitable[Answer]], moved: Callable[[], int]) -> Answer:
        """Makes a call on whichever connection stands, waiting for one for as long as it takes.

        moved: how far the call came; while that grows, failures do not count.
        """
        failures = 0
        while True:
            await self._connected.wait()
            transport, before = self._transport, moved()
            if transport is None:
                continue
            try:
                return await call(transport)
            except Unreachable as error:
                failures = 1 if moved() > before else failures + 1
                if failures > TRIES_MAX:
                    raise
                log.info("call failed: trying again", reason=str(error), failures=failures)
            await asyncio.sleep(self._backoff.wait_s(failures))

    def _explain(self, error: CosiloError | None, wait_s: float) -> None:
        """Logs why there is no connection, and whether the certificate's files are to blame."""
        if error is None:
            return
        self._reason = str(error)
        try:
            check_tls_files(self._identity.tls, datetime.now(UTC))
            if isinstance(error, Unreachable) and superseded(self._identity):
                self._reason += f"; {SUPERSEDED_WORDS}"
        except CosiloError as found:
            self._reason = str(found)
        level = log.error if isinstance(error, Refused) else log.warning
        level("not connected", reason=self._reason, wait_s=round(wait_s, 1))
