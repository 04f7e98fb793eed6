"""How a daemon's allocator treats chunks: one arena, no mapping anew for each of them.

Owns the settings of glibc's malloc, made once when a daemon starts. Must not know what is allocated. Elsewhere (musl, macOS) nothing is set.

Chunks of 1 MiB come and go on a dozen threads, gRPC's own among them. By default each thread has an arena of its own that keeps what it freed,
so an idle coordinator's memory grew with its sites; and each chunk above the mapping threshold is mapped, faulted in page by page, and given
back, which was a third of a sender's processor time (bench/README.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

ARENAS: Final = 1  # what one thread freed, any other uses again; chunks are copied far longer than the arena's lock is held
MAPPED_BYTES_MIN: Final = 32 << 20  # the largest that glibc takes: chunks come from the heap, whose pages stay
TRIM_BYTES: Final = 32 << 20  # free at the heap's end beyond which it is given back: a few streams' windows

_M_TRIM_THRESHOLD: Final = -1  # names and numbers of malloc.h
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8


def allocate_for_chunks() -> bool:
    """Sets the allocator of this process; False where it is not glibc's. Call it before threads start."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, ARENAS), (_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN), (_M_TRIM_THRESHOLD, TRIM_BYTES))
    taken = {mallopt(name, value) for name, value in settings}
    return taken == {1}


def give_back() -> None:
    """Gives free pages back to the system, wherever in the heap they lie. Takes milliseconds; blocks allocation meanwhile."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _glibc(name: str) -> Callable[..., int] | None:
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    function: Callable[..., int] = library[name]
    return function
