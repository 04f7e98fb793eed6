"""Bytes that two programs must agree on: length-prefixed fields, canonical JSON, digests, site names.

Owns the one rule for turning values into bytes that are hashed or signed. Must not know what any of those bytes mean.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

SITE_NAME: Final = re.compile(r"[a-z0-9-]{1,63}")
"""A site's name: also a DNS label, a folder name and a metric's label, so nothing that any of those would escape."""

PREFIX_BYTES: Final = 4
_LENGTH: Final = struct.Struct(">I")
FIELD_BYTES_MAX: Final = (1 << 32) - 1  # what a 4-byte prefix can say
U64_MAX: Final = (1 << 64) - 1


class MalformedBytes(ValueError):
    """Bytes that are not in the one form that is allowed."""


def lp(*fields: bytes) -> bytes:
    """Joins fields, each behind its length in 4 bytes, big endian.

    Injective: no two lists of fields give the same bytes.
    """
    parts: list[bytes] = []
    for field in fields:
        length = len(field)
        if length > FIELD_BYTES_MAX:
            raise MalformedBytes(f"a field of {length} bytes does not fit a 4-byte length")
        parts += (length.to_bytes(PREFIX_BYTES, "big"), field)
    return b"".join(parts)


def unlp(data: bytes, limit_fields: int) -> list[bytes]:
    """Splits what `lp` joined.

    Raises MalformedBytes when a length runs past the end or there are more than limit_fields.
    """
    fields: list[bytes] = []
    at, total = 0, len(data)
    while at < total:
        if len(fields) == limit_fields:
            raise MalformedBytes(f"more than {limit_fields} fields")
        start = at + PREFIX_BYTES
        if start > total:
            raise MalformedBytes(f"length cut short at byte {at}")
        end = start + _LENGTH.unpack_from(data, at)[0]
        if end > total:
            raise MalformedBytes(f"field {len(fields)} runs past the end")
        fields.append(bytes(data[start:end]))
        at = end
    return fields


def u64(n: int) -> bytes:
    """An integer from 0 to 2^64 - 1 in 8 bytes, big endian."""
    if not 0 <= n <= U64_MAX:
        raise MalformedBytes(f"{n} is not from 0 to 2^64 - 1")
    return n.to_bytes(8, "big")


def parse_u64(data: bytes) -> int:
    """The inverse of `u64`."""
    if len(data) != 8:
        raise MalformedBytes(f"an integer has 8 bytes, not {len(data)}")
    return int.from_bytes(data, "big")


def check_name(name: str) -> str:
    """Returns name if it is a site's name ([a-z0-9-], 1 to 63 characters); raises MalformedBytes otherwise."""
    if not SITE_NAME.fullmatch(name):
        raise MalformedBytes(f"{name[:80]!r} is not a site's name: 1 to 63 of a to z, 0 to 9 and -")
    return name


def parse_name(data: bytes) -> str:
    """A site's name from its bytes."""
    if not data.isascii():
        raise MalformedBytes("a site's name is ASCII")
    return check_name(data.decode("ascii"))


def id_set(ids: Iterable[str]) -> bytes:
    """A set of site names as bytes: one `lp` of the names, sorted. Raises MalformedBytes on a name given twice."""
    names = sorted(check_name(name) for name in ids)
    if len(set(names)) != len(names):
        raise MalformedBytes("a name stands twice in a set")
    return lp(*(name.encode("ascii") for name in names))


def parse_id_set(data: bytes, limit: int) -> tuple[str, ...]:
    """The inverse of `id_set`: sorted names.

    Raises MalformedBytes when they are unsorted, repeated, or more than limit.
    """
    names = tuple(parse_name(field) for field in unlp(data, limit))
    if any(a >= b for a, b in pairwise(names)):
        raise MalformedBytes("names are not sorted and unique")
    return names


def canonical_json(obj: Any) -> bytes:
    """JSON in one form: sorted keys, no whitespace, ASCII, shortest floats.

    Raises MalformedBytes on NaN and infinities.
    """
    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        raise MalformedBytes(f"not JSON: {error}") from None
    return text.encode("ascii")


def sha256(data: bytes) -> bytes:
    """SHA-256, 32 bytes."""
    return hashlib.sha256(data).digest()
