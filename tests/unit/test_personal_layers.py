"""Layers that stay at a site: which file a round starts from, who may read it, when it goes; and what a sum without them steps."""

from pathlib import Path

import numpy as np
import pytest

from cosilo_client.personal import PersonalLayers
from cosilo_common.diffusion.parts import Split
from cosilo_common.encoding import Encoding, Section
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import ServerOptimiserTerms
from cosilo_common.weights import BLOCK_WORDS, TensorTable, open_vector, write_weights
from cosilo_server.aggregation import Aggregation
from cosilo_server.artifacts import Artifacts
from tests.unit.test_aggregation import CAP, CLIP, Site, opening_of

RUN, OTHER = b"\x01" * 32, b"\x02" * 32
TABLE = TensorTable.of([("a", (7,)), ("b", (BLOCK_WORDS + 5,)), ("c", (3, 11)), ("d", (4,)), ("e", (BLOCK_WORDS,))])
SPLIT = Split(TABLE, frozenset({"b", "d"}))


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def test_a_round_starts_from_the_newest_earlier_file_and_two_remain_at_most(tmp_path: Path) -> None:
    layers = PersonalLayers(tmp_path)
    assert layers.newest_before(RUN, 1) is None
    for number in (1, 2, 4):
        write(layers.place(RUN, number, layers.newest_before(RUN, number)), str(number))
    assert [path.name for path in sorted((tmp_path / "personal" / RUN.hex()).iterdir())] == ["2.safetensors", "4.safetensors"]
    assert layers.newest_before(RUN, 5) == tmp_path / "personal" / RUN.hex() / "4.safetensors"
    # Round 4 again, for the site was killed before it said that it had trained: from the same values as before.
    assert layers.newest_before(RUN, 4) == tmp_path / "personal" / RUN.hex() / "2.safetensors"
    assert layers.newest_before(OTHER, 9) is None
    assert (tmp_path / "personal" / RUN.hex()).stat().st_mode & 0o777 == 0o700


def test_what_is_left_is_gone(tmp_path: Path) -> None:
    layers = PersonalLayers(tmp_path)
    for run in (RUN, OTHER):
        write(layers.place(run, 1, None), "values")
    layers.forget(RUN)
    layers.forget(RUN)
    assert layers.runs() == (OTHER,)
    assert not (tmp_path / "personal" / RUN.hex()).exists()


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["fedavg", "fedadam"])
@pytest.mark.parametrize("bits", [32, 24])
def test_a_step_moves_what_is_shared_as_if_it_were_the_whole_model_and_nothing_else(
    tmp_path: Path, kind: str, bits: int, ema: float
) -> None:
    shared = SPLIT.shared_table
    encoding = Encoding(bits, 4, CAP, (Section(shared.size, CLIP),), loss_max=16.0, losses=1)
    random = np.random.default_rng(0)
    before = random.normal(size=TABLE.size).astype(np.float32)
    updates = [random.normal(scale=0.05, size=shared.size).astype(np.float32) for _ in range(3)]
    sites = {f"site-{i}": Site(encoding, update, 100 * (i + 1)) for i, update in enumerate(updates)}
    terms, artifacts = ServerOptimiserTerms(kind=kind), Artifacts(tmp_path / "artifacts")  # type: ignore[arg-type]  # one of its literals
    halves = [np.concatenate([before[run] for run in SPLIT.shared_runs]), before]
    made = []
    for table, weights, personal in ((shared, halves[0], frozenset[str]()), (TABLE, halves[1], SPLIT.personal)):
        run = Aggregation(artifacts, table, encoding, terms, ema, personal)
        with artifacts.scratch() as path:
            write_weights(path, table, [weights])
            first = run.initial(artifacts.put_file(path))
        second = run.train(first, opening_of(encoding, sites))
        third = run.train(second.checkpoint, opening_of(encoding, sites))
        made.append(third)
    alone, whole = made
    assert alone.checkpoint.optimiser == whole.checkpoint.optimiser
    assert (alone.update_norm, alone.tensor_peaks) == (whole.update_norm, whole.tensor_peaks)
    for part in ("weights", "ema"):
        expected = open_vector(artifacts.path(getattr(alone.checkpoint, part)), shared)
        after = open_vector(artifacts.path(getattr(whole.checkpoint, part)), TABLE)
        assert np.array_equal(np.concatenate([after[run] for run in SPLIT.shared_runs]), expected)
        assert all(np.array_equal(after[run], before[run]) for run in SPLIT.personal_runs)
        assert not np.array_equal(expected, halves[0])


def test_a_sum_of_the_whole_model_is_refused_where_a_part_stays(tmp_path: Path) -> None:
    encoding = Encoding(32, 4, CAP, (Section(TABLE.size, CLIP),), loss_max=16.0, losses=1)
    artifacts = Artifacts(tmp_path)
    run = Aggregation(artifacts, TABLE, encoding, ServerOptimiserTerms(), 0.0, SPLIT.personal)
    with artifacts.scratch() as path:
        write_weights(path, TABLE, [np.zeros(TABLE.size, np.float32)])
        first = run.initial(artifacts.put_file(path))
    with pytest.raises(CosiloError, match=f"the encoding has {TABLE.size} values, the model {SPLIT.shared_table.size}"):
        run.train(first, opening_of(encoding, {"only": Site(encoding, np.zeros(TABLE.size, np.float32), CAP)}))


def test_a_round_that_does_not_count_is_not_started_from_and_its_file_goes(tmp_path: Path) -> None:
    """Control variates: c_i must be what the coordinator's mean includes, so a round that was abandoned is as if it had not been."""
    layers, counted = PersonalLayers(tmp_path), {1}

    def counts(run: bytes, round_: int) -> bool:
        return run == RUN and round_ in counted

    for number in (1, 2):
        write(layers.place(RUN, number, layers.newest_before(RUN, number, counts)), str(number))
    begun_from = layers.newest_before(RUN, 3, counts)
    assert begun_from is not None
    assert begun_from.read_text() == "1"
    write(layers.place(RUN, 3, begun_from), "3")
    assert sorted(path.name for path in begun_from.parent.iterdir()) == ["1.safetensors", "3.safetensors"]
