"""Notices that a site's folder went back in time: a restored backup must not consent or mask again (PROTOCOL R4, R5).

A backup put back holds a ledger that no longer knows its last consents, so the key that signed them may not sign on:
the site enrols again with a new key. What is checked: a file `incarnation` holds a random token that the ledger also
holds, both change before each step that must not be repeated, and the ledger remembers the file's change time, which
the kernel sets and no restore can put back. The file also says whose token it is, so that a ledger which was deleted
does not begin again, empty, under the key that it counted for. So this finds a restored database (another token), a
restored or copied folder (another change time) and a lost database. It cannot find a snapshot of the whole machine put
back: docs say so. Owns that one file and that one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import CheckConstraint, Column, Engine, Integer, LargeBinary, Table, bindparam, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from cosilo_client.durable import write_durably
from cosilo_client.ledger import tables
from cosilo_common.canonical import lp, sha256
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import Randomness
from cosilo_common.statements import Statement, ask_one, writing

TOKEN_BYTES: Final = 16
_LABEL: Final = b"cosilo/incarnation/1"

_incarnation = Table(
    "incarnation",
    tables,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("site_key", LargeBinary(32), nullable=False),
    Column("token", LargeBinary, nullable=False),
    Column("coming", LargeBinary, nullable=False),  # written before the file is, so that a crash between is no alarm
    Column("changed_ns", Integer, nullable=False),
)


_ROW: Final = Statement(select(_incarnation))
_COMING: Final = Statement(
    upsert(_incarnation).on_conflict_do_update(
        index_elements=["id"], set_={"site_key": bindparam("to_key"), "coming": bindparam("to_coming")}
    ),
    ("id", "site_key", "token", "coming", "changed_ns"),
)
_CAME: Final = Statement(update(_incarnation).values(token=bindparam("to_token"), changed_ns=bindparam("to_changed_ns")))


class FolderWentBack(CosiloError):
    """A folder that is not as its key left it: a backup put back, a copy, or one that was moved or changed owner."""


class Incarnation:
    """The link between a ledger, its folder and the site's key."""

    def __init__(self, engine: Engine, path: Path, randomness: Randomness) -> None:
        self._engine = engine
        self._path = path
        self._randomness = randomness

    def claim(self, site_key: bytes, *, vouched: bool = False) -> bool:
        """Binds the ledger to a key, or checks that this is still the folder the key has signed from.

        site_key: Ed25519 public key, 32 bytes. vouched: a person says that the folder was moved or changed owner and
        is no backup. Returns whether the key is new to this ledger. Raises CosiloError where the folder is a restored
        backup or a copy, or where this key's ledger is gone, for which nobody can vouch.
        """
        row = ask_one(self._engine, _ROW)
        if row is None and self._found()[TOKEN_BYTES:] == _owner(site_key):
            raise CosiloError(
                "open journal",
                f"{self._path.parent}: the ledger is gone, and with it what this site's key has signed",
                "put the newest state.db back, or enrol again with a new key: cosilo-site enrol",
            )
        if row is None or bytes(row.site_key) != site_key:
            self._write(site_key)
            return True
        if not vouched:
            self._check(bytes(row.token), bytes(row.coming), row.changed_ns)
        self._write(site_key)
        return False

    def advance(self) -> None:
        """Outdates every backup taken so far; called before each step that must not be repeated. Durable."""
        self._write(ask_one(self._engine, _ROW).site_key)

    def _check(self, token: bytes, coming: bytes, changed_ns: int) -> None:
        found = self._found()
        if found == token and found and self._path.stat().st_ctime_ns == changed_ns:
            return
        if found == coming and coming != token:
            return  # killed between writing the file and noting it
        raise FolderWentBack(
            "open journal",
            f"{self._path.parent} was restored from a backup, copied or re-owned; its key may have signed more",
            "enrol again with a new key: cosilo-site enrol; for a folder that was only moved or re-owned: cosilo-site vouch",
        )

    def _found(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""

    def _write(self, site_key: bytes) -> None:
        coming = self._randomness.token_bytes(TOKEN_BYTES) + _owner(site_key)
        with writing(self._engine) as transaction:
            transaction.run(_COMING, id=1, site_key=site_key, token=b"", coming=coming, changed_ns=0, to_key=site_key, to_coming=coming)
        write_durably(self._path, coming)
        changed_ns = self._path.stat().st_ctime_ns
        with writing(self._engine) as transaction:
            transaction.run(_CAME, to_token=coming, to_changed_ns=changed_ns)


def _owner(site_key: bytes) -> bytes:
    return sha256(lp(_LABEL, site_key))
