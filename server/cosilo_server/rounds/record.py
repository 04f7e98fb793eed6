"""A round as bytes, for the store: one JSON document, and the messages apart from it by digest.

Messages are large (a shares message grows with the cohort) and never change, so the document that is rewritten at every step names them
only. Transient fields of sites are left out: they start anew after a restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cosilo_common.errors import CosiloError
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.rounds.state import DeclineCode, Phase, Round, Site, Terms, Upload, WeightsStep

_MESSAGES = ("advert", "shares", "consent", "reveal")


def dump(state: Round) -> tuple[str, dict[bytes, bytes]]:
    """The document, and every message in it by its SHA-256."""
    blobs: dict[bytes, bytes] = {}

    def keep(message: bytes | None) -> str | None:
        if message is None:
            return None
        digest = hashlib.sha256(message).digest()
        blobs[digest] = message
        return digest.hex()

    document = {
        "phase": state.phase,
        "phase_since": state.phase_since,
        "attempt": state.attempt,
        "base_digest": state.base_digest.hex(),
        "base_bytes": state.base_bytes,
        "encoding": state.encoding.hex(),
        "seed": state.seed.hex(),
        "invited": state.invited,
        "roster": state.roster,
        "survivors": state.survivors,
        "checkpoint": state.checkpoint.hex(),
        "reason": state.reason,
        "ended_at": state.ended_at,
        "sites": {name: _dump_site(site, keep) for name, site in sorted(state.sites.items())},
        "step": None if state.step is None else [state.step.digest.hex(), state.step.base.hex(), state.step.bytes],
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")), blobs


def load(
    document: str, blobs: Mapping[bytes, bytes], *, run: bytes, number: int, kind: RoundKind, terms: Terms, started_at: float
) -> Round:
    """The inverse of `dump`, with what the run's manifest and the store's row say.

    Raises CosiloError where it is no round's document, or a message is missing.
    """
    try:
        return _load(json.loads(document), blobs, run=run, number=number, kind=kind, terms=terms, started_at=started_at)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # whatever does not fit where it is read
        subject = f"round {number} of run {run.hex()[:12]} is not as it was written ({type(error).__name__})"
        raise CosiloError("read round", subject, "the database is damaged: put the newest backup back (`cosilo restore`)") from None


def _load(
    raw: dict[str, Any], blobs: Mapping[bytes, bytes], *, run: bytes, number: int, kind: RoundKind, terms: Terms, started_at: float
) -> Round:
    def find(digest: str | None) -> bytes | None:
        return None if digest is None else blobs[bytes.fromhex(digest)]

    return Round(
        run=run,
        number=number,
        kind=kind,
        terms=terms,
        base_digest=bytes.fromhex(raw["base_digest"]),
        base_bytes=raw["base_bytes"],
        encoding=bytes.fromhex(raw["encoding"]),
        seed=bytes.fromhex(raw["seed"]),
        started_at=started_at,
        phase=Phase(raw["phase"]),
        phase_since=raw["phase_since"],
        attempt=raw["attempt"],
        sites={name: _load_site(site, find) for name, site in raw["sites"].items()},
        invited=tuple(raw["invited"]),
        roster=tuple(raw["roster"]),
        survivors=tuple(raw["survivors"]),
        checkpoint=bytes.fromhex(raw["checkpoint"]),
        reason=raw["reason"],
        ended_at=raw["ended_at"],
        step=_load_step(raw.get("step")),  # a document of an earlier release has none
    )


def _load_step(raw: list[Any] | None) -> WeightsStep | None:
    if raw is None:
        return None
    digest, base, size = raw
    return WeightsStep(bytes.fromhex(digest), bytes.fromhex(base), int(size))


def _dump_site(site: Site, keep: Any) -> dict[str, Any]:
    upload = site.upload
    return {
        **{name: keep(getattr(site, name)) for name in _MESSAGES},
        "upload": None
        if upload is None
        else {"statement": keep(upload.statement), "digest": upload.digest.hex(), "size_bytes": upload.size_bytes},
        "complaints": site.complaints,
        "declined": site.declined,
        "late": site.late,
    }


def _load_site(raw: dict[str, Any], find: Any) -> Site:
    upload = raw["upload"]
    return Site(
        **{name: find(raw[name]) for name in _MESSAGES},
        upload=None if upload is None else Upload(find(upload["statement"]), bytes.fromhex(upload["digest"]), upload["size_bytes"]),
        complaints=tuple(raw["complaints"]),
        declined=None if raw["declined"] is None else DeclineCode(raw["declined"]),
        late=raw["late"],
    )
