"""A log handler that gives journald every field by its own name, so that `journalctl COSILO_ROUND=7` finds what a round left.

Owns journald's native protocol (systemd.io, "Native Journal Protocol": NAME=VALUE lines in one datagram; a value with a newline goes
with its length before it). Must not know what is logged, nor what is secret: lines arrive as JSON objects that were cleaned already.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

SOCKET: Final = "/run/systemd/journal/socket"
STREAM_VARIABLE: Final = "JOURNAL_STREAM"  # "device:inode" of what systemd connected to the journal (systemd.exec(5))
VALUE_CHARS_MAX: Final = 16_000  # a traceback
FIELDS_MAX: Final = 40  # the longest line of ours has a dozen
DATAGRAM_BYTES_MAX: Final = 128 * 1024  # Linux takes 208 KiB by default; fields that do not fit any more are left out
PREFIX: Final = "COSILO_"
NAME_CHARS_MAX: Final = 64  # journald drops a field with a longer name

_PRIORITIES: Final = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}  # syslog(3)
_OWN: Final = frozenset({"event", "level", "timestamp", "exception"})  # journald has its own names for these
_NOT_IN_NAMES: Final = re.compile(r"[^A-Z0-9_]")


def is_journal(stream: TextIO) -> bool:
    """Whether systemd connected this stream to the journal, and nobody redirected it since."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get(STREAM_VARIABLE) == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends records to journald. Its formatter must make one JSON object of each; what cannot be sent goes to `fallback`."""

    def __init__(self, fallback: TextIO) -> None:
        super().__init__()
        self._fallback = fallback
        self._path = SOCKET
        self._identifier = Path(sys.argv[0]).name or "cosilo"
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            try:
                self._channel.sendto(datagram(json.loads(line), self._identifier), self._path)
            except OSError:  # journald restarts, or its queue is full: its other door, the stream, still takes lines
                self._fallback.write(line + "\n")
                self._fallback.flush()
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._channel.close()
        super().close()


def datagram(event: dict[str, Any], identifier: str) -> bytes:
    """One line of the log in journald's form: MESSAGE for people, PRIORITY, and each field as COSILO_NAME."""
    body = b""
    for name, value in _fields(event, identifier):
        entry = _entry(name, value[:VALUE_CHARS_MAX])
        if len(body) + len(entry) > DATAGRAM_BYTES_MAX:
            break
        body += entry
    return body


def _fields(event: dict[str, Any], identifier: str) -> Iterator[tuple[str, str]]:
    extra = {name: value if isinstance(value, str) else json.dumps(value) for name, value in event.items() if name not in _OWN}
    shown = " ".join(f"{name}={value}" for name, value in extra.items() if name != "logger" and value not in ("null", ""))
    message = f"{event.get('event', '')}  {shown}" if shown else str(event.get("event", ""))
    yield "MESSAGE", f"{message}\n{event['exception']}" if event.get("exception") else message
    yield "PRIORITY", str(_PRIORITIES.get(str(event.get("level")), 6))
    yield "SYSLOG_IDENTIFIER", identifier
    for name, value in list(extra.items())[:FIELDS_MAX]:
        if value not in ("null", ""):
            yield (PREFIX + _NOT_IN_NAMES.sub("_", name.upper()))[:NAME_CHARS_MAX], value


def _entry(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
