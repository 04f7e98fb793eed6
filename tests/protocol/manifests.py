"""A small whole manifest for tests."""

from __future__ import annotations

from cosilo_common.diffusion.presets import preset
from cosilo_common.manifest import Manifest, Participant


def a_manifest(participants: tuple[Participant, ...]) -> Manifest:
    """The digits recipe with a tensor table of two small tensors."""
    recipe = preset("digits")
    return Manifest(
        name="a test",
        federation="test",
        nonce="00" * 16,
        participants=participants,
        architecture=recipe.architecture,
        schedule=recipe.schedule,
        training=recipe.training,
        sampling=recipe.sampling,
        tensors=(("bias", (4,)), ("weight", (4, 3))),
    )
