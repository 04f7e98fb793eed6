"""Runs inside the unit's sandbox in place of the daemon: tries what the daemon may and may not do, and prints one JSON object.

Standard library only, and no import of Cosilo. Each answer is "done" or the error's symbolic name.
"""

import ctypes
import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

CLONE_NEWUSER = 0x10000000


def attempt(act: Callable[[], object]) -> str:
    """How a system call went."""
    try:
        act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def unshare() -> None:
    """unshare(2) a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")


def main(state: Path, data: Path) -> None:
    """state, data: the daemon's own folder and the images."""
    image = next(data.glob("*/*.png"))
    print(
        json.dumps(
            {
                "user": os.getuid(),
                "capabilities": next(
                    line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
                ),
                "read an image": attempt(image.read_bytes),
                "write beside it": attempt(lambda: (data / "new").write_bytes(b"")),
                "overwrite it": attempt(lambda: image.write_bytes(b"")),
                "write its state": attempt(lambda: (state / "probe").write_bytes(b"")),
                "write /etc": attempt(lambda: Path("/etc/new").write_bytes(b"")),
                "write its configuration": attempt(lambda: Path("/etc/cosilo/new").write_bytes(b"")),
                "write the program": attempt(lambda: (Path(sys.executable).parent / "new").write_bytes(b"")),
                "entries of /home": len(list(Path("/home").iterdir())),
                "processes seen": sorted({int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()} - {os.getpid()}),
                "open the GPU's control device": attempt(lambda: os.close(os.open("/dev/nvidiactl", os.O_RDWR))),
                "open the GPU": attempt(lambda: os.close(os.open("/dev/nvidia0", os.O_RDWR))),
                "open another device": attempt(lambda: os.close(os.open("/dev/other", os.O_RDWR))),
                "open a raw socket": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
                "open a TCP socket": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()),
                "make a user namespace": attempt(unshare),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
