"""The coordinator as the rest of the site sees it: what can be asked of it, and the two ways in which it fails.

Owns the interface that participation works against, so that it runs in a test without a network. Must not know gRPC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cosilo_client.owed import Decline, Owed, Progress
from cosilo_common.errors import CosiloError

OnBytes = Callable[[int], None]
"""Called with the bytes that have been moved in all, resumed ones included."""


class Unreachable(CosiloError):
    """The coordinator did not answer, or not now; trying again may help."""


class Refused(CosiloError):
    """The coordinator understood and said no; the same again gives the same. status: gRPC's name, such as NOT_FOUND."""

    def __init__(self, operation: str, subject: str, status: str) -> None:
        self.status = status
        super().__init__(operation, subject, "the reason is the coordinator's; ask its admin where it is not clear")


@dataclass(frozen=True)
class SignedRun:
    """A run's manifest as it travels: canonical JSON, an admin's Ed25519 signature (64 bytes), the admin's name."""

    manifest: bytes
    signature: bytes
    signer: str


@dataclass(frozen=True)
class UploadHeader:
    """Which upload follows: run (32 bytes), round, attempt, and the signed statement of its digest and size."""

    run: bytes
    round: int
    attempt: int
    statement: bytes


class Coordinator(Protocol):
    """What participation asks of the coordinator. Every call may raise Refused or, after tries enough, Unreachable."""

    async def fetch(self, owed: Owed, forced: bool, on_bytes: OnBytes) -> Path:
        """The round's weights as a file with the right digest; fetched unless they are here, or if `forced`."""
        ...

    async def fetch_base(self, run: bytes, digest: bytes, size_bytes: int, on_bytes: OnBytes) -> Path:
        """What the adapters of a run stand on, as a file with that digest (32 bytes); fetched unless it is here."""
        ...

    async def put(self, header: UploadHeader, spool: Path, on_bytes: OnBytes) -> None:
        """Uploads a spool whole; returns when the coordinator says that it is stored."""
        ...

    async def submit(self, message: bytes) -> None:
        """Hands in one signed message; returns when the coordinator has it on disk."""
        ...

    async def manifest(self, run: bytes) -> SignedRun:
        """A run's signed manifest, not verified."""
        ...

    def say(self, said: Progress | Decline) -> None:
        """Tells how this site stands in a run, some time; the last word counts."""
        ...
