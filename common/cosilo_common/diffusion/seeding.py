"""Which random numbers a site draws in a round, so that its update can be repeated bit for bit on a CPU.

Owns the seed's derivation only; must not know torch. The convention of one round at one site, all from ONE CPU
torch.Generator seeded by `site_seed`, is:

1. each epoch: `order = torch.randperm(n, generator=g)` over the n training images in the split's order; batches are
   consecutive slices of batch_size, the last one short; or, with steps_per_epoch, so many slices of sizes that differ by one at most, the
   larger ones first;
2. each batch of b images, in this order: `t = torch.randint(0, train_timesteps, (b,), generator=g)`, then
   `noise = torch.randn((b, channels, size, size), generator=g)`, then, only where horizontal_flip is set,
   `flips = torch.rand(b, generator=g) < 0.5`. With timesteps = "sobol", t is not drawn from g: it is floor(train_timesteps * u) for the
   next b points u of torch's scrambled SobolEngine(1), seeded by the same number and begun anew each round.

torch's global generator, which only dropout reads, is seeded by the same number (plus the rank where a site has several
GPUs). Every rank draws the whole batch and takes its share, so the draws do not depend on how many GPUs a site has.
"""

from cosilo_common.canonical import lp, sha256, u64

_LABEL = b"cosilo/site-seed/1"


def site_seed(round_number: int, site: str, seed: int) -> int:
    """The seed of one site's training in one round: 0 to 2^63 - 1.

    round_number: from 1; site: its name; seed: `Training.seed`, the run's own. SHA-256 over length-prefixed fields, so no two rounds or
    sites share a stream. The run's digest is left out on purpose: two runs that differ only in how they aggregate must draw the same, so
    that masks can be shown to change no bit of a checkpoint.
    """
    digest = sha256(lp(_LABEL, u64(round_number), site.encode("ascii"), u64(seed)))
    return int.from_bytes(digest[:8], "big") >> 1
