"""A round's secrets: rows sealed with AES-256-GCM under key files of their own, outside SQLite (PROTOCOL R7).

A deleted row stays in the write-ahead log and in the file's free pages; an unlinked key makes all of its copies
noise. There are two keys an attempt, because R4 ends some secrets earlier than others:

    masks.key   c_i, s_i, b_i, the rounding seed    gone as soon as the spool is safe
    round.key   shares held for others, messages    gone at close, abandonment, or when a later round or attempt starts

Owns the rows and the key files; knows neither what a secret means nor when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Column, Engine, Integer, LargeBinary, String, Table, bindparam, delete, insert, select

from cosilo_client.durable import make_folder, shred, write_durably
from cosilo_client.ledger import tables
from cosilo_common.canonical import lp, u64
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import Randomness
from cosilo_common.statements import Statement, ask_one, writing

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_LABEL: Final = b"cosilo/vault/1"

_sealed = Table(
    "sealed_secrets",
    tables,
    Column("run", LargeBinary(32), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("name", String, primary_key=True),
    Column("keeps", String, nullable=False),
    Column("box", LargeBinary, nullable=False),
)


_ROW: Final = Statement(
    select(_sealed.c.keeps, _sealed.c.box).where(
        *(column == bindparam(f"of_{column.name}") for column in (_sealed.c.run, _sealed.c.round, _sealed.c.attempt, _sealed.c.name))
    )
)
_ADD: Final = Statement(insert(_sealed), ("run", "round", "attempt", "name", "keeps", "box"))
_DELETE: Final = Statement(delete(_sealed).where(_sealed.c.run == bindparam("of_run"), _sealed.c.keeps == bindparam("of_keeps")))


class Keeps(StrEnum):
    """Which key file seals a secret, and so how long it lives."""

    MASKS = "masks"
    ROUND = "round"


class Vault:
    """The sealed half of a site's state.db. folder: one subfolder a run, in which its key files stand."""

    def __init__(self, engine: Engine, folder: Path, randomness: Randomness) -> None:
        self._engine = engine
        self._folder = folder
        self._randomness = randomness

    def key_path(self, run: bytes, keeps: Keeps) -> Path:
        """Where a key file of a run stands while it lives."""
        return self._folder / run.hex() / f"{keeps.value}.key"

    def renew(self, run: bytes) -> None:
        """Destroys all that was sealed for a run and makes both keys anew: a new attempt begins."""
        self.forget(run)
        make_folder(self._folder / run.hex())
        for keeps in Keeps:
            write_durably(self.key_path(run, keeps), self._randomness.token_bytes(KEY_BYTES))

    def put(self, run: bytes, round_: int, attempt: int, name: str, secret: bytes, *, keeps: Keeps = Keeps.ROUND) -> None:
        """Seals one secret, on disk when this returns."""
        self.put_all(run, round_, attempt, {name: secret}, keeps={name: keeps})

    def put_all(
        self,
        run: bytes,
        round_: int,
        attempt: int,
        secrets: Mapping[str, bytes],
        *,
        keeps: Mapping[str, Keeps] | None = None,
    ) -> None:
        """Seals several secrets in one transaction: after a crash all are there, or none. By default for the round."""
        rows = []
        for name, secret in secrets.items():
            kept = (keeps or {}).get(name, Keeps.ROUND)
            nonce = self._randomness.token_bytes(NONCE_BYTES)
            box = nonce + AESGCM(self._key(run, kept)).encrypt(nonce, secret, _associated(run, round_, attempt, name, kept))
            rows.append({"run": run, "round": round_, "attempt": attempt, "name": name, "keeps": kept.value, "box": box})
        with writing(self._engine) as transaction:
            transaction.run_many(_ADD, rows)

    def get(self, run: bytes, round_: int, attempt: int, name: str) -> bytes | None:
        """Opens one secret; None if it was never put, or is forgotten.

        Raises CosiloError where the row is there and its key is not (a folder put back in part): such a round cannot
        go on.
        """
        row = ask_one(self._engine, _ROW, of_run=run, of_round=round_, of_attempt=attempt, of_name=name)
        if row is None:
            return None
        kept, box = Keeps(row.keeps), row.box
        try:
            return AESGCM(self._key(run, kept)).decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], _associated(run, round_, attempt, name, kept))
        except InvalidTag:
            raise CosiloError("open round's secrets", f"round {round_}: {kept.value}.key is not theirs", "abandon the round") from None

    def destroy_masks(self, run: bytes) -> None:
        """Forgets what only masking needs; the shares stay."""
        shred(self.key_path(run, Keeps.MASKS))
        self._delete(run, Keeps.MASKS)

    def forget(self, run: bytes) -> None:
        """Forgets everything of a run: keys first, so that a crash between leaves only noise."""
        for keeps in Keeps:
            shred(self.key_path(run, keeps))
        for keeps in Keeps:
            self._delete(run, keeps)

    def _delete(self, run: bytes, keeps: Keeps) -> None:
        with writing(self._engine) as transaction:
            transaction.run(_DELETE, of_run=run, of_keeps=keeps.value)

    def _key(self, run: bytes, keeps: Keeps) -> bytes:
        path = self.key_path(run, keeps)
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            raise CosiloError("open round's secrets", f"{path.name} of run {run.hex()[:12]} is gone", "abandon the round") from None
        if len(key) != KEY_BYTES:
            raise CosiloError("open round's secrets", f"{path.name} has {len(key)} bytes, not {KEY_BYTES}", "abandon the round")
        return key


def _associated(run: bytes, round_: int, attempt: int, name: str, keeps: Keeps) -> bytes:
    return lp(_LABEL, run, u64(round_), u64(attempt), name.encode(), keeps.value.encode())
