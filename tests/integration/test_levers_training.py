"""Levers of local training, each against a plain loop of its paper's words: it does that, and nothing where it is off."""

from typing import Any

import numpy as np
import pytest
import torch

from cosilo_client.trainer.training import DeviceImages
from cosilo_common.diffusion.model import build_unet, load_vector, vector_blocks
from cosilo_common.diffusion.objective import loss_weights, noise_schedule
from cosilo_common.diffusion.specification import Training
from tests.integration.test_trainer_training import SCHEDULE, TINY, data, start, trained

__all__ = ["data", "start"]  # fixtures


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def anchored_loop(start: np.ndarray, data: DeviceImages, training: Training, seed: int = 99) -> np.ndarray:
    """Each image's loss plus mu times the distance from the global model's prediction, where its timestep is late enough."""
    unet, frozen = build_unet(TINY), build_unet(TINY)
    load_vector(unet, start)
    load_vector(frozen, start)
    optimiser = torch.optim.Adam(unet.parameters(), lr=training.learning_rate, fused=True)
    generator, noiser = torch.Generator().manual_seed(seed), noise_schedule(SCHEDULE)
    for batch in data.train[torch.randperm(len(data.train), generator=generator)].split(training.batch_size):
        timesteps = torch.randint(0, SCHEDULE.train_timesteps, (len(batch),), generator=generator)
        noise = torch.randn((len(batch), 1, 8, 8), generator=generator)
        images = data.images[batch].float() * (2.0 / 255) - 1.0
        noisy, target = noiser.add_noise(images, noise, timesteps), noiser.get_velocity(images, noise, timesteps)
        predicted = unet(noisy, timesteps, class_labels=data.labels[batch]).sample
        expected = frozen(noisy, timesteps, class_labels=data.labels[batch]).sample.detach()
        late = (timesteps >= training.anchor_from * 1000).float()
        loss = (predicted - target).square().mean((1, 2, 3)) + training.anchor_mu * late * (predicted - expected).square().mean((1, 2, 3))
        optimiser.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), training.max_grad_norm)
        optimiser.step()
    return np.concatenate(list(vector_blocks(unet)))


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_the_anchor_holds_late_timesteps_to_the_global_models_predictions(start: np.ndarray, data: DeviceImages, late: float) -> None:
    training = Training(batch_size=8, learning_rate=1e-2, anchor_mu=2.0, anchor_from=late)
    result, loop = trained(start, data, training), anchored_loop(start, data, training)
    free = trained(start, data, training.model_copy(update={"anchor_mu": 0.0}))
    # As a share of what was moved: Adam makes whole steps of gradients that are rounding alone, and another processor rounds otherwise.
    moved = float(np.linalg.norm(loop - start))
    assert np.linalg.norm(result - loop) < 1e-3 * moved
    assert np.linalg.norm(free - loop) > 0.1 * moved


def test_an_anchor_that_no_timestep_reaches_changes_no_bit(start: np.ndarray, data: DeviceImages) -> None:
    plain = Training(batch_size=8, learning_rate=1e-2)
    assert np.array_equal(
        trained(start, data, plain.model_copy(update={"anchor_mu": 5.0, "anchor_from": 0.9999})), trained(start, data, plain)
    )


def test_a_heavier_anchor_keeps_the_model_nearer(start: np.ndarray, data: DeviceImages) -> None:
    drifts = [
        float(np.linalg.norm(trained(start, data, Training(local_epochs=3, batch_size=8, anchor_mu=mu, learning_rate=1e-3)) - start))
        for mu in (0.0, 10.0)
    ]
    assert drifts[1] < drifts[0]


def test_the_anchor_does_not_depend_on_how_memory_splits_a_batch(start: np.ndarray, data: DeviceImages) -> None:
    training = Training(batch_size=10, learning_rate=1e-2, anchor_mu=2.0, anchor_from=0.3)
    whole = trained(start, data, training)
    assert np.linalg.norm(trained(start, data, training, micro_batch=3) - whole) < 1e-3 * np.linalg.norm(whole - start)


def test_fedprox_pulls_towards_the_global_weights(start: np.ndarray, data: DeviceImages) -> None:
    """Li et al., arXiv 1812.06127: the larger mu, the smaller the local change."""
    drifts = [
        float(np.linalg.norm(trained(start, data, Training(local_epochs=3, batch_size=8, proximal_mu=mu)) - start))
        for mu in (0.0, 1.0, 100.0)
    ]
    assert drifts[2] < drifts[1] < drifts[0]


def test_min_snr_weighs_as_its_paper_says() -> None:
    """Hang et al., arXiv 2303.09556: min(SNR, gamma) / SNR for the noise, / (SNR + 1) for the velocity."""
    for kind in ("epsilon", "v_prediction"):
        schedule = SCHEDULE.model_copy(update={"prediction_type": kind})
        noiser = noise_schedule(schedule)
        found = loss_weights(noiser, Training(loss_weighting="min_snr", min_snr_gamma=5.0))
        assert found is not None
        for timestep in (0, 250, 500, 998):
            signal = float(noiser.alphas_cumprod[timestep].double())
            snr = signal / (1 - signal)
            expected = min(snr, 5.0) / (snr if kind == "epsilon" else snr + 1)
            assert float(found[timestep]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"anchor_from": 0.3}, {"anchor_mu": -1.0}, {"anchor_mu": 1.0, "anchor_from": 1.0}, {"steps_per_epoch": 0}]
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Training.model_validate(wrong)
