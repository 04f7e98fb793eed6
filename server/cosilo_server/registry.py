"""Runs from their manifests, and sample grids from their checkpoints: work that ends in an artifact. Must not know protobuf."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass

import structlog

from cosilo_common.canonical import sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.diffusion.lora import require_peft
from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import Role
from cosilo_common.manifest import Manifest, verify_manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.transfer import file_digest, require_free_bytes
from cosilo_server.aggregation import aggregation_of
from cosilo_server.artifacts import Artifacts
from cosilo_server.closing import untrained_checkpoint
from cosilo_server.conductor import Conductor
from cosilo_server.evaluation import Evaluation
from cosilo_server.membership import StoredMembers
from cosilo_server.store import Store, StoredCheckpoint
from cosilo_server.warm_start import check_named, named_weights

log = structlog.get_logger(__name__)

_FLOAT_BYTES = 4
_CHECKPOINT_FILES = 4  # weights, ema and two moments at most


@dataclass(frozen=True)
class DrawnGrid:
    """A sample grid: the artifact's 32-byte digest, its length, and the round of its checkpoint."""

    digest: bytes
    bytes: int
    round: int


class RunRegistry:
    """Takes runs in and draws from them, for one coordinator. images_max: of one grid."""

    def __init__(
        self,
        store: Store,
        artifacts: Artifacts,
        evaluation: Evaluation,
        conductor: Conductor,
        members: StoredMembers,
        federation: str,
        images_max: int,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._evaluation = evaluation
        self._conductor = conductor
        self._members = members
        self._federation = federation
        self._images_max = images_max
        self._one_at_a_time = asyncio.Lock()

    async def create(self, data: bytes, signature: bytes, caller: str) -> bytes:
        """Stores a signed manifest as a run with its untrained checkpoint; of a run that stands it is the new signature, where its signer is
        no admin any more, and else nothing.

        Returns the run. Raises CosiloError where the signature is not the caller's, a participant is no member with that key, or there is no room.
        """
        admins = {name: key for name, key in self._members.newest().admins().items() if name == caller}
        manifest, signer = verify_manifest(data, signature, admins, self._federation)
        run = sha256(data)
        async with self._one_at_a_time:
            if self._conductor.manifest(run) is None:
                self._check_participants(manifest)
                await self._store_run(run, data, manifest, signature, signer)
            else:
                await asyncio.to_thread(self._sign_again, run, data, signature, signer)
        return run

    async def sample(self, run: bytes, wanted: int | None, raw: bool, per_class: int, steps: int, seed: int) -> DrawnGrid:
        """Draws a grid, a row a class, from a checkpoint (wanted: its round, None for the newest). Raises CosiloError."""
        manifest = self._conductor.manifest(run)
        if manifest is None:
            raise CosiloError("sample", f"no run {run.hex()[:12]} is known", "list them with `cosilo run list`")
        count = per_class * manifest.architecture.num_classes
        if count > self._images_max:
            raise CosiloError("sample", f"{count} images are more than {self._images_max}", "ask for fewer a class")
        if steps > manifest.schedule.train_timesteps:
            raise CosiloError("sample", f"{steps} steps are more than the schedule's {manifest.schedule.train_timesteps}", "ask for fewer")
        found = await asyncio.to_thread(self._checkpoint, run, wanted)
        digest = (found.weights if raw or not found.ema else found.ema).hex()
        with ExitStack() as files:
            weights, path = files.enter_context(self._artifacts.lease(digest)), files.enter_context(self._artifacts.scratch(".png"))
            base = None if manifest.lora is None else files.enter_context(self._artifacts.lease(manifest.lora.base))
            await self._evaluation.sample(manifest, weights, path, per_class, steps, seed, base)
            size = path.stat().st_size
            png = await asyncio.to_thread(self._artifacts.put_file, path)
        await asyncio.to_thread(self._store.add_grid, run, found.round, bytes.fromhex(png))
        self._conductor.announce()
        return DrawnGrid(bytes.fromhex(png), size, found.round)

    def _check_participants(self, manifest: Manifest) -> None:
        members = self._members.newest()
        for name, key in manifest.participant_keys().items():
            entry = members.member(name)
            if entry is None or entry.role is not Role.SITE or entry.key != key:
                raise CosiloError(
                    "create run", f"participant {name} is no member site with that key", "compare `cosilo members` with the manifest"
                )

    def _sign_again(self, run: bytes, data: bytes, signature: bytes, signer: str) -> None:
        stored = self._store.run(run)
        assert stored is not None  # the conductor has it
        try:
            verify_manifest(data, stored.signature, self._members.newest().admins(), self._federation)
        except CosiloError:  # nobody in today's list vouches for it
            self._store.sign_run(run, signature, signer)
            log.info("run signed again", run=run.hex(), signer=signer, before=stored.signer)

    async def _store_run(self, run: bytes, data: bytes, manifest: Manifest, signature: bytes, signer: str) -> None:
        if manifest.lora is not None:
            require_peft("create run", "cosilo-server")
        size, base_bytes = manifest.tensor_table.size, 0 if manifest.lora is None else manifest.lora.base_bytes
        require_free_bytes(self._artifacts.root, _FLOAT_BYTES * _CHECKPOINT_FILES * size + base_bytes)
        base = await self._keep_base(manifest)
        with self._artifacts.scratch(".safetensors") as path:
            if manifest.warm_start is None:
                await self._evaluation.initial_weights(manifest, path)
            else:
                with named_weights(self._artifacts, manifest.warm_start.sha256) as source:
                    await self._evaluation.initial_weights(manifest, path, source)
                check_named(manifest.warm_start.sha256, await asyncio.to_thread(file_digest, path))
            weights = await asyncio.to_thread(self._artifacts.put_file, path)
        encoding = round_encoding(manifest, RoundKind.TRAIN)
        aggregation = aggregation_of(manifest, self._artifacts, encoding)
        checkpoint = await asyncio.to_thread(aggregation.initial, weights)
        apart = bool(manifest.ema_decay) or manifest.training.control_variates  # the model for people is not what sites fetch
        first = untrained_checkpoint(run, checkpoint, self._artifacts.size(checkpoint.weights), apart, time.time())
        await asyncio.to_thread(self._store.add_run, run, data, signature, signer, first, base)
        stored = await asyncio.to_thread(self._store.run, run)
        assert stored is not None  # it was just added
        await self._conductor.adopt(stored)
        log.info("run created", run=run.hex(), name=manifest.name, parameters=size, aggregation=manifest.aggregation)

    async def _keep_base(self, manifest: Manifest) -> bytes:
        """Stores what a run's adapters stand on, checked, as an artifact; its digest (32 bytes), or none."""
        terms = manifest.lora
        if terms is None:
            return b""
        with named_weights(self._artifacts, terms.base) as source, self._artifacts.scratch(".safetensors") as path:
            await self._evaluation.base_weights(manifest, source, path)
            check_named(terms.base, await asyncio.to_thread(file_digest, path))
            if (size := path.stat().st_size) != terms.base_bytes:
                raise CosiloError(
                    "create run", f"lora.base_bytes is {terms.base_bytes}, the base has {size} bytes", "create it with `cosilo`"
                )
            return bytes.fromhex(await asyncio.to_thread(self._artifacts.put_file, path))

    def _checkpoint(self, run: bytes, wanted: int | None) -> StoredCheckpoint:
        if wanted is None:
            newest = self._store.newest_checkpoint(run)
            assert newest is not None  # a run is stored together with its untrained checkpoint
            return newest
        found = [c for c in self._store.checkpoints(run) if c.round == wanted]
        if not found:
            raise CosiloError("sample", f"round {wanted} made no checkpoint", "list them with `cosilo checkpoint list`")
        if wanted in self._store.shelf.retired(run):
            raise CosiloError(
                "sample", f"the checkpoint of round {wanted} was retired by policy", "choose one that `cosilo checkpoint list` says is kept"
            )
        return found[0]
