"""From a seed to a federation and the faults that it meets: everything that is drawn before anything happens.

Owns the ranges that are drawn from. Must not know how faults are made to happen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from cosilo_common.diffusion.presets import preset
from cosilo_common.manifest import PLAIN_AGGREGATION, SECURE_AGGREGATION, Deadlines, DownlinkTerms, EncodingTerms, Manifest, Participant
from cosilo_common.secagg.messages import RoundKind
from tests.simulation.network import Weather
from tests.simulation.site import signing_key
from tests.simulation.trainer import Temper
from tests.simulation.wire import FEDERATION

CLIP = 0.5
CAP = 512
TENSORS = (("bias", (3,)), ("weight", (4, 5)))
DEADLINES = Deadlines(gather_s=8, training_s=25, sharing_s=12, uploading_s=15, consenting_s=12, revealing_s=12)


@dataclass(frozen=True)
class Mischief:
    """Seconds between two faults of the world, on average, and how they are weighted against each other; 0 is never."""

    pause_s: float = 10.0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """One simulation. chapters: each is a while of faults, then fair weather in which all that was ordered must be done."""

    seed: int
    manifests: tuple[Manifest, ...]
    weather: Weather
    temper: Temper
    mischief: Mischief
    chapters: int
    rounds_a_chapter: int
    chunk_bytes: int
    lies: float = 0.0  # share of assignments that a lying coordinator twists
    misdealt: float = 0.0  # share of dealings that are wrong for one peer, and of uploads at which somebody complains without cause

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site of the federation."""
        return tuple(sorted({p.name for manifest in self.manifests for p in manifest.participants}))

    def describe(self) -> str:
        """One line for people."""
        first = self.manifests[0]
        mode = f"secure f={first.f}" if first.secure else "plain"
        cohort = f" cohort {first.cohort}" if first.cohort else ""
        steps = " steps" if first.downlink else ""
        lies = f", lies {self.lies:g}" if self.lies else ""
        lies += f", misdealt {self.misdealt:g}" if self.misdealt else ""
        return f"{len(self.sites)} sites, {len(self.manifests)} runs, {mode} b={first.encoding.bits}{steps}{cohort}{lies}"


FAULTS = {
    "site killed": 6.0,
    "site powered off": 3.0,
    "site stopped": 2.0,
    "site away": 1.0,
    "coordinator killed": 3.0,
    "coordinator powered off": 1.5,
    "coordinator stopped": 0.7,
    "both killed": 0.7,
    "link down": 4.0,
    "links down": 0.7,
    "link slow": 1.5,
    "connection cut": 3.0,
    "site unwilling": 0.6,
    "site's disk full": 0.8,
    "coordinator's disk full": 0.5,
    "cached weights rotten": 0.5,
    "rounds ordered": 1.0,
    "run stopped": 0.3,
    "model permitted": 2.0,
}


def scenario_of(seed: int, sites: int = 0) -> Scenario:
    """The simulation that a seed gives. sites: how many, where the caller would have that rather than a drawn number."""
    random = Random(f"scenario/{seed}")
    count = sites or _count(random)
    names = tuple(f"site-{number:02}" for number in range(count))
    secure = random.random() < 0.8
    bits = random.choice((32, 32, 24))
    downlink = DownlinkTerms() if Random(f"steps/{seed}").random() < 0.2 else None
    manifests = [_manifest(random, names, secure, bits, downlink, 0)]
    if random.random() < 0.15 and count < 8:
        manifests.append(_manifest(random, names, secure, bits, downlink, 1))
    stormy = random.random()
    return Scenario(
        seed=seed,
        manifests=tuple(manifests),
        weather=_weather(random, stormy),
        temper=Temper(
            seconds_max=random.choice((1.0, 4.0, 12.0)),
            fails=random.choice((0.0, 0.0, 0.02)),
            sticks=random.choice((0.0, 0.0, 0.02)),
        ),
        mischief=_mischief(random),
        chapters=3,
        rounds_a_chapter=12 if count < 7 else 6 if count < 13 else 2,
        chunk_bytes=random.choice((64, 200, 1 << 20)),
        lies=random.choice((0.02, 0.1, 0.3)) if random.random() < 0.12 else 0.0,
        misdealt=random.choice((0.02, 0.1, 0.3)) if random.random() < 0.12 and secure else 0.0,
    )


def kinds(random: Random) -> RoundKind:
    """The kind of an order."""
    return random.choices((RoundKind.TRAIN, RoundKind.REHEARSAL, RoundKind.STATISTICS), weights=(8, 1, 1))[0]


def _count(random: Random) -> int:
    draw = random.random()
    if draw < 0.86:
        return random.choice((3, 4, 4, 4, 5, 5, 6))
    return random.randint(7, 12) if draw < 0.99 else 13 + int(38 * random.random() ** 2)


def _manifest(random: Random, names: tuple[str, ...], secure: bool, bits: int, downlink: DownlinkTerms | None, number: int) -> Manifest:
    recipe = preset("digits")
    if number and len(names) > 3:
        names = tuple(sorted(random.sample(names, random.randint(3, len(names)))))
    f = max(1, len(names) // 3)
    cohort = random.randint(max(3, f + 2), len(names)) if len(names) > 4 and random.random() < 0.3 else 0
    return Manifest(
        name=f"simulated {number}",
        federation=FEDERATION,
        nonce=random.randbytes(16).hex(),
        participants=tuple(Participant(name=n, key=signing_key(n).public_key().public_bytes_raw().hex()) for n in names),
        architecture=recipe.architecture,
        schedule=recipe.schedule,
        training=recipe.training,  # its seed is every run's: two runs begin with one base model (R8)
        sampling=recipe.sampling,
        tensors=TENSORS,
        aggregation=SECURE_AGGREGATION if secure else PLAIN_AGGREGATION,
        encoding=EncodingTerms(bits=bits, clip=CLIP, cap=CAP),
        downlink=downlink,
        ema_decay=random.choice((0.0, 0.0, 0.5)),
        n_min=3,
        f=f,
        cohort=cohort,
        rounds_max=100_000,
        deadlines=DEADLINES,
    )


def _weather(random: Random, stormy: float) -> Weather:
    if stormy < 0.25:
        return Weather(latency_s=random.choice((0.002, 0.05)))
    worst = random.choice((0.002, 0.01, 0.03))
    return Weather(
        latency_s=random.choice((0.002, 0.05, 0.4)),
        delayed=random.choice((0.0, worst)),
        cut=random.choice((0.0, worst)),
        vanished=random.choice((0.0, worst / 2)),
        doubled=random.choice((0.0, worst * 3)),
        corrupted=random.choice((0.0, 0.0, worst / 4)),
        dawdled=random.choice((0.0, 0.0, worst * 5)),
    )


def _mischief(random: Random) -> Mischief:
    """Some of the faults, so that a seed is about something."""
    chosen = {name: weight for name, weight in FAULTS.items() if random.random() < 0.6}
    chosen["rounds ordered"] = FAULTS["rounds ordered"]
    chosen["model permitted"] = FAULTS["model permitted"]
    return Mischief(random.choice((3.0, 8.0, 20.0)), chosen)
