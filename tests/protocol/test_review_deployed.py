"""What an attacker's second reading found: the audit log, backups, and the look at what stands between a site and its coordinator."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cosilo_client import obstacles
from cosilo_client import terminal as sites
from cosilo_client.coordinator import Unreachable
from cosilo_client.duties import Duties
from cosilo_common.audit import AuditLog, Entry, follow
from cosilo_common.audit_reading import in_words
from cosilo_common.canonical import canonical_json, lp, sha256, u64
from cosilo_common.errors import CosiloError
from cosilo_common.identity.documents import VERSION_MAX
from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.trust import Trust, key_id, pem_of, sign_trust
from cosilo_common.manifest import PARTICIPANTS_MAX
from cosilo_common.rpc.v1 import enrolment_pb2
from cosilo_server import artifacts, backup
from cosilo_server.cli import terminal as admins
from cosilo_server.enrolment import EnrolmentRefused, RefusalReason
from cosilo_server.membership import AHEAD_MAX, StoredMembers
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rotation import Rotation
from cosilo_server.services.downloads import NOTED_AGAIN_S, DownloadNotes
from cosilo_server.services.enrolment import NOTED_PER_MINUTE_MAX, EnrolmentService
from cosilo_server.store import Store
from tests.identity_parties import ADMIN, FEDERATION, NOW, found

# --- the audit log ---


def line(**changes: Any) -> bytes:
    """One whole and rightly hashed line, as a coordinator that lies may send it."""
    plain = {"n": 1, "at": 5.0, "who": "x", "what": "y", "detail": {}, "before": "0" * 64} | changes
    return canonical_json(plain | {"hash": sha256(canonical_json(plain)).hex()}) + b"\n"


def test_what_a_stranger_calls_itself_makes_no_second_line() -> None:
    """Anybody may knock at the enrolment port under a name with a line end in it, and an admin reads the log as text."""
    forged = "x\n     7  2026-11-23 03:00:00Z  admin/ada: approve st-evil"
    words = in_words(Entry(6, 5.0, "somebody at 192.0.2.1", "enrolment refused", {"name": forged}, "", ""))
    assert len(words.splitlines()) == 1
    assert "\n" not in words and "\t" not in in_words(Entry(6, 5.0, "a\tb", "c", {}, "", ""))


@pytest.mark.parametrize(
    "changes",
    [{"at": "soon"}, {"at": 1e300}, {"at": -1e300}, {"at": True}, {"who": 5}, {"what": None}, {"detail": "st-anna"}, {"n": True}],
    ids=str,
)
def test_an_entry_of_other_types_is_none(changes: dict[str, Any]) -> None:
    """Rightly hashed, from a coordinator that lies: it must end in words and not in a traceback on the admin's terminal."""
    assert list(follow([line()], "here"))
    with pytest.raises(CosiloError, match="is not an entry"):
        list(follow([line(**changes)], "here"))


def test_the_largest_round_fits_the_log(tmp_path: Path) -> None:
    """An entry that is too long is not written at all: a large federation's rounds would be missing from the log."""
    names = [f"{k:063d}" for k in range(PARTICIPANTS_MAX)]
    log = AuditLog(tmp_path / "audit.log")
    log.append("coordinator", "round begun", run="ab" * 32, round=1, kind="train", invited=names)
    assert log.append("coordinator", "stopped").n == 2
    assert log.verify().entries == 2


def test_the_log_is_never_written_through_a_link(tmp_path: Path) -> None:
    """A person runs commands as root in a folder that the daemon's user owns."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"")
    (tmp_path / "audit.log").symlink_to(elsewhere)
    with pytest.raises(CosiloError, match=r"audit\.log"):
        AuditLog(tmp_path / "audit.log").append("person root", "pause")
    assert elsewhere.read_bytes() == b""


def test_a_log_that_root_makes_is_the_folder_owner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the daemon, which is not root, could write no entry, and would refuse whatever wants one."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda _fd, uid, gid: given.append((uid, gid)))
    log = AuditLog(tmp_path / "audit.log")
    log.append("person root", "pause")
    log.append("person root", "resume")
    assert given == [(tmp_path.stat().st_uid, tmp_path.stat().st_gid)], "once, when it is made"


@pytest.mark.parametrize("columns", [lambda rows: admins.columns(("site", "software"), rows), sites.columns], ids=["admin", "site"])
def test_a_cell_makes_no_second_row(columns: Callable[[list[tuple[str, str]]], None], capsys: pytest.CaptureFixture[str]) -> None:
    """What a site says of its software is shown to admins beside others' rows."""
    columns([("st-anna", "1.0\nst-evil  connected\t"), ("st-beda", "1.0")])
    shown = capsys.readouterr().out.splitlines()
    assert not [line for line in shown if line.startswith("st-evil")]
    assert "\t" not in "".join(shown)


# --- who fills the disk ---


def test_a_reader_that_comes_again_and_again_keeps_no_checkpoint_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that reads a byte of each retired checkpoint every few minutes would keep them all."""
    clock = [0.0]
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(time=lambda: clock[0], monotonic=lambda: clock[0]))
    store = artifacts.Artifacts(tmp_path)
    digest = store.put_bytes(b"weights of long ago")
    store.claim({digest: 1.0})
    spared = 0
    for _ in range(10 * artifacts.LINGERS_MAX):
        with store.lease(digest):
            assert not store.delete_idle(digest, 600.0), "while it is read it stays"
        clock[0] += 300.0
        if store.delete_idle(digest, 600.0):
            break
        spared += 1
    assert spared * 300.0 == artifacts.LINGERS_MAX * 600.0
    assert not store.has(digest)


# --- who fills the log's disk ---


def test_the_same_download_is_noted_once_an_hour() -> None:
    """A site asks for the last byte of an artifact twenty times a second, for months."""
    noted: list[dict[str, Any]] = []
    clock = [0.0]
    notes = DownloadNotes(lambda who, what, /, **detail: noted.append({"who": who, **detail}), lambda: clock[0], remembered=2)
    for _ in range(1000):
        notes.downloaded("site/st-anna", "aa", 7)
    assert noted == [{"who": "site/st-anna", "artifact": "aa", "bytes": 7}]
    notes.downloaded("site/st-beda", "aa", 7)
    notes.downloaded("site/st-anna", "bb", 7)
    assert len(noted) == 3, "another site, and another artifact, are other entries"
    clock[0] = NOTED_AGAIN_S
    notes.downloaded("site/st-anna", "bb", 7)
    assert len(noted) == 4


def test_a_coordinator_that_asks_for_the_same_consent_for_ever_fills_no_site_s_log() -> None:
    """It says consenting, revealing, consenting, a hundred times a second; the site answers with the same bytes, and notes them once."""
    noted: list[tuple[int, int]] = []

    def note(_who: str, _what: str, /, **detail: Any) -> None:
        noted.append((detail["round"], detail["attempt"]))

    duties = Duties(SimpleNamespace(note=note), bytes(32))  # type: ignore[arg-type]  # what is used of it
    for number, attempt in [*[(1, 1)] * 1000, (1, 2), (1, 1), (2, 1), (2, 1)]:
        owed: Any = SimpleNamespace(run=bytes(32), round=number, attempt=attempt)
        duties._note(owed, "consented", attempt=attempt)
    assert noted == [(1, 1), (1, 2), (2, 1)]


class _Refused(Exception):
    pass


async def test_a_flood_of_refused_enrolments_is_noted_in_part_and_its_size_with_it() -> None:
    noted: list[dict[str, Any]] = []
    clock = [0.0]

    class Desk:
        def enrol(self, *_: object) -> None:
            raise EnrolmentRefused(RefusalReason.UNKNOWN, "there is no such invitation here", "")

    class Context:
        def peer(self) -> str:
            return "ipv4:192.0.2.1:5"

        async def abort(self, *_: object) -> None:
            raise _Refused

    def note(who: str, what: str, /, **detail: Any) -> None:
        noted.append(detail)

    service = EnrolmentService(Desk(), CoordinatorMetrics(), note, lambda: clock[0])  # type: ignore[arg-type]  # a desk that refuses

    async def knock(times: int) -> None:
        for _ in range(times):
            with pytest.raises(_Refused):
                await service.Enrol(enrolment_pb2.EnrolRequest(name="x"), Context())  # type: ignore[arg-type]  # what is used of it

    await knock(240)
    assert len(noted) == NOTED_PER_MINUTE_MAX
    clock[0] = 60.0
    await knock(1)
    assert noted[-1]["unnoted"] == 240 - NOTED_PER_MINUTE_MAX


# --- a backup's folder ---


def test_keys_are_not_copied_into_somebody_else_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made the empty folder before, in /tmp say, stays its owner whatever its mode, and may put files of its own there first."""
    (tmp_path / "to").mkdir()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(CosiloError, match="is somebody else's"):
        backup._make_empty(tmp_path / "to", "back up")


def test_keys_are_not_copied_into_a_folder_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "to").symlink_to(tmp_path / "theirs")
    with pytest.raises(CosiloError, match="is a link"):
        backup._make_empty(tmp_path / "to", "back up")


# --- whoever answers in the coordinator's place ---


@pytest.fixture
def of_no_version(tmp_path: Path) -> bytes:
    """A certificate (DER) whose version is none: OpenSSL takes it, cryptography raises what is no ValueError."""
    der = x509.load_pem_x509_certificate(found(tmp_path / "f").coordinator.tls.certificate.read_bytes()).public_bytes(Encoding.DER)
    changed = der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020105"), 1)
    with pytest.raises(x509.InvalidVersion):
        x509.load_der_x509_certificate(changed)
    return changed


async def test_a_certificate_that_does_not_parse_ends_no_session(of_no_version: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look is made from the session's one loop: what it raises would end the daemon's link for good."""
    parse: Callable[[bytes], x509.Certificate] = x509.load_der_x509_certificate

    async def look(*_: object) -> x509.Certificate:
        return parse(of_no_version)

    monkeypatch.setattr(obstacles, "foreign_certificate", look)
    failed = Unreachable("attend", "CERTIFICATE_VERIFY_FAILED")
    assert await obstacles.explain(failed, "192.0.2.1:7443", "north-star", b"", None) is failed


# --- one admin against the others ---


def test_no_admin_uses_the_versions_up(tmp_path: Path) -> None:
    """A list of the last version there is has no successor: its signer could never be removed, and no site be told its number."""
    founded = found(tmp_path / "f")
    members = StoredMembers(Store(tmp_path / "state.db"), FEDERATION, founded.members.canonical())

    def offer(version: int) -> None:
        draft = founded.members.list.model_copy(update={"version": version})
        signature = founded.admin_key.sign(lp(b"cosilo/members/1", FEDERATION.encode(), u64(version), draft.canonical()))
        members.put(SignedMembers(list=draft, signer=ADMIN, signature=signature).canonical())

    for version in (VERSION_MAX, 2 + AHEAD_MAX):
        with pytest.raises(CosiloError, match="versions ahead"):
            offer(version)
    offer(1 + AHEAD_MAX)
    assert members.newest().version == 1 + AHEAD_MAX, "after a restore of a backup that is old"


def test_no_admin_uses_the_trust_documents_versions_up(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    state = Rotation(founded.coordinator, founded.authority, founded.members.admins, NOW)
    roots = tuple(pem_of(root) for root in state.roots())
    last = Trust(version=VERSION_MAX, federation=FEDERATION, roots=roots, issuers=(key_id(founded.authority.intermediate),))
    signed = sign_trust(last, (), ADMIN, founded.admin_key, founded.members.admins())
    with pytest.raises(CosiloError, match="versions ahead"):
        state.put(signed.canonical(), b"", b"", NOW)
    assert state.version() == 0
