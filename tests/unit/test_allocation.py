"""The allocator's settings: what is freed on many threads is used again, and is given back when asked for."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

# Chunks made and freed on 24 threads, one thread after the other, so that no more than 8 MiB are ever in use.
PROGRAM: Final = """
import re, sys, threading
from pathlib import Path
from cosilo_common.allocation import allocate_for_chunks, give_back

def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def work():
    chunks = [bytearray(1 << 20) for _ in range(8)]
    small = [bytes(50_000) for _ in range(8)]
    done.wait()

assert allocate_for_chunks()
before = anonymous_bytes()
done = threading.Event()
done.set()
for _ in range(24):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
held = anonymous_bytes() - before
give_back()
print(held, anonymous_bytes() - before)
"""


def test_memory_freed_on_many_threads_is_one_heap_s_and_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    held, after = map(int, done.stdout.split())
    assert held < 48 << 20
    assert after < 4 << 20
