"""EnrolmentService: the one port that callers reach without a certificate. Translates; enrolment.py decides."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import grpc
import structlog

from cosilo_common.errors import CosiloError
from cosilo_common.identity.enrolment import EnrolRequest
from cosilo_common.rpc.v1 import enrolment_pb2, enrolment_pb2_grpc
from cosilo_server.enrolment import EnrolmentDesk, EnrolmentRefused, RefusalReason
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.services.gate import DETAIL_CHARS_MAX, Context

log = structlog.get_logger(__name__)

_STATUS = {
    RefusalReason.RATE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RefusalReason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.UNKNOWN: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.SIGNATURE: grpc.StatusCode.PERMISSION_DENIED,
}


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """Hands requests to the desk."""

    def __init__(self, desk: EnrolmentDesk, metrics: CoordinatorMetrics) -> None:
        self._desk = desk
        self._metrics = metrics

    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        source = context.peer().rpartition(":")[0]
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
            log.warning("enrolment refused", peer=context.peer(), reason=error.reason)
            code = _STATUS.get(error.reason, grpc.StatusCode.FAILED_PRECONDITION)
            await context.abort(code, str(error)[:DETAIL_CHARS_MAX])
        except CosiloError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error)[:DETAIL_CHARS_MAX])
        log.info("enrolled", name=request.name, member=answer.member)
        return enrolment_pb2.EnrolResponse(certificate_chain=answer.certificate_chain, member=answer.member, members=answer.members)
