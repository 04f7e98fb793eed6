"""Starts the worker process for work that needs torch, one at a time, and reports its refusals. Must not import torch."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest

WORKER_TIMEOUT_S = 1800.0  # a grid of 1,000 images of a 36 million parameter model takes minutes on two cores
STDERR_BYTES_MAX = 64 << 10


class Evaluation:
    """The coordinator's own torch work. threads: CPU threads that a worker may use."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._one_at_a_time = asyncio.Semaphore(1)

    async def initial_weights(self, manifest: Manifest, out: Path, source: Path | None = None) -> None:
        """Writes the run's first weights: source's, or untrained ones.

        Raises CosiloError where the manifest's tensors are not its architecture's, or source's are not the manifest's.
        """
        await self._run(
            {
                "task": "initial",
                "architecture": manifest.architecture.model_dump(mode="json"),
                "tensors": manifest.tensor_table.to_plain(),
                "lora": _lora(manifest),
                "seed": manifest.training.seed,
                "source": str(source) if source else "",
                "out": str(out),
            }
        )

    async def base_weights(self, manifest: Manifest, source: Path, out: Path) -> None:
        """Writes what a run's adapters stand on again. Raises CosiloError where source's tensors are not the architecture's."""
        architecture = manifest.architecture.model_dump(mode="json")
        await self._run({"task": "base", "architecture": architecture, "source": str(source), "out": str(out)})

    async def sample(
        self, manifest: Manifest, weights: Path, out: Path, per_class: int, steps: int, seed: int, base: Path | None = None
    ) -> None:
        """Writes a PNG grid, a row a class. steps: 0 for the manifest's. base: of a run of adapters."""
        sampling = manifest.sampling.model_dump(mode="json")
        await self._run(
            {
                "task": "sample",
                "architecture": manifest.architecture.model_dump(mode="json"),
                "schedule": manifest.schedule.model_dump(mode="json"),
                "sampling": {**sampling, "steps": steps or sampling["steps"]},
                "weights": str(weights),
                "lora": _lora(manifest),
                "base": str(base) if base else "",
                "per_class": per_class,
                "seed": seed,
                "out": str(out),
            }
        )

    async def _run(self, job: dict[str, object]) -> None:
        async with self._one_at_a_time:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cosilo_server.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                body = json.dumps({**job, "threads": self._threads}).encode()
                _, errors = await asyncio.wait_for(process.communicate(body), WORKER_TIMEOUT_S)
            except TimeoutError:
                raise CosiloError(str(job["task"]), f"the worker took longer than {WORKER_TIMEOUT_S:.0f} s") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode:
            raise refusal(str(job["task"]), process.returncode, errors[-STDERR_BYTES_MAX:])


def _lora(manifest: Manifest) -> dict[str, object] | None:
    return None if manifest.lora is None else manifest.lora.model_dump(mode="json")


def refusal(task: str, returncode: int, errors: bytes) -> CosiloError:
    """What a worker that ended so has said on standard error."""
    last = errors.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
    try:
        said = json.loads(last)
        return CosiloError(said["operation"], said["subject"], said["hint"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return CosiloError(task, f"the worker process ended with {returncode}: {last[:200]}", "see the coordinator's log")
