"""A coordinator that was restored: which round comes next, and whose members list stands."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import found_members, sign_members
from cosilo_common.identity.names import Role
from cosilo_common.protocol_version import version_gap
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.closing import RoundCloser
from cosilo_server.conductor import Conductor
from cosilo_server.membership import StoredMembers
from cosilo_server.rounds.events import Stopped
from cosilo_server.rounds.machine import begin, step
from cosilo_server.spool import Spool
from cosilo_server.store import Store, terms_of
from tests.unit.test_retention import MANIFEST, NAMES, RUN, Folder

ADA = make_signing_key()
FOUNDED = found_members("north-star", "ada", ADA)
KEYS = {name: make_signing_key() for name in ("st-anna", "st-beda", "st-clara")}


def restored(tmp_path: Path) -> Conductor:
    """A coordinator whose one run has had three rounds, by its store."""
    folder = Folder(tmp_path)
    folder.fill(2)
    base = folder.store.newest_checkpoint(RUN)
    assert base is not None
    state, _ = begin(
        run=RUN,
        number=3,
        kind=RoundKind.TRAIN,
        terms=replace(terms_of(MANIFEST), f=1),
        base_digest=base.weights,
        base_bytes=base.bytes,
        encoding=b"",
        seed=bytes(32),
        connected=NAMES,
        now=0.0,
    )
    folder.store.begin_round(state)
    folder.store.save_round(step(state, Stopped("the coordinator was restored"), 1.0)[0], "Stopped")
    spool = Spool(tmp_path / "spool")
    return Conductor(folder.store, spool, RoundCloser(folder.store, folder.artifacts, spool), folder.metrics)


async def floor_after(conductor: Conductor, claims: list[tuple[str, int]]) -> int:
    await conductor.start()
    try:
        for site, reached in claims:
            conductor.note_reached(RUN, site, reached)
        return await conductor.order(RUN, RoundKind.REHEARSAL, 1) - 1
    finally:
        await conductor.stop()


@pytest.mark.parametrize(
    ("claims", "floor"),
    [
        ([], 3),
        ([("st-anna", 12)], 3),  # one may lie
        ([("st-anna", 12), ("st-anna", 13)], 3),  # and may say it twice
        ([("st-anna", 900), ("st-beda", 12)], 12),
        ([("st-anna", 12), ("st-beda", 11), ("st-clara", 9)], 11),
        ([("st-anna", 2), ("st-beda", 3)], 3),  # what is known is nothing new
        ([("st-anna", 12), ("stranger", 12)], 3),
    ],
)
def test_the_next_round_is_above_what_more_sites_have_begun_than_may_lie(tmp_path: Path, claims: list[tuple[str, int]], floor: int) -> None:
    assert MANIFEST.f == 1
    assert asyncio.run(floor_after(restored(tmp_path), claims)) == floor


def test_a_lie_by_many_ends_at_the_manifest_s_bound_in_words(tmp_path: Path) -> None:
    claims = [(name, MANIFEST.rounds_max) for name in NAMES]
    with pytest.raises(CosiloError, match=f"allows {MANIFEST.rounds_max} rounds and has had {MANIFEST.rounds_max}"):
        asyncio.run(floor_after(restored(tmp_path), claims))


def test_an_admin_puts_back_the_list_that_the_store_forgot(tmp_path: Path) -> None:
    versions = [FOUNDED]
    for name, key in KEYS.items():
        versions.append(sign_members(versions[-1], versions[-1].draft().approve(name, Role.SITE, public_bytes(key)), "ada", ADA))
    members = StoredMembers(Store(tmp_path / "state.db"), "north-star", FOUNDED.canonical())
    members.put(versions[-1].canonical())
    assert members.newest() == versions[-1]
    members.put(versions[-1].canonical())  # again is harmless
    with pytest.raises(CosiloError, match="version 4 was seen before"):
        members.put(versions[2].canonical())
    assert StoredMembers(Store(tmp_path / "state.db"), "north-star", FOUNDED.canonical()).newest() == versions[-1]
    forged = sign_members(versions[-1], versions[-1].draft(), "ada", ADA)
    with pytest.raises(CosiloError, match="signature"):
        members.put(forged.model_copy(update={"signature": bytes(64)}).canonical())


@pytest.mark.parametrize(
    ("site", "coordinator", "said"),
    [
        (1, 1, ""),
        (1, 2, "the site speaks protocol version 1 and the coordinator 2: upgrade cosilo-site at this site"),
        (3, 2, "the site speaks protocol version 3 and the coordinator 2: upgrade the coordinator"),
    ],
)
def test_a_gap_names_both_versions_and_which_side_to_upgrade(site: int, coordinator: int, said: str) -> None:
    assert version_gap(site, coordinator) == said
