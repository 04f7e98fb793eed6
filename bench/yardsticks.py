"""What the machine itself can do, measured beside what is to be judged: raw TLS over loopback, and a memory copy.

Owns the yardsticks. Must not know Cosilo. A figure of ours means something only as a ratio to one of these in the same run.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import trustme

CHUNK_BYTES = 1 << 20  # Cosilo's own


def raw_tls_s(size: int, downs: int, ups: int, streams: int = 1, keep: Path | None = None) -> float:
    """Seconds in which a process and its child exchange files over TLS 1.3 on loopback: `downs` of `size` bytes to the child, `ups` back.

    The bytes alone: nothing is read from a disk, hashed or kept. streams: how many go at once. The child is a process of its own, as a
    site is, so each side has a core. keep: a folder; what is received is then hashed (SHA-256) and written there by a thread beside the one
    that receives, and synced at its end: what is left of the bytes alone where a file with a digest is to stay.
    """
    with tempfile.TemporaryDirectory(prefix="cosilo-bench-") as folder:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        root = Path(folder, "ca.pem")
        authority.cert_pem.write_to_path(str(root))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        certificate.configure_cert(context)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            command = [sys.executable, "-m", "bench.yardsticks", str(root), str(listener.getsockname()[1]), str(size)]
            child = subprocess.Popen(
                [*command, str(downs), str(ups), str(streams), *([str(keep)] if keep else [])], stdin=subprocess.DEVNULL
            )
            try:
                listener.settimeout(60)
                peers = [context.wrap_socket(listener.accept()[0], server_side=True) for _ in range(streams)]
                began_s = time.perf_counter()
                _in_threads([partial(_serve, peer, size, downs // streams, ups // streams, keep) for peer in peers])
                taken_s = time.perf_counter() - began_s
            finally:
                child.wait(60)
    return taken_s


def copy_bytes_s(size: int = 1 << 30) -> float:
    """Bytes a second of one thread's memcpy."""
    source = np.ones(size // 8, dtype=np.float64)
    target = np.empty_like(source)
    np.copyto(target, source)
    began_s = time.perf_counter()
    np.copyto(target, source)
    return size / (time.perf_counter() - began_s)


def anonymous_bytes(process: int) -> int:
    """A process's anonymous memory now: files that are mapped belong to the page cache."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's anonymous memory")


def _serve(peer: ssl.SSLSocket, size: int, downs: int, ups: int, keep: Path | None) -> None:
    _send(peer, size * downs)
    _take(peer, size, ups, keep)
    peer.sendall(b".")
    peer.close()


def _child(root: str, port: str, size: str, downs: str, ups: str, streams: str, keep: str = "") -> None:
    context = ssl.create_default_context(cafile=root)

    def talk() -> None:
        raw = socket.create_connection(("127.0.0.1", int(port)))
        with context.wrap_socket(raw, server_hostname="localhost") as peer:
            _take(peer, int(size), int(downs) // int(streams), Path(keep) if keep else None)
            _send(peer, int(size) * (int(ups) // int(streams)))
            peer.recv(1)

    _in_threads([talk] * int(streams))


def _in_threads(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send(peer: ssl.SSLSocket, size: int) -> None:
    chunk = memoryview(bytes(CHUNK_BYTES))
    while size:
        part = chunk[: min(size, CHUNK_BYTES)]
        peer.sendall(part)
        size -= len(part)


def _take(peer: ssl.SSLSocket, size: int, files: int, keep: Path | None) -> None:
    for _ in range(files):
        if keep is None:
            buffer = memoryview(bytearray(CHUNK_BYTES))
            for count in _chunks(size):
                _fill(peer, buffer[:count])
        else:
            with tempfile.TemporaryFile(dir=keep) as file:
                _keep(peer, size, file.fileno())


def _keep(peer: ssl.SSLSocket, size: int, fd: int) -> None:
    received, empty = SimpleQueue[memoryview](), SimpleQueue[memoryview]()
    for _ in range(3):
        empty.put(memoryview(bytearray(CHUNK_BYTES)))

    def store() -> None:
        digest = hashlib.sha256()
        while part := received.get():
            os.write(fd, part)
            digest.update(part)
            empty.put(part)
        digest.digest()

    thread = threading.Thread(target=store)
    thread.start()
    for count in _chunks(size):
        part = empty.get()[:count]
        _fill(peer, part)
        received.put(part)
    received.put(memoryview(b""))
    thread.join()
    os.fsync(fd)


def _chunks(size: int) -> list[int]:
    return [CHUNK_BYTES] * (size // CHUNK_BYTES) + [size % CHUNK_BYTES] * bool(size % CHUNK_BYTES)


def _fill(peer: ssl.SSLSocket, buffer: memoryview) -> None:
    while buffer:
        got = peer.recv_into(buffer)
        if not got:
            raise ConnectionError("the other side ended early")
        buffer = buffer[got:]


if __name__ == "__main__":
    _child(*sys.argv[1:])
