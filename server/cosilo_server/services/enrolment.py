"""EnrolmentService: the one port that callers reach without a certificate. Translates; enrolment.py decides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

import grpc
import structlog

from cosilo_common.audit import Note
from cosilo_common.errors import CosiloError, one_line
from cosilo_common.identity.enrolment import EnrolRequest
from cosilo_common.rpc.v1 import enrolment_pb2, enrolment_pb2_grpc
from cosilo_server.enrolment import EnrolmentDesk, EnrolmentRefused, RefusalReason
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.services.admission import Bucket, source_of
from cosilo_server.services.gate import DETAIL_CHARS_MAX, Context

NAME_SHOWN_CHARS = 64  # of what a stranger says
NOTED_PER_MINUTE_MAX = 6  # refusals in the audit log, which is kept for ever: 3 MB a day at the most; all are counted

log = structlog.get_logger(__name__)

_STATUS = {
    RefusalReason.RATE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalReason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.UNKNOWN: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.SIGNATURE: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.BURNT: grpc.StatusCode.PERMISSION_DENIED,
}


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """Hands requests to the desk. clock: seconds, monotonic."""

    def __init__(self, desk: EnrolmentDesk, metrics: CoordinatorMetrics, note: Note, clock: Callable[[], float] = time.monotonic) -> None:
        self._desk = desk
        self._note = note
        self._metrics = metrics
        self._clock = clock
        self._pace = Bucket(NOTED_PER_MINUTE_MAX, clock())
        self._unnoted = 0

    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        source = source_of(context.peer())
        plain = EnrolRequest(
            name=request.name,
            token_public=request.token_public,
            csr=request.csr,
            signing_key=request.signing_key,
            token_signature=request.token_signature,
            signing_signature=request.signing_signature,
        )
        try:
            answer = await asyncio.to_thread(self._desk.enrol, plain, source, datetime.now(UTC))
        except EnrolmentRefused as error:
            self._metrics.rejected.labels(reason=f"enrol: {error.reason}").inc()
            if error.reason is not RefusalReason.RATE:  # counted above; a flood must not fill the log's disk
                log.warning("enrolment refused", peer=context.peer(), reason=error.reason)
                self._note_refusal(source, request.name, error.reason)
            code = _STATUS.get(error.reason, grpc.StatusCode.FAILED_PRECONDITION)
            await context.abort(code, str(error)[:DETAIL_CHARS_MAX])
        except CosiloError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error)[:DETAIL_CHARS_MAX])
        log.info("enrolled", name=request.name, member=answer.member)
        self._note(request.name, "enrolled", member=answer.member, signing_key=request.signing_key.hex())
        return enrolment_pb2.EnrolResponse(certificate_chain=answer.certificate_chain, member=answer.member, members=answer.members)

    def _note_refusal(self, source: str, name: str, reason: RefusalReason) -> None:
        """unnoted: how many were refused since the entry before, beyond those that the log takes."""
        if self._pace.take(self._clock()):
            self._unnoted += 1
            return
        more = {"unnoted": self._unnoted} if self._unnoted else {}
        self._unnoted = 0
        self._note(f"somebody at {source}", "enrolment refused", name=one_line(name)[:NAME_SHOWN_CHARS], reason=reason.value, **more)
