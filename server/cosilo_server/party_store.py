"""Who the coordinator knows of: sites seen and left, certificates, members lists, invitations and enrolments, in the store's database.

Owns these queries. Must not know what a membership means (membership.py) or anything of runs. Every method is one transaction; all may block
on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Engine, RowMapping, select, update
from sqlalchemy.dialects.sqlite import insert

from cosilo_common.database import reading
from cosilo_common.statements import Statement, writing
from cosilo_server import schema

_SEEN: Final = ("site", "at", "address", "software", "certificate_expires_at")
_SAW: Final = insert(schema.sites_seen)
_SAW_SITE: Final = Statement(_SAW.on_conflict_do_update(index_elements=["site"], set_={name: _SAW.excluded[name] for name in _SEEN}), _SEEN)


@dataclass(frozen=True)
class SiteSeen:
    """When and whence a site was last connected."""

    site: str
    at: float
    address: str
    software: str
    certificate_expires_at: float


class PartyStore:
    """The part of `Store` that is about parties. now: UTC seconds."""

    def __init__(self, engine: Engine, now: Callable[[], float]) -> None:
        self._engine = engine
        self._now = now
        self._enrolled_keys: dict[bytes, frozenset[tuple[str, str, bytes]]] = {}
        self._left: dict[tuple[str, bytes], float] = {}
        with reading(engine) as db:
            self._left |= {(row.site, bytes(row.key)): row.at for row in db.execute(select(schema.left_sites))}
            for row in db.execute(select(schema.enrolments)).mappings():
                self._note_enrolled(row)

    # --- sites ---

    def saw_site(self, seen: SiteSeen) -> None:
        with writing(self._engine) as db:
            db.run(_SAW_SITE, **{name: getattr(seen, name) for name in _SEEN})

    def sites_were_there(self, sites: Collection[str], at: float) -> None:
        """Notes when sites were last connected, of those that were ever seen."""
        s = schema.sites_seen
        with self._engine.begin() as db:
            db.execute(update(s).where(s.c.site.in_(sites)).values(at=at))

    def sites_seen(self) -> dict[str, SiteSeen]:
        with reading(self._engine) as db:
            rows = db.execute(select(schema.sites_seen)).mappings().all()
        return {row["site"]: SiteSeen(**row) for row in rows}

    def saw_certificate(self, row: Mapping[str, object]) -> None:
        """Notes the newest certificate of a member: role, name, key_digest, issuer, expires_at."""
        with self._engine.begin() as db:
            db.execute(insert(schema.certificates_seen).values(row).on_conflict_do_update(index_elements=["role", "name"], set_=row))

    def certificates_seen(self) -> Sequence[RowMapping]:
        """Every member's newest certificate."""
        with reading(self._engine) as db:
            return db.execute(select(schema.certificates_seen)).mappings().all()

    def site_left(self, site: str, key: bytes) -> None:
        """Notes that a site left under this Ed25519 key; the first time stands."""
        at = self._now()
        row = {"site": site, "key": key, "at": at}
        with self._engine.begin() as db:
            added = db.execute(insert(schema.left_sites).values(row).on_conflict_do_nothing()).rowcount == 1
        if added:
            self._left[site, key] = at

    def left_at(self, site: str, key: bytes) -> float:
        """When a site left under this key; 0 where it did not. Asked at every call, so from memory."""
        return self._left.get((site, key), 0.0)

    # --- members and invitations: see membership.py, which owns their meaning ---

    def newest_members(self) -> bytes | None:
        m = schema.members
        with reading(self._engine) as db:
            row = db.execute(select(m.c.list).order_by(m.c.version.desc(), m.c.revision.desc()).limit(1)).first()
        return None if row is None else bytes(row[0])

    def was_member(self, key: bytes) -> bool:
        """Whether a members list that was ever stored names this Ed25519 key."""
        with reading(self._engine) as db:
            return any(key.hex().encode() in bytes(row[0]) for row in db.execute(select(schema.members.c.list)))

    def put_members(self, version: int, revision: int, data: bytes) -> bool:
        """Stores a members list; False where that version and revision stand already."""
        row = {"version": version, "revision": revision, "list": data, "at": self._now()}
        with self._engine.begin() as db:
            return db.execute(insert(schema.members).values(row).on_conflict_do_nothing()).rowcount == 1

    def add_invitation(self, row: Mapping[str, object]) -> bool:
        """Stores a row of `schema.invitations`; False where the token stands already."""
        values = {**row, "invited_at": self._now()}
        with self._engine.begin() as db:
            return db.execute(insert(schema.invitations).values(values).on_conflict_do_nothing()).rowcount == 1

    def invitation(self, token_public: bytes) -> RowMapping | None:
        i = schema.invitations
        with reading(self._engine) as db:
            return db.execute(select(i).where(i.c.token_public == token_public)).mappings().first()

    def add_enrolment(self, row: Mapping[str, object]) -> bool:
        """Stores a row of `schema.enrolments`; False where the token was used already."""
        with self._engine.begin() as db:
            added = db.execute(insert(schema.enrolments).values(dict(row)).on_conflict_do_nothing()).rowcount == 1
        if added:
            self._note_enrolled(row)
        return added

    def wrong_tries(self, token_public: bytes) -> int:
        """How often an invitation's token was shown with something wrong beside it."""
        w = schema.wrong_tries
        with reading(self._engine) as db:
            return db.execute(select(w.c.tries).where(w.c.token_public == token_public)).scalar() or 0

    def add_wrong_try(self, token_public: bytes) -> None:
        """Counts one more."""
        w = schema.wrong_tries
        first = insert(w).values(token_public=token_public, tries=1)
        with self._engine.begin() as db:
            db.execute(first.on_conflict_do_update(index_elements=["token_public"], set_={"tries": w.c.tries + 1}))

    def enrolled_with(self, tls_key_digest: bytes) -> frozenset[tuple[str, str, bytes]]:
        """(role, name, Ed25519 key) of every enrolment that was for this TLS key. Asked at every call, so from memory."""
        return self._enrolled_keys.get(tls_key_digest, frozenset())

    def _note_enrolled(self, row: Mapping[str, Any] | RowMapping) -> None:
        known = self.enrolled_with(row["tls_key_digest"])
        self._enrolled_keys[row["tls_key_digest"]] = known | {(row["role"], row["name"], row["signing_key"])}

    def enrolment(self, token_public: bytes) -> RowMapping | None:
        e = schema.enrolments
        with reading(self._engine) as db:
            return db.execute(select(e).where(e.c.token_public == token_public)).mappings().first()

    def invitations(self) -> Sequence[RowMapping]:
        """All invitations with what came of them (signing_key and enrolled_unix_s are None until then), newest first."""
        i, e = schema.invitations, schema.enrolments
        joined = i.outerjoin(e, i.c.token_public == e.c.token_public)
        query = select(i, e.c.signing_key, e.c.enrolled_unix_s).select_from(joined).order_by(i.c.invited_at.desc())
        with reading(self._engine) as db:
            return db.execute(query).mappings().all()
