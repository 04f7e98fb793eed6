"""Who is calling, and may they? Every RPC passes here first: identity is the certificate, never a message.

Owns the mapping from a peer's certificate to a role in this federation, and from refusals to gRPC statuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import Peer, Role, peer_from_certificate
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_common.transfer import Refusal, TransferError
from cosilo_server.certificates import RETIRED_WORDS, CertificateBook
from cosilo_server.membership import Removal
from cosilo_server.metrics import CoordinatorMetrics

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

DETAIL_CHARS_MAX = 1000  # a status travels in a header, whose size gRPC bounds at 8 KiB

_TRANSFER_STATUS = {
    Refusal.BUSY: grpc.StatusCode.UNAVAILABLE,
    Refusal.INCOMPLETE: grpc.StatusCode.UNAVAILABLE,
    Refusal.STALLED: grpc.StatusCode.UNAVAILABLE,
    Refusal.DIGEST: grpc.StatusCode.DATA_LOSS,
    Refusal.DISK: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Gate:
    """Checks each caller's certificate against the federation and its members.

    is_member(peer) answers from the newest members list, and removal(peer), in a thread, what was revoked of one who is none;
    certificates, where given, judge by the trust document and keep what was shown. TLS has already checked the chain.
    """

    def __init__(
        self,
        federation: str,
        is_member: Callable[[Peer], bool],
        removal: Callable[[Peer], Removal],
        metrics: CoordinatorMetrics,
        certificates: CertificateBook | None = None,
    ) -> None:
        self._federation = federation
        self._removal = removal
        self._is_member = is_member
        self._metrics = metrics
        self._certificates = certificates
        self._peer_of = lru_cache(maxsize=1024)(peer_from_certificate)

    async def site(self, context: Context) -> Peer:
        """The calling site; aborts the call for anybody else."""
        return await self._expect(context, Role.SITE)

    async def admin(self, context: Context) -> Peer:
        """The calling admin; aborts the call for anybody else."""
        return await self._expect(context, Role.ADMIN)

    async def site_or_admin(self, context: Context) -> Peer:
        """The caller, a site or an admin; aborts the call for anybody else."""
        return await self._expect(context, Role.SITE, Role.ADMIN)

    def still_member(self, peer: Peer) -> bool:
        """Whether the peer still stands in the members list, and its certificate still counts."""
        return self._is_member(peer) and not self._retired(peer)

    async def while_member(
        self, peer: Peer, requests: AsyncIterator[bytes], changed: asyncio.Event, context: Context
    ) -> AsyncIterator[bytes]:
        """A caller's messages for as long as it is a member: aborts the call at once when it is removed, also while nothing comes.

        changed: set whenever the members list may have changed; this clears it.
        """
        arriving: asyncio.Future[bytes | None] | None = None
        change = asyncio.ensure_future(changed.wait())
        try:
            while True:
                arriving = arriving or asyncio.ensure_future(_next(requests))
                await asyncio.wait((arriving, change), return_when=asyncio.FIRST_COMPLETED)
                if change.done():
                    changed.clear()
                    change = asyncio.ensure_future(changed.wait())
                    await self.check_still_member(peer, context)
                if arriving.done():
                    message = arriving.result()
                    if message is None:
                        return
                    arriving = None
                    yield message
        finally:
            change.cancel()
            if arriving is not None:
                arriving.cancel()

    async def check_still_member(self, peer: Peer, context: Context) -> None:
        """Aborts a call whose caller was removed since it began, or whose certificate counts no longer."""
        if self._retired(peer):
            await self.abort(context, grpc.StatusCode.UNAUTHENTICATED, "retired_ca", f"{peer.name}: {RETIRED_WORDS}")
        if not self._is_member(peer):
            await self.abort(context, grpc.StatusCode.PERMISSION_DENIED, "revoked", f"{peer.name} is no longer a member of this federation")

    def _retired(self, peer: Peer) -> bool:
        return self._certificates is not None and self._certificates.retired(peer)

    async def _expect(self, context: Context, *roles: Role) -> Peer:
        pems = list(context.auth_context().get("x509_pem_cert") or ())
        if len(pems) != 1:
            await self.abort(context, grpc.StatusCode.UNAUTHENTICATED, "no_certificate", "the call carries no client certificate")
        try:
            peer = self._peer_of(bytes(pems[0]))
        except CosiloError as error:
            await self.abort(context, grpc.StatusCode.UNAUTHENTICATED, "bad_certificate", str(error))
        if peer.name.federation != self._federation:
            await self.abort(
                context, grpc.StatusCode.PERMISSION_DENIED, "wrong_federation", f"{peer.name.uri()} is not of federation {self._federation}"
            )
        if peer.name.role not in roles:
            wanted = " or ".join(roles)
            await self.abort(
                context, grpc.StatusCode.PERMISSION_DENIED, "wrong_role", f"{peer.name} may not call this: it is for a {wanted}"
            )
        if self._retired(peer):
            await self.abort(context, grpc.StatusCode.UNAUTHENTICATED, "retired_ca", f"{peer.name}: {RETIRED_WORDS}")
        if not self._is_member(peer):
            why = await asyncio.to_thread(self.no_member, peer)
            await self.abort(context, grpc.StatusCode.PERMISSION_DENIED, "not_a_member", why)
        if self._certificates is not None and self._certificates.is_new(peer):
            await asyncio.to_thread(self._certificates.note, peer)
        return peer

    def no_member(self, peer: Peer) -> str:
        """Why, and the next thing to do: who was revoked is not approved again with the keys that it has."""
        role, name = peer.name.role, peer.name.name
        match self._removal(peer):
            case Removal.KEYS:
                return (
                    f"{peer.name} was revoked in {self._federation}; it comes back with new keys under a new name: "
                    f"an admin runs `cosilo {role} invite {name}-2 --out FILE`"
                )
            case Removal.NAME:
                return (
                    f"{peer.name} was revoked in {self._federation}, and enrolled again with new keys; "
                    f"an admin gives it the name back with `cosilo {role} approve {name} --readmit`"
                )
            case Removal.NOTHING:
                pass
        return f"{peer.name} is not a member of {self._federation}; an admin adds it with `cosilo {role} approve {name}`"

    async def abort(self, context: Context, code: grpc.StatusCode, reason: str, detail: str) -> NoReturn:
        """Refuses a call: counted under `reason`, logged, told to the caller."""
        self._metrics.rejected.labels(reason=reason).inc()
        log.warning("call refused", peer=context.peer(), reason=reason, detail=detail)
        await context.abort(code, detail[:DETAIL_CHARS_MAX])
        raise AssertionError("abort returned")  # grpc's abort raises; this tells the type checker

    async def refuse(self, context: Context, error: CosiloError) -> NoReturn:
        """Refuses a call for an expected failure, with the status that fits it."""
        code, reason = grpc.StatusCode.FAILED_PRECONDITION, "refused"
        if isinstance(error, ProtocolViolation):
            reason = "protocol"
            self._metrics.refusals.labels(rule=error.rule).inc()
        elif isinstance(error, TransferError):
            code, reason = _TRANSFER_STATUS.get(error.refusal, grpc.StatusCode.INVALID_ARGUMENT), error.refusal.value
        await self.abort(context, code, reason, str(error))


async def _next(requests: AsyncIterator[bytes]) -> bytes | None:
    """The next message, None after the last: StopAsyncIteration cannot leave a task."""
    try:
        return await anext(requests)
    except StopAsyncIteration:
        return None
