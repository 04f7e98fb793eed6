"""A run's TOML: presets and overrides, defaults, and an error for every wrong key that names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cosilo_server.cli
from cosilo_common.diffusion.lora import Lora, file_bytes
from cosilo_common.diffusion.presets import PRESETS
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import CorrectionTerms, DownlinkTerms, parse_manifest
from cosilo_common.weights import TensorTable
from cosilo_server.cli.run_file import RunFile

SITES = {name: bytes([place]) * 32 for place, name in enumerate(["north", "east", "south", "west"], start=1)}
TABLE = TensorTable((("weight", (3, 2)),))
ADAPTERS = TensorTable((("to_q.lora_A.weight", (8, 2)), ("to_q.lora_B.weight", (3, 8))))
Read = Callable[[str], RunFile]
NONCE = bytes(range(16))
BASIC = 'name = "digits-1"\npreset = "digits"\n'


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def of(text: str) -> RunFile:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return RunFile(path)

    return of


def refusal(read: Read, text: str) -> CosiloError:
    with pytest.raises(CosiloError) as caught:
        read(text).manifest("north-star", SITES, TABLE, NONCE)
    return caught.value


def test_a_preset_and_a_name_make_a_manifest(read: Read) -> None:
    manifest = read(BASIC).manifest("north-star", SITES, TABLE, NONCE)
    assert parse_manifest(manifest.canonical()) == manifest
    assert [p.name for p in manifest.participants] == ["east", "north", "south", "west"]
    assert manifest.participant_keys() == SITES
    assert (manifest.federation, manifest.nonce, manifest.tensors) == ("north-star", NONCE.hex(), TABLE.entries)
    assert (manifest.aggregation, manifest.n_min, manifest.f, manifest.cohort) == ("cosilo-secagg/1", 3, 1, 0)
    assert manifest.architecture == PRESETS["digits"].architecture
    assert manifest.training == PRESETS["digits"].training.model_copy(update={"seed": manifest.training.seed})


def test_a_run_has_a_seed_of_its_own_unless_the_file_gives_one(read: Read) -> None:
    """Two runs of one seed train alike from one model: with other survivors, the difference of their sums would be one site's update."""
    one, other = (read(BASIC).manifest("north-star", SITES, TABLE, nonce).training.seed for nonce in (NONCE, bytes(16)))
    assert one != other
    given = read(BASIC + "[training]\nseed = 7\n").manifest("north-star", SITES, TABLE, NONCE)
    assert given.training.seed == 7


def test_sections_override_single_values_of_the_preset(read: Read) -> None:
    manifest = read(
        BASIC + "rounds_max = 7\n[training]\nlearning_rate = 1e-4\n[sampling]\nsteps = 5\n[encoding]\nclip = 2\n[deadlines]\ngather_s = 9\n"
    ).manifest("north-star", SITES, TABLE, NONCE)
    assert manifest.training == PRESETS["digits"].training.model_copy(update={"learning_rate": 1e-4, "seed": manifest.training.seed})
    assert manifest.sampling.steps == 5
    assert manifest.encoding.clip == 2.0
    assert manifest.deadlines.gather_s == 9.0
    assert manifest.rounds_max == 7


def test_participants_may_be_named(read: Read) -> None:
    manifest = read(BASIC + 'participants = ["west", "north", "east"]\n').manifest("north-star", SITES, TABLE, NONCE)
    assert [p.name for p in manifest.participants] == ["east", "north", "west"]


@pytest.mark.parametrize(("count", "n_min", "f"), [(3, 3, 1), (6, 3, 2), (10, 3, 3)])
def test_masked_defaults_are_three_sites_and_a_third(read: Read, count: int, n_min: int, f: int) -> None:
    sites = {f"s{place}": bytes([place]) * 32 for place in range(1, count + 1)}
    manifest = read(BASIC).manifest("north-star", sites, TABLE, NONCE)
    assert (manifest.n_min, manifest.f) == (n_min, f)


@pytest.mark.parametrize(("count", "n_min"), [(1, 1), (2, 2), (4, 3)])
def test_plain_sum_defaults_need_no_more_sites_than_there_are(read: Read, count: int, n_min: int) -> None:
    sites = {f"s{place}": bytes([place]) * 32 for place in range(1, count + 1)}
    run_file = read(BASIC + 'aggregation = "insecure-plain-sum"\n')
    assert run_file.plain
    manifest = run_file.manifest("north-star", sites, TABLE, NONCE)
    assert (manifest.n_min, manifest.f) == (n_min, 0)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        (BASIC + "learning_rate = 1\n", "unknown key learning_rate"),
        (BASIC + "[training]\nlr = 1\n", "unknown key training.lr"),
        (BASIC + "[deadlines]\nlunch_s = 1\n", "unknown key deadlines.lunch_s"),
        (BASIC + "[encoding]\nbits = 16\n", "encoding.bits: Input should be 24 or 32"),
        (BASIC + "[architecture]\nsample_size = 9\n", "architecture: sample_size 9 is not divisible by 2, which 2 levels need"),
        (BASIC + "n_min = 2\n", "the run: n_min must be at least 3 under cosilo-secagg/1, not 2"),
        (BASIC + "n_min = 5\n", "the run: 4 participants cannot make a round: n_min 5, f 1 need 5"),
        (BASIC + 'participants = ["north", "mars"]\n', "participants: not in the members list as a site: mars"),
        (BASIC + 'participants = ["north", "north"]\n', "participants: a name stands twice"),
        (BASIC + "participants = []\n", 'participants: must be "all" or a list of names'),
        (BASIC + 'aggregation = "plain"\n', "aggregation: 'plain' is unknown"),
        (BASIC + "training = 3\n", "training: must be a section"),
        ('preset = "digits"\n', "the key name is missing"),
        ('name = "x"\npreset = 3\n', "preset: must be a name in quotes"),
        ('name = "x"\n', "neither preset nor [architecture] is given"),
        ("name = \n", "not TOML: Invalid value (at line 1, column 8)"),
    ],
)
def test_a_wrong_value_is_named(read: Read, text: str, subject: str, tmp_path: Path) -> None:
    error = refusal(read, text)
    assert error.operation == "read run file"
    assert error.subject == f"{tmp_path / 'run.toml'}: {subject}"


def test_an_unknown_preset_lists_those_there_are(read: Read) -> None:
    error = refusal(read, 'name = "x"\npreset = "digit"\n')
    assert error.hint == "choose one of ddpm-cifar10, digits, fashion-16, mednist-32, tun2023"


def test_a_missing_file_and_a_huge_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="No such file or directory"):
        RunFile(tmp_path / "none.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(CosiloError, match="longer than 1048576 bytes"):
        RunFile(tmp_path / "huge.toml")


def test_a_federation_without_sites_cannot_train(read: Read) -> None:
    with pytest.raises(CosiloError, match="the federation has no site yet"):
        read(BASIC).manifest("north-star", {}, TABLE, NONCE)


def test_a_run_of_adapters_has_the_base_s_length_and_the_adapters_tensors(read: Read) -> None:
    text = BASIC + f'[lora]\nbase = "{"ab" * 32}"\nrank = 4\n'
    asked: list[Lora] = []

    def adapters(lora: Lora) -> TensorTable:
        asked.append(lora)
        return ADAPTERS

    manifest = read(text).manifest("north-star", SITES, TABLE, NONCE, adapters)
    assert asked == [manifest.lora] == [Lora(base="ab" * 32, base_bytes=8 + 64 + 24, rank=4)]
    assert manifest.shared_table == ADAPTERS
    with pytest.raises(CosiloError, match=r"unknown key lora\.base_bytes"):
        read(text + "base_bytes = 8\n")
    with pytest.raises(CosiloError, match=r"lora\.rank: Input should be greater than or equal to 1"):
        read(text.replace("rank = 4", "rank = 0")).manifest("north-star", SITES, TABLE, NONCE, adapters)
    with pytest.raises(CosiloError, match=r"tensor weight is no adapter's"):
        read(text).manifest("north-star", SITES, TABLE, NONCE, lambda lora: TABLE)


def test_the_example_shows_the_defaults(tmp_path: Path) -> None:
    example = Path(cosilo_server.cli.__file__).parent / "run.example.toml"
    plain = RunFile(example).manifest("north-star", SITES, TABLE, NONCE)
    assert plain.architecture == PRESETS["digits"].architecture
    shown = [line.removeprefix("# ") for line in example.read_text().splitlines()]
    at = shown.index(next(line for line in shown if line.startswith("[correction]")))
    end = next(k for k in range(at, len(shown)) if not shown[k].strip())
    corrected = tmp_path / "corrected.toml"  # by itself: no run has it and [lora]
    corrected.write_text(example.read_text() + "\n".join(shown[at:end]))
    shown[at:end] = []
    alone = RunFile(corrected).manifest("north-star", SITES, TABLE, NONCE)
    assert alone.correction == CorrectionTerms() and alone.model_copy(update={"correction": None}) == plain
    uncommented = tmp_path / "all.toml"
    uncommented.write_text("\n".join(line for line in shown if re.match(r"\[\w+\]|\w+ = ", line)))
    everything = RunFile(uncommented).manifest("north-star", SITES, TABLE, NONCE, lambda lora: ADAPTERS)
    overrides = {section: getattr(plain, section) for section in ("architecture", "training", "sampling")}
    assert everything.evaluation is not None and everything.warm_start is not None  # shown filled in: no network is the default
    assert everything.lora is not None and everything.tensor_table == ADAPTERS
    assert everything.lora == Lora(base="0" * 64, base_bytes=file_bytes(TABLE))
    assert everything.downlink == DownlinkTerms()
    tables = {"evaluation": None, "warm_start": None, "lora": None, "downlink": None, "tensors": plain.tensors}
    assert everything.model_copy(update={**overrides, **tables}) == plain
    assert b"warm_start" not in plain.canonical()
