"""What `make e2e-systemd` makes its machines of: a wheelhouse for each half, what comes before or after it, and a base image.

Owns the cache that COSILO_E2E_CACHE names. Must not know machines, nor what is done to them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tests.e2e.checklist import expect

ROOT = Path(__file__).resolve().parents[2]
BASE_PACKAGES = "systemd,systemd-sysv,dbus,sudo,curl"
BUILD_S = 900.0


class Wheelhouses(NamedTuple):
    """By kind of machine: what is installed first, and what it is upgraded to."""

    first: Mapping[str, Path]
    newer: Mapping[str, Path]

    def digest(self, kind: str, *, newer: bool = False) -> str:
        """Of requirements.txt, as its maker reads it out."""
        return hashlib.sha256(((self.newer if newer else self.first)[kind] / "requirements.txt").read_bytes()).hexdigest()


def wheelhouses(root: Path, cache: Path) -> dict[str, Path]:
    """One for each kind of machine; other people's wheels come from the cache where constraints.txt is the same."""
    # The build of torch that this environment has: where it is a CPU's, gigabytes for a GPU that nobody has here are not fetched.
    torch = f"torch=={version('torch')}"
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes() + torch.encode()).hexdigest()[:16]
    known = cache / f"wheels-{sys.version_info.major}.{sys.version_info.minor}-{digest}"
    found = {}
    for kind in ("site", "coordinator"):
        out = root / kind
        wheels = ["--find-links", str(known), *(["--no-index"] if (known / kind).exists() else [])]
        command = [str(ROOT / "deploy/airgap/wheelhouse"), "--for", kind, "--out", str(out), "--python", sys.executable]
        known.mkdir(parents=True, exist_ok=True)
        _build([*command, "--", *wheels, torch])
        expect(not list(out.glob("nvidia*")), "libraries for GPUs came with torch: put its CPU build into PIP_FIND_LINKS")
        for wheel in out.glob("*.whl"):
            if not wheel.name.startswith("cosilo") and not (known / wheel.name).exists():
                shutil.copy(wheel, known / f"{wheel.name}.part")
                (known / f"{wheel.name}.part").rename(known / wheel.name)
        (known / kind).touch()
        found[kind] = out
    return found


def to_install(root: Path, built: dict[str, Path]) -> Wheelhouses:
    """What was built, and what comes before or after it."""
    older = os.environ.get("COSILO_E2E_OLDER")
    if older:
        return Wheelhouses({kind: Path(older).resolve() / kind for kind in built}, built)
    newer = {}
    for kind, wheelhouse in built.items():
        newer[kind] = root / "newer" / kind
        shutil.copytree(wheelhouse, newer[kind], copy_function=os.link)
        listed = newer[kind] / "requirements.txt"
        text = listed.read_text(encoding="utf-8")
        listed.unlink()  # it is a link to the other's
        listed.write_text(f"{text}# the next release\n", encoding="utf-8")
    return Wheelhouses(built, newer)


def base_image(cache: Path, scratch: Path) -> Path:
    out = cache / f"base-{hashlib.sha256(BASE_PACKAGES.encode()).hexdigest()[:16]}.tar"
    _build([str(ROOT / "deploy/airgap/base-image"), "--out", str(out), "--include", BASE_PACKAGES], TMPDIR=str(scratch))
    return out


def _build(command: list[str], **environment: str) -> None:
    surroundings = {**os.environ, **environment}
    done = subprocess.run(command, env=surroundings, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_S, check=False)
    expect(done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    print("        " + done.stdout.strip().replace("\n", "\n        "), flush=True)
