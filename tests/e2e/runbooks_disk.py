"""A coordinator's disk that is full, typed from recover.md on a small file system of its own (a tmpfs).

Owns this step and that file system, which stays at the data folder until the target ends. Must not know what the checkpoints hold.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from cosilo_server.config import Limits
from tests.e2e.checklist import expect, wait_for
from tests.e2e.runbooks_federation import CONNECTED_S, RUN, RUN_PAGE, Stage
from tests.e2e.runbooks_pages import section_block, stands
from tests.federation.local import COORDINATOR

RECOVER, FULL = "recover.md", "A full disk"
SHORT = "... bytes needed, ... free, ... bytes missing"
KEPT_BEFORE, KEPT_AFTER = 5, 2  # checkpoints: by default, and by the page
ROOM_CHECKPOINTS = 6  # a round of four sites asks for ten times a checkpoint's weights: four uploads, their sum, a checkpoint of five files
ENOUGH_BYTES = 2 << 30


def full_disk(stage: Stage) -> None:
    """recover.md, A full disk: a round does not start and says the bytes; what is kept and why; fewer; and it goes on by itself."""
    admin, federation = stage.admin, stage.federation
    with stage.checks.check("recover.md: the disk is full: a round does not start, and says which bytes are missing"):
        if (more := KEPT_BEFORE - len(_kept(stage))) > 0:
            federation.run_rounds(RUN, more)
        by_hand = _kept(stage)[0]
        admin.runs(f"cosilo checkpoint keep {RUN} {by_hand}")
        before, weights_bytes = len(federation.rounds(RUN)), int(federation.checkpoints(RUN)[-1]["bytes"])
        federation.daemon(COORDINATOR).stop()
        _move_to_disk_with(federation.data, Limits().free_bytes_min + ROOM_CHECKPOINTS * weights_bytes)
        _start_again(stage)
        said = admin.runs(f"cosilo round start {RUN}", code=1)
        stands(RECOVER, SHORT, said)
        stands(RUN_PAGE, SHORT, said)
        stands(RECOVER, "they stay asked for", said)
        wait_for(
            lambda: "bytes missing" in _note(stage), "cosilo run list says why the run stands still", CONNECTED_S, lambda: _note(stage)
        )
        expect(len(federation.rounds(RUN)) == before, "a round began though there is no room for it")
    with stage.checks.check("recover.md: fewer checkpoints are kept, and what was asked for goes on by itself"):
        said = admin.types(RECOVER, FULL, 0, {"RUN 40": f"{RUN} {by_hand}", "RUN": RUN}, part="admin: what is kept, and why")
        expect("kept by hand" in said and f"last {KEPT_BEFORE}" in said and "is left to the retention policy" in said, said)
        federation.daemon(COORDINATOR).stop()
        with federation.config(COORDINATOR).open("a", encoding="utf-8") as file:
            file.write("\n" + section_block(RECOVER, FULL, 0, "toml"))
        _start_again(stage)
        federation.wait_idle(RUN)
        rounds = federation.rounds(RUN)
        expect(len(rounds) == before + 1 and rounds[-1]["phase"] == "closed", f"{rounds[before:]}")
        expect(sorted(rounds[-1]["survivors"]) == sorted(stage.members), f"{rounds[-1]}")
        expect(_kept(stage) == [entry["round"] for entry in federation.checkpoints(RUN)][-KEPT_AFTER:], f"kept: {_kept(stage)}")
        there = sum(path.stat().st_size for path in (federation.data / "artifacts").iterdir() if path.is_file())
        said_bytes = federation.metric(COORDINATOR, "cosilo_artifacts_bytes")
        expect(there == said_bytes, f"cosilo_artifacts_bytes is {said_bytes:.0f}, and the files have {there}")
        _mount("remount", federation.data, ENOUGH_BYTES)


def put_away(root: Path) -> None:
    """Unmounts whatever file system lies below a folder, so that it can be deleted."""
    mounted = [line.split(" ")[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for place in reversed(mounted):
        if place.startswith(f"{root.resolve()}/"):
            subprocess.run(["umount", place], check=False)


def _move_to_disk_with(folder: Path, free_bytes: int) -> None:
    """The folder's content, on a file system that then has so much free. Nobody may use the folder meanwhile."""
    before = folder.with_name(f"{folder.name}.before")
    folder.rename(before)
    folder.mkdir(mode=0o700)
    _mount("mode=0700", folder, ENOUGH_BYTES)
    shutil.copytree(before, folder, dirs_exist_ok=True)
    free = os.statvfs(folder)
    _mount("remount", folder, (free.f_blocks - free.f_bfree) * free.f_frsize + free_bytes)


def _mount(how: str, folder: Path, size_bytes: int) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"{how},size={size_bytes}", "cosilo-runbooks", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    expect(done.returncode == 0, f"{done.stderr}type it as root, or in a namespace where you may mount: unshare --map-root-user --mount")


def _start_again(stage: Stage) -> None:
    stage.federation.start_again(COORDINATOR)
    wait_for(stage.answers, "the coordinator answers", CONNECTED_S)
    stage.wait_connected()


def _kept(stage: Stage) -> list[int]:
    """The rounds whose checkpoints are there, oldest first."""
    return [entry["round"] for entry in stage.federation.checkpoints(RUN) if entry["retired_unix_s"] is None]


def _note(stage: Stage) -> str:
    """What cosilo run list says of the run."""
    return next(str(run["note"]) for run in stage.federation.cosilo_json("run", "list")["runs"] if run["name"] == RUN)
