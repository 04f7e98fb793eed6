"""A chunk as the wire has it, `bytes data = 1`, written and read by hand around the raw bytes.

The wire is protobuf's own; only the copies are saved: wrapping and parsing a 1 MiB chunk as a message costs up to half of what gRPC can carry
(docs/decisions.md). Must not know grpc, files, or any message but this one field.
"""

from __future__ import annotations

DATA_FIELD = b"\x0a"  # field 1, length-delimited
VARINT_BYTES_MAX = 5  # a length below 2^35; chunks are 1 MiB


def frame_data(chunk: bytes) -> bytes:
    """A message whose one field is `data` (number 1), in one copy."""
    return b"".join((DATA_FIELD, _varint(len(chunk)), chunk))


def data_of(message: bytes) -> memoryview | None:
    """The data of a message that holds that field and nothing else, without a copy; None for any other message."""
    if message[:1] != DATA_FIELD:
        return None
    length = 0
    for at in range(1, min(len(message), VARINT_BYTES_MAX + 1)):
        length |= (message[at] & 0x7F) << (7 * (at - 1))
        if message[at] < 0x80:
            return memoryview(message)[at + 1 :] if at + 1 + length == len(message) else None
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
