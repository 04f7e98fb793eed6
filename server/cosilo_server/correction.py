"""Has the worker process correct a round's average while its sum is opened, and ends that process with the daemon.

Owns the process and its time limit. Must not import torch, nor know sites or the store. Blocks: it is called in the thread that opens the sum.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest
from cosilo_common.transfer import require_free_bytes
from cosilo_server.evaluation import STDERR_BYTES_MAX, refusal

CORRECTION_TIMEOUT_S: Final = 900.0  # as long as a site's patience in opening is free; a model that needs more wants fewer steps or samples
STOP_NOTICE_S: Final = 60.0  # twice what the daemon's own stop may take: who stops a unit signals its worker in the same moment
_SIGNALLED: Final = frozenset({-signal.SIGTERM, -signal.SIGINT})
_OPERATION: Final = "correct the average"


class CorrectionStopped(Exception):
    """The daemon is on its way out: the next process opens this sum again, and corrects it from the same files."""


class Corrector:
    """The coordinator's corrections. threads: of the worker's; a change of it changes last bits. timeout_s: of one correction."""

    def __init__(self, threads: int = 2, timeout_s: float = CORRECTION_TIMEOUT_S) -> None:
        self._threads, self._timeout_s = threads, timeout_s
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()

    def correct(self, manifest: Manifest, round_number: int, weights: Path, drawer: Path) -> None:
        """Replaces `weights`, the round's stepped average, by what training on drawer's images makes of it; drawer: may be the same file.

        Raises CosiloError or OSError where it cannot, the file then being what it was; CorrectionStopped after `stop`.
        """
        require_free_bytes(weights.parent, weights.stat().st_size)
        out = weights.with_name(
            weights.name + ".corrected"
        )  # beside it, on one disk; a start of the coordinator clears what was left there
        try:
            self._run(
                {
                    "task": "correct",
                    **{
                        name: getattr(manifest, name).model_dump(mode="json")
                        for name in ("architecture", "schedule", "training", "sampling")
                    },
                    "correction": manifest.correction.model_dump(mode="json") if manifest.correction else {},
                    "round": round_number,
                    "weights": str(weights),
                    "drawer": str(drawer),
                    "out": str(out),
                    "threads": self._threads,
                    "parent": os.getpid(),
                }
            )
            out.replace(weights)
        finally:
            out.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends what is running. Nobody must wait for its outcome any more."""
        self._stopping.set()
        with self._lock:
            for process in self._running:
                process.kill()

    def _run(self, job: dict[str, object]) -> None:
        with self._lock:
            if self._stopping.is_set():
                raise CorrectionStopped
            process = subprocess.Popen(
                [sys.executable, "-m", "cosilo_server.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._running.add(process)
        try:
            _, errors = process.communicate(json.dumps(job).encode(), timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            raise CosiloError(
                _OPERATION, f"it took longer than {self._timeout_s:.0f} s", "name fewer samples or steps in a new run"
            ) from None
        finally:
            process.kill()
            process.wait()
            with self._lock:
                self._running.discard(process)
        if process.returncode and (self._stopping.is_set() or (process.returncode in _SIGNALLED and self._stopping.wait(STOP_NOTICE_S))):
            raise CorrectionStopped
        if process.returncode:
            raise refusal(_OPERATION, process.returncode, errors[-STDERR_BYTES_MAX:])
