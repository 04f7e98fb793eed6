"""SCAFFOLD (arXiv 1910.06378): a site's corrected steps, its next control variate, and what the coordinator makes of their sum."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cosilo_client.data import DataConfig
from cosilo_client.masking import Vector, write_spool
from cosilo_client.trainer.control import ControlVariates
from cosilo_client.trainer.jobs import TrainJob
from cosilo_client.trainer.training import DeviceImages, train
from cosilo_client.trainer.workshop import Workshop
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, ordered_parameters, tensor_table, vector_blocks
from cosilo_common.diffusion.objective import noise_schedule, per_image_loss
from cosilo_common.diffusion.parts import Split, split_of
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Training
from cosilo_common.encoding import Encoding, Section
from cosilo_common.manifest import PLAIN_AGGREGATION, ServerOptimiserTerms
from cosilo_common.secagg.keys import Secret
from cosilo_common.weights import BLOCK_WORDS, TensorTable, open_vector, write_weights
from cosilo_server.aggregation import Aggregation
from cosilo_server.artifacts import Artifacts
from cosilo_server.secagg import SumOpening
from tests.integration.memory_rounds import manifest_of
from tests.integration.test_trainer_training import ALONE, SCHEDULE, TINY, data, start
from tests.unit.test_aggregation import CAP, CLIP, Site, opening_of

__all__ = ["data", "start"]  # fixtures

TABLE = TensorTable.of([("a", (7,)), ("b", (BLOCK_WORDS + 5,)), ("c", (3, 11)), ("d", (4,))])
SITES = ("anna", "beda", "clara", "dora")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def round_of(
    start: np.ndarray, data: DeviceImages, training: Training, server: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(y_i, the next c_i)."""
    unet = build_unet(TINY)
    load_vector(unet, start)
    control = ControlVariates(unet, tensor_table(TINY), server, own)
    train(unet, data, SCHEDULE, training, 99, None, ALONE, lambda progress: None, control)
    return np.concatenate(list(vector_blocks(unet))), np.concatenate(list(control.own_next()))


def variates(start: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.05, size=start.size).astype(np.float32)


def test_steps_are_corrected_and_the_next_control_variate_is_option_two(start: np.ndarray, data: DeviceImages) -> None:
    rate, steps = 0.05, 5
    training = Training(optimiser="sgd", learning_rate=rate, batch_size=4, max_grad_norm=0.0)
    c, c_i = variates(start, 1), variates(start, 2)
    y, c_next = round_of(start, data, training, c, c_i)

    # Algorithm 1, line 10: y <- y - lr (g(y) - c_i + c), written out.
    unet = build_unet(TINY)
    load_vector(unet, start)
    generator, noiser = torch.Generator().manual_seed(99), noise_schedule(SCHEDULE)
    for batch in data.train[torch.randperm(len(data.train), generator=generator)].split(4):
        timesteps = torch.randint(0, SCHEDULE.train_timesteps, (len(batch),), generator=generator)
        noise = torch.randn((len(batch), 1, 8, 8), generator=generator)
        images = data.images[batch].float() * (2.0 / 255) - 1.0
        unet.zero_grad()
        per_image_loss(unet, noiser, images, data.labels[batch], timesteps, noise).mean().backward()
        gradient = np.concatenate([parameter.grad.ravel().numpy() for _, parameter in ordered_parameters(unet)])
        load_vector(unet, np.concatenate(list(vector_blocks(unet))) - np.float32(rate) * (gradient - c_i + c))
    expected = np.concatenate(list(vector_blocks(unet)))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)

    # Line 12, option II: c_i+ = c_i - c + (x - y) / (K lr).
    option_two = c_i.astype(np.float64) - c + (start.astype(np.float64) - y) / (steps * rate)
    np.testing.assert_allclose(c_next, option_two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_equal_control_variates_correct_nothing(start: np.ndarray, data: DeviceImages, optimiser: str) -> None:
    training = Training.model_validate({"optimiser": optimiser, "learning_rate": 1e-3, "batch_size": 4})
    both = variates(start, 3)
    corrected, _ = round_of(start, data, training, both, both)
    unet = build_unet(TINY)
    load_vector(unet, start)
    train(unet, data, SCHEDULE, training, 99, None, ALONE, lambda progress: None)
    assert np.array_equal(corrected, np.concatenate(list(vector_blocks(unet))))


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("personal", [frozenset[str](), frozenset({"c"})])
def test_the_coordinator_moves_c_by_the_share_of_sites_and_the_model_as_without(
    tmp_path: Path, personal: frozenset[str], ema: float
) -> None:
    split, plain = Split(TABLE, personal, controlled=True), Split(TABLE, personal)
    size, random, artifacts = plain.summed_size, np.random.default_rng(0), Artifacts(tmp_path)
    before = random.normal(size=TABLE.size).astype(np.float32)
    updates = [random.normal(scale=0.05, size=2 * size).astype(np.float32) for _ in range(3)]
    shares = [100, 200, 400]
    encodings = [Encoding(32, 4, CAP, (Section(size, CLIP),) * times, loss_max=16.0, losses=1) for times in (2, 1)]
    with artifacts.scratch() as path:
        write_weights(path, TABLE, [before])
        digest = artifacts.put_file(path)
    made = []
    for encoding, controlled, width in zip(encodings, (True, False), (2 * size, size), strict=True):
        run = Aggregation(artifacts, TABLE, encoding, ServerOptimiserTerms(kind="fedavgm"), ema, personal, controlled)
        sites = {f"s{i}": Site(encoding, update[:width], share) for i, (update, share) in enumerate(zip(updates, shares, strict=True))}
        checkpoint = run.initial(digest)
        for _ in range(2):
            aggregate = run.train(checkpoint, opening_of(encoding, sites))
            checkpoint = aggregate.checkpoint
        made.append((checkpoint, aggregate))
    (controlled_checkpoint, aggregate), (without, other) = made
    fetched = open_vector(artifacts.path(controlled_checkpoint.weights), split.base_table)
    assert np.array_equal(fetched[: TABLE.size], open_vector(artifacts.path(without.weights), TABLE))
    assert (controlled_checkpoint.optimiser, aggregate.update_norm) == (without.optimiser, other.update_norm)
    assert controlled_checkpoint.ema == (without.ema if ema else without.weights)  # the model itself, for people
    mean = np.average(np.array(updates, np.float64)[:, size:], axis=0, weights=shares)
    np.testing.assert_allclose(fetched[TABLE.size :], 2 * 3 / 4 * mean, rtol=0, atol=1e-6)  # two rounds, three of four sites


def test_manifests_say_so_or_are_refused() -> None:
    recipe = preset("digits")
    training = recipe.training.model_copy(update={"control_variates": True})
    values = {"architecture": recipe.architecture, "schedule": recipe.schedule, "training": training, "sampling": recipe.sampling}
    values["tensors"] = tensor_table(recipe.architecture).entries
    manifest = manifest_of(SITES, aggregation=PLAIN_AGGREGATION, f=0, **values)
    size = manifest.tensor_table.size
    assert (manifest.split.summed_size, manifest.split.base_table.size) == (2 * size, 2 * size)
    assert manifest.split.base_table.entries[: len(manifest.tensors)] == manifest.tensor_table.entries
    with pytest.raises(ValueError, match=r"control_variates need encoding.bits = 32"):
        manifest_of(SITES, aggregation=PLAIN_AGGREGATION, f=0, encoding={"bits": 24, "cap": 64}, **values)


@pytest.mark.parametrize("parts", [(), ("norms", "class_embedding")], ids=["whole", "personal"])
def test_from_the_sites_images_to_the_next_model_c_is_the_mean_of_what_the_sites_keep(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Trainer, spool, opening and step of three uneven sites over two rounds, in one process and without masks."""
    training = Training(optimiser="sgd", learning_rate=0.05, steps_per_epoch=3, control_variates=True, personal=parts)
    split, artifacts = split_of(tensor_table(TINY), TINY, parts, controlled=True), Artifacts(tmp_path / "artifacts")
    assert split.kept_table is not None
    size = split.shared_table.size
    encoding = Encoding(32, 3, 1024, (Section(size, 1.0),) * 2, loss_max=16.0, losses=training.loss_buckets + 1)
    run = Aggregation(artifacts, split.table, encoding, ServerOptimiserTerms(), 0.0, split.personal, True)
    with artifacts.scratch() as path:
        write_weights(path, split.table, [tensor.numpy().ravel() for tensor in initial_state(TINY, 1).values()])
        checkpoint = run.initial(artifacts.put_file(path))
    for site, images in enumerate((40, 20, 60)):
        (tmp_path / f"mine-{site}").write_text("\n".join(str(1000 * (site == 2) + 100 * site + k) for k in range(images)))
    workshop, shares = Workshop(ALONE), []
    for number in (1, 2):
        uploads, kept = {}, []
        for site in range(3):
            before, after = (tmp_path / f"kept-{site}-{n}.safetensors" for n in (number - 1, number))
            job = TrainJob(
                weights=artifacts.path(checkpoint.weights),
                update=tmp_path / "update",
                architecture=TINY,
                schedule=SCHEDULE,
                training=training,
                data=DataConfig(kind="digits", index_file=tmp_path / f"mine-{site}"),
                personal=before if number > 1 else None,
                keep_personal=after,
                seed=10 * number + site,
                threads=1,
            )
            result = workshop.perform(job, lambda progress: None)
            spool = tmp_path / f"spool-{site}"
            vector = Vector(job.update, 0, result.weight, (*result.heldout_losses, result.train_loss))
            upload = write_spool(spool, encoding, (), vector, Secret(bytes([site + 1]) * 32))
            uploads[f"site-{site}"] = (spool.read_bytes(), upload.digest)
            kept.append((result.weight, np.array(open_vector(after, split.kept_table))))
            assert after.stat().st_mode & 0o777 == 0o600
        sources = {name: reader_of(data) for name, (data, _) in uploads.items()}
        opening = SumOpening(encoding, sources, {name: digest for name, (_, digest) in uploads.items()})
        before_model = np.array(open_vector(artifacts.path(checkpoint.ema), split.table))
        checkpoint = run.train(checkpoint, opening).checkpoint
        fetched = open_vector(artifacts.path(checkpoint.weights), split.base_table)
        shares = [weight for weight, _ in kept]
        mean = np.average([own[-size:] for _, own in kept], axis=0, weights=shares)
        np.testing.assert_allclose(fetched[split.table.size :], mean, rtol=0, atol=1e-6)
        moved = fetched[: split.table.size] != before_model
        assert all(not moved[place].any() for place in split.personal_runs)
        assert np.concatenate([moved[place] for place in split.shared_runs]).mean() > 0.5
    assert shares == [36, 18, 54]


def reader_of(data: bytes) -> Callable[[int, memoryview], None]:
    def read(offset: int, buffer: memoryview) -> None:
        buffer[:] = data[offset : offset + len(buffer)]

    return read
