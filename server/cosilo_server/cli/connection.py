"""The one connection of a command to its coordinator: opened by the admin's certificate, failures told in words.

gRPC is loaded here and nowhere at import time. Must not know what is asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import ADMIN_VARIABLE, Seat
from cosilo_server.cli.terminal import CoordinatorUnreachable

if TYPE_CHECKING:
    import grpc

    from cosilo_common.identity.folder import Identity
    from cosilo_common.rpc.v1.admin_pb2_grpc import AdminServiceStub
    from cosilo_common.rpc.v1.site_pb2_grpc import SiteServiceStub

ANSWER_TIMEOUT_S = 30.0  # an answer is a query of a small database; a link that needs longer is down
WORK_TIMEOUT_S = 1800.0  # making initial weights and drawing samples: the coordinator's own limit for that work
_CERTIFICATE_SIGNS = ("CERTIFICATE_VERIFY_FAILED", "certificate verify failed", "Handshake", "handshake", "SSL_ERROR")

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Coordinator:
    """The coordinator as a command sees it. identity: whose certificate speaks; address: where it is dialled."""

    def __init__(self, channel: grpc.Channel, identity: Identity, address: str) -> None:
        from cosilo_common.rpc.v1.admin_pb2_grpc import AdminServiceStub
        from cosilo_common.rpc.v1.site_pb2_grpc import SiteServiceStub

        self.identity = identity
        self.address = address
        self.admin: AdminServiceStub = AdminServiceStub(channel)
        self.site: SiteServiceStub = SiteServiceStub(channel)

    def ask(
        self,
        operation: str,
        method: grpc.UnaryUnaryMultiCallable[Question, Answer],
        question: Question,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Answer:
        """One question, one answer. operation: what it is for, in the words that an error begins with."""
        import grpc

        try:
            return method(question, timeout=timeout_s)
        except grpc.RpcError as error:
            raise in_words(error, operation, self.address) from None

    @contextmanager
    def stream(
        self, operation: str, method: grpc.UnaryStreamMultiCallable[Question, Answer], question: Question
    ) -> Iterator[Iterator[Answer]]:
        """A stream of answers, cancelled when its block is left."""
        import grpc

        call = method(question)
        try:
            yield call
        except grpc.RpcError as error:
            raise in_words(error, operation, self.address) from None
        finally:
            call.cancel()


@contextmanager
def connect(seat: Seat) -> Iterator[Coordinator]:
    """The coordinator, for the length of a block. Reads the admin's folder now; dials when something is asked."""
    identity = admin_identity(seat)
    quiet_grpc()
    from cosilo_common.identity.tls import federation_channel_sync

    address = seat.address or identity.membership.address
    channel = federation_channel_sync(address, identity.tls)
    try:
        coordinator = Coordinator(channel, identity, address)
        follow_ca(coordinator)
        yield coordinator
    finally:
        channel.close()


def follow_ca(coordinator: Coordinator) -> None:
    """Renews the admin's certificate in its last third, or of a CA that goes, by the way of whatever was asked."""
    from cosilo_common.identity.renewal import renewal_due, renewal_request, superseded, take_renewed
    from cosilo_common.rpc.v1.site_pb2 import RenewCertificateRequest
    from cosilo_server.cli.members import fetch_members

    now = datetime.now(UTC)
    if renewal_due(coordinator.identity, now):
        fetch_members(coordinator)  # and the trust document with it: a new CA's certificate is not taken without it
    if renewal_due(coordinator.identity, now) or superseded(coordinator.identity):
        question = RenewCertificateRequest(csr=renewal_request(coordinator.identity))
        answer = coordinator.ask("renew certificate", coordinator.site.RenewCertificate, question)
        take_renewed(coordinator.identity, answer.certificate_chain, now)
        _show_renewed(coordinator)


def _show_renewed(coordinator: Coordinator) -> None:
    """Shows the coordinator the new certificate, so that it knows that it may stop taking the old one."""
    from cosilo_common.identity.tls import federation_channel_sync
    from cosilo_common.rpc.v1 import site_pb2

    channel = federation_channel_sync(coordinator.address, coordinator.identity.tls)
    try:
        shown = Coordinator(channel, coordinator.identity, coordinator.address)
        shown.ask("show certificate", shown.admin.GetMemberList, site_pb2.GetMembersRequest())
    finally:
        channel.close()


def quiet_grpc() -> None:
    """Keeps gRPC's C core from writing lines of its own about failed handshakes; to be called before grpc is first
    loaded."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def admin_identity(seat: Seat) -> Identity:
    """Who sits there. Raises CosiloError where the folder is not an admin's."""
    from cosilo_common.identity.folder import ADMIN_FILE, load_identity

    if not (seat.folder / ADMIN_FILE).is_file():
        raise CosiloError(
            "read identity",
            f"{seat.folder} is not an admin's folder: it has no {ADMIN_FILE}",
            f"give the folder that cosilo init made, with --admin DIR or in {ADMIN_VARIABLE}",
        )
    return load_identity(seat.folder)


def in_words(error: grpc.RpcError, operation: str, address: str) -> CosiloError:
    """What a gRPC failure means to an admin."""
    import grpc

    code = error.code()
    said = " ".join((error.details() or "").split())
    known: dict[grpc.StatusCode, Callable[[], CosiloError]] = {
        grpc.StatusCode.UNAVAILABLE: lambda: _unavailable(said, address),
        grpc.StatusCode.DEADLINE_EXCEEDED: lambda: CoordinatorUnreachable(
            "reach coordinator", f"{address} did not answer {operation!r} in time", "look at its log, then try again"
        ),
        grpc.StatusCode.UNAUTHENTICATED: lambda: CosiloError(operation, f"not authenticated: {said}", "use an admin's folder: --admin DIR"),
        grpc.StatusCode.PERMISSION_DENIED: lambda: CosiloError(
            operation, f"permission denied: {said}", "use the folder of an admin of this federation: --admin DIR"
        ),
        grpc.StatusCode.UNIMPLEMENTED: lambda: CosiloError(
            operation, "this coordinator does not know that call", "bring coordinator and cosilo to one release"
        ),
        grpc.StatusCode.INTERNAL: lambda: CosiloError(operation, f"the coordinator failed: {said}", "its log has the reason"),
        grpc.StatusCode.UNKNOWN: lambda: CosiloError(operation, f"the coordinator failed: {said}", "its log has the reason"),
    }
    if code in known:
        return known[code]()
    return CosiloError(operation, said or code.name.lower().replace("_", " "))


def _unavailable(said: str, address: str) -> CosiloError:
    if any(sign in said for sign in _CERTIFICATE_SIGNS):
        return CoordinatorUnreachable(
            "reach coordinator",
            f"{address}: no TLS connection ({said})",
            "check that --admin and --address are of one federation and that the certificate has not expired",
        )
    return CoordinatorUnreachable(
        "reach coordinator",
        f"{address}: {said or 'no answer'}",
        "start it with cosilo-coordinator serve, or name another address with --address HOST:PORT",
    )
