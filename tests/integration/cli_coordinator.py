"""A coordinator that says what a test tells it to: real gRPC, real certificates, answers from plain fields.

For the tests of the command line. What the real one answers is tests/federation's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc

from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.tls import server_credentials, server_options
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_common.rpc.v1.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from cosilo_common.rpc.v1.site_pb2_grpc import SiteServiceServicer, add_SiteServiceServicer_to_server
from tests.identity_parties import Founded

CHUNK_BYTES = 1 << 20


@dataclass
class Script:
    """What the coordinator has, and what it was told.

    refuse: a call's name to the status that it ends with; watched: the snapshots of each WatchRun call, oldest call first; artifacts: by
    SHA-256; cuts: bytes of a GetArtifact stream after which it breaks, one entry a call.
    """

    members: SignedMembers
    runs: list[admin_pb2.RunSummary] = field(default_factory=list)
    rounds: list[admin_pb2.RoundSummary] = field(default_factory=list)
    checkpoints: list[admin_pb2.Checkpoint] = field(default_factory=list)
    enrolments: list[admin_pb2.Enrolment] = field(default_factory=list)
    status: admin_pb2.GetStatusResponse = field(default_factory=admin_pb2.GetStatusResponse)
    manifests: dict[bytes, site_pb2.GetRunResponse] = field(default_factory=dict)
    artifacts: dict[bytes, bytes] = field(default_factory=dict)
    trace: admin_pb2.GetRoundTraceResponse = field(default_factory=admin_pb2.GetRoundTraceResponse)
    sampled: admin_pb2.SampleResponse = field(default_factory=admin_pb2.SampleResponse)
    watched: list[list[admin_pb2.WatchRunResponse]] = field(default_factory=list)
    refuse: dict[str, tuple[grpc.StatusCode, str]] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)

    def add_artifact(self, data: bytes) -> bytes:
        digest = sha256(data).digest()
        self.artifacts[digest] = data
        return digest


class ScriptedAdmin(AdminServiceServicer):
    """AdminService out of a Script."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def _hear(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self._script.heard.append(request)
        if name in self._script.refuse:
            context.abort(*self._script.refuse[name])

    def PutInvitation(self, request: Any, context: Any) -> admin_pb2.PutInvitationResponse:
        self._hear("PutInvitation", request, context)
        return admin_pb2.PutInvitationResponse()

    def ListEnrolments(self, request: Any, context: Any) -> admin_pb2.ListEnrolmentsResponse:
        self._hear("ListEnrolments", request, context)
        return admin_pb2.ListEnrolmentsResponse(enrolments=self._script.enrolments)

    def PutMembers(self, request: Any, context: Any) -> admin_pb2.PutMembersResponse:
        self._hear("PutMembers", request, context)
        offered = SignedMembers.model_validate_json(request.members)
        self._script.members = self._script.members.succeeded_by(offered)
        return admin_pb2.PutMembersResponse()

    def GetMemberList(self, request: Any, context: Any) -> site_pb2.GetMembersResponse:
        self._hear("GetMemberList", request, context)
        return site_pb2.GetMembersResponse(members=self._script.members.canonical())

    def CreateRun(self, request: Any, context: Any) -> admin_pb2.CreateRunResponse:
        self._hear("CreateRun", request, context)
        return admin_pb2.CreateRunResponse(run=sha256(request.manifest).digest())

    def GetManifest(self, request: Any, context: Any) -> site_pb2.GetRunResponse:
        self._hear("GetManifest", request, context)
        return self._script.manifests[request.run]

    def ListRuns(self, request: Any, context: Any) -> admin_pb2.ListRunsResponse:
        self._hear("ListRuns", request, context)
        return admin_pb2.ListRunsResponse(runs=self._script.runs)

    def StartRounds(self, request: Any, context: Any) -> admin_pb2.StartRoundsResponse:
        self._hear("StartRounds", request, context)
        return admin_pb2.StartRoundsResponse(first_round=len(self._script.rounds) + 1)

    def StopRun(self, request: Any, context: Any) -> admin_pb2.StopRunResponse:
        self._hear("StopRun", request, context)
        return admin_pb2.StopRunResponse()

    def PauseRun(self, request: Any, context: Any) -> admin_pb2.PauseRunResponse:
        self._hear("PauseRun", request, context)
        return admin_pb2.PauseRunResponse()

    def ResumeRun(self, request: Any, context: Any) -> admin_pb2.ResumeRunResponse:
        self._hear("ResumeRun", request, context)
        return admin_pb2.ResumeRunResponse()

    def ListRounds(self, request: Any, context: Any) -> admin_pb2.ListRoundsResponse:
        self._hear("ListRounds", request, context)
        return admin_pb2.ListRoundsResponse(rounds=self._script.rounds)

    def GetRoundTrace(self, request: Any, context: Any) -> admin_pb2.GetRoundTraceResponse:
        self._hear("GetRoundTrace", request, context)
        return self._script.trace

    def WatchRun(self, request: Any, context: Any) -> Iterator[admin_pb2.WatchRunResponse]:
        self._hear("WatchRun", request, context)
        if not self._script.watched:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the script has no more")
        yield from self._script.watched.pop(0)

    def ListCheckpoints(self, request: Any, context: Any) -> admin_pb2.ListCheckpointsResponse:
        self._hear("ListCheckpoints", request, context)
        return admin_pb2.ListCheckpointsResponse(checkpoints=self._script.checkpoints)

    def KeepCheckpoint(self, request: Any, context: Any) -> admin_pb2.KeepCheckpointResponse:
        self._hear("KeepCheckpoint", request, context)
        return admin_pb2.KeepCheckpointResponse()

    def Sample(self, request: Any, context: Any) -> admin_pb2.SampleResponse:
        self._hear("Sample", request, context)
        return self._script.sampled

    def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        self._hear("GetStatus", request, context)
        return self._script.status


class ScriptedSite(SiteServiceServicer):
    """GetArtifact out of a Script."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def GetArtifact(self, request: Any, context: Any) -> Iterator[site_pb2.GetArtifactResponse]:
        self._script.heard.append(request)
        data = self._script.artifacts.get(request.digest)
        if data is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such artifact")
            return
        end = self._script.cuts.pop(0) if self._script.cuts else len(data)
        yield site_pb2.GetArtifactResponse(total_bytes=len(data))
        for offset in range(request.offset, end, CHUNK_BYTES):
            yield site_pb2.GetArtifactResponse(data=data[offset : min(offset + CHUNK_BYTES, end)])
        if end < len(data):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the link was cut")


@contextmanager
def serving(founded: Founded, script: Script) -> Iterator[str]:
    """Serves a script on a free port with the coordinator's own certificate; gives its address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=server_options())
    add_AdminServiceServicer_to_server(ScriptedAdmin(script), server)
    add_SiteServiceServicer_to_server(ScriptedSite(script), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(founded.coordinator.tls))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def entries(folder: Path) -> list[str]:
    """What lies in a folder, by name."""
    return sorted(path.name for path in folder.iterdir())
