"""A running coordinator, its admin's folder, and sites whose own sessions attend. A fixture, imported by name where it is used."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.config import NetworkTable
from cosilo_client.metrics import SiteMetrics
from cosilo_client.session import Session
from cosilo_common.identity.folder import (
    FEDERATION_FILE,
    MEMBERS_FILE,
    Identity,
    Membership,
    load_identity,
    membership_json,
)
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import SignedMembers, sign_members
from cosilo_common.identity.names import Role
from cosilo_common.identity.secret_files import write_public
from cosilo_common.transfer import CHUNK_BYTES
from cosilo_server.cli.main import main
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, found

SITES = ("st-anna", "st-beda")
FAST = NetworkTable(timeout_s=5.0, stall_s=5.0, backoff_min_s=0.01, backoff_max_s=0.05)
TIMEOUT_S = 30.0


@dataclass
class Live:
    """A running coordinator, its admin's folder, and sites that attend."""

    founded: Founded
    data: Path
    coordinator: Coordinator
    sites: dict[str, Identity]
    sessions: dict[str, Session] = field(default_factory=dict)
    running: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.coordinator.endpoints["federation"]

    async def cosilo(self, *arguments: str) -> int:
        """`cosilo ...` as the admin, beside the event loop."""
        seat = ["--admin", str(self.founded.admin.folder), "--address", self.address]
        return await asyncio.to_thread(main, [*seat, *arguments])

    def attend(self, name: str) -> Session:
        """The site's own session, as its daemon has it."""
        identity = self.sites[name]
        cache = ArtifactCache(identity.folder / "artifacts", 1 << 30)
        metrics = SiteMetrics()

        def owe(_: Any) -> None:
            return None

        session = Session(identity, cache, FAST, metrics, owe, lambda data: identity.take_members(data), random.Random(1))  # type: ignore[arg-type, return-value]  # nobody reads what it returns
        self.sessions[name] = session
        self.running.append(asyncio.create_task(session.run()))
        return session

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not what():
                await asyncio.sleep(0.02)

    def waiting(self) -> set[str]:
        """Who has shown no certificate that today's intermediate signed."""
        issuers = self.coordinator._rotation.issuers()
        found = {member.name: self.coordinator._certificates.of(member) for member in self.coordinator._members.newest().everyone()}
        return {name for name, shown in found.items() if issuers and (shown is None or shown.issuer != issuers[0])}

    async def restart(self) -> None:
        """A new coordinator on the same folders and port."""
        port = self.address
        await self.coordinator.stop()
        self.coordinator = coordinator(self.founded, self.data, port)
        await self.coordinator.start()

    async def close(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.coordinator.stop()


def coordinator(founded: Founded, data: Path, federation: str = "127.0.0.1:0") -> Coordinator:
    listen = Listen(federation=federation, enrolment="127.0.0.1:0", metrics="127.0.0.1:0")
    data.mkdir(exist_ok=True)
    return Coordinator(CoordinatorConfig(federation=FEDERATION, listen=listen, paths=Paths(identity=founded.coordinator.folder, data=data)))


def site_identity(
    founded: Founded, name: str, members: SignedMembers, address: str, now: datetime = NOW, life: timedelta = timedelta(days=90)
) -> Identity:
    """A site's folder, as enrolment leaves it."""
    folder = founded.party(Role.SITE, name, now, life).certificate.parent
    membership = Membership(
        federation=FEDERATION, role=Role.SITE, name=name, address=address, enrolment_address="127.0.0.1:1", anchor=members.anchor()
    )
    write_public(folder / FEDERATION_FILE, membership_json(membership))
    write_public(folder / MEMBERS_FILE, members.canonical())
    return load_identity(folder)


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    founded = found(tmp_path / "f")
    running = coordinator(founded, tmp_path / "data")
    await running.start()
    members = founded.members
    draft = members.draft()
    for name in SITES:
        draft = draft.approve(name, Role.SITE, public_bytes(make_signing_key()))
    signed = sign_members(members, draft, ADMIN, founded.admin_key)
    running._members.put(signed.canonical())
    sites = {name: site_identity(founded, name, members, running.endpoints["federation"]) for name in SITES}
    world = Live(founded, tmp_path / "data", running, sites)
    yield world
    await world.close()


async def big_artifact(live: Live) -> tuple[bytes, int]:
    """Something in the store that fills more than one receive window, so that a transfer waits for its reader."""
    file = live.data / "big"
    file.write_bytes(random.Random(5).randbytes(24 * CHUNK_BYTES))
    return bytes.fromhex(live.coordinator._artifacts.put_file(file)), 24 * CHUNK_BYTES
