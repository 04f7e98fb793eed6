"""Values as they stand in identity's JSON documents, and the one way of reading such a document.

Keys and signatures are lower-case hex; names, versions and counts are bounded; an unknown key is an error; a message
about bad input names the field and never shows its value, since the value may be a secret. Must not know what the
documents mean.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, StringConstraints, ValidationError

from cosilo_common.canonical import MalformedBytes, canonical_json
from cosilo_common.errors import CosiloError

VERSION_MAX = (1 << 53) - 1  # the largest integer that every JSON reader keeps exact (RFC 8259, section 6); a version a second lasts 285 My
ADDRESS_CHARS_MAX = 260  # a DNS name of 253, a colon, a port of 5 digits
ADDRESS_PATTERN = r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}$"
ERRORS_SHOWN = 5


def _bytes_from_hex(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value != value.lower() or not value.isascii():
        raise ValueError("must be lower-case hex")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise ValueError("must be lower-case hex") from None


def _hex_from_bytes(value: bytes) -> str:
    return value.hex()


_AsHex = (BeforeValidator(_bytes_from_hex), PlainSerializer(_hex_from_bytes, when_used="json"))

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")]
Version = Annotated[int, Field(ge=1, le=VERSION_MAX)]
UnixSeconds = Annotated[int, Field(ge=0, le=VERSION_MAX)]
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32), *_AsHex]
Bytes64 = Annotated[bytes, Field(min_length=64, max_length=64), *_AsHex]
Address = Annotated[str, StringConstraints(pattern=ADDRESS_PATTERN, max_length=ADDRESS_CHARS_MAX)]


class Document(BaseModel):
    """A frozen record of plain values, strictly typed; knows its canonical bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    def canonical(self) -> bytes:
        """The bytes that are hashed, signed and sent."""
        return canonical_json(self.model_dump(mode="json"))


def check_address(operation: str, text: str) -> str:
    """Returns text if it is `host:port` or `[v6]:port`; raises CosiloError, which names `operation`, otherwise."""
    if len(text) > ADDRESS_CHARS_MAX or not re.fullmatch(ADDRESS_PATTERN.removesuffix("$"), text):
        raise CosiloError(operation, f"{text[:ADDRESS_CHARS_MAX]!r} is not an address", "write it as HOST:PORT")
    return text


AnyDocument = TypeVar("AnyDocument", bound=Document)


def parse_document(kind: type[AnyDocument], data: bytes, bytes_max: int, operation: str, canonical: bool = True) -> AnyDocument:
    """Reads a document of at most `bytes_max` bytes.

    canonical: refuse any bytes but those that `Document.canonical` writes, so that nothing rides along unseen (repeated
    keys, spaces).
    Raises CosiloError, which names `operation` and the field, never the value.
    """
    if len(data) > bytes_max:
        raise CosiloError(operation, f"{len(data)} bytes are more than {bytes_max}", "check that it is the right file")
    try:
        document = kind.model_validate_json(data)
        if canonical and document.canonical() != data:
            raise CosiloError(operation, "its bytes are not in canonical form", "take it again from where it was made")
    except ValidationError as error:
        raise CosiloError(operation, describe(error), "take it again from where it was made") from None
    except (MalformedBytes, RecursionError):
        raise CosiloError(operation, "it is not a document of this kind", "take it again from where it was made") from None
    return document


def describe(error: ValidationError) -> str:
    """A pydantic error in one line that names each field and shows no value."""
    items = error.errors(include_url=False, include_context=False, include_input=False)[:ERRORS_SHOWN]
    return "; ".join((".".join(str(part)[:64] for part in item["loc"]) or "document") + ": " + item["msg"] for item in items)
