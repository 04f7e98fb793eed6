"""A unix socket in the site's private folder, and lines of bounded length over it.

Owns addresses and framing for both ends. Must not know what the lines say.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINE_BYTES_MAX = 1 << 20  # a job with 10,000 class names of 100 bytes
ADDRESS_BYTES_MAX = 100  # sun_path has 108 on Linux and 104 elsewhere


def listen(path: Path, backlog: int) -> socket.socket:
    """A listening socket at the path, readable and writable by its owner only."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with _address(path) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def connect(path: Path) -> socket.socket:
    """A blocking connection to the socket at the path."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _address(path) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def lines(connection: socket.socket) -> Iterator[bytes]:
    """Each line that arrives, until the other end closes. Raises ValueError for a longer one than LINE_BYTES_MAX."""
    with connection.makefile("rb") as stream:
        while line := stream.readline(LINE_BYTES_MAX + 1):
            if not line.endswith(b"\n"):
                if len(line) > LINE_BYTES_MAX:
                    raise ValueError(f"a line longer than {LINE_BYTES_MAX} bytes")
                return
            yield line


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The path, or (Linux) a short name through a descriptor of its folder: socket addresses are shorter than paths."""
    if len(os.fsencode(path)) <= ADDRESS_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
