"""A site's TOML: the example is whole, unknown keys and impossible values are refused by name, paths are the file's."""

from __future__ import annotations

import tomllib
from datetime import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from cosilo_client.config import EXAMPLE_PATH, SiteConfig, load_site_config
from cosilo_common.errors import CosiloError

LEAST = 'state = "state"\n[data]\nkind = "digits"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return path


def test_the_example_parses_to_the_defaults() -> None:
    found = load_site_config(EXAMPLE_PATH)
    plain = SiteConfig.model_validate({"state": "/var/lib/cosilo", "data": {"kind": "folder", "path": "/srv/images"}})
    assert found == plain


def test_the_example_shows_every_key() -> None:
    text = EXAMPLE_PATH.read_text()
    for table, model in SiteConfig.model_fields.items():
        kind = model.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert f"[{table}]" in text
            assert [key for key in kind.model_fields if f"{key} =" not in text] == []
        else:
            assert f"{table} =" in text


def test_the_least_file_has_safe_defaults(tmp_path: Path) -> None:
    config = load_site_config(written(tmp_path, LEAST))
    assert (config.metrics.listen, config.policy.allow_insecure_plain_sum, config.policy.runs) == (
        "127.0.0.1:9465",
        False,
        "accepted",
    )
    assert config.cache.limit_bytes == 20 * 2**30


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = 'state = "s"\n[data]\nkind = "npz"\npath = "images.npz"\nindex_file = "/abs/mine.txt"\n'
    config = load_site_config(written(tmp_path, text))
    assert config.state == tmp_path / "s"
    assert (config.data.path, config.data.index_file) == (tmp_path / "images.npz", Path("/abs/mine.txt"))


def test_hours_are_read(tmp_path: Path) -> None:
    config = load_site_config(written(tmp_path, LEAST + '[policy]\nhours = ["19:00-07:30", "12:00-24:00"]\n'))
    assert [(span.start, span.end) for span in config.policy.hours] == [
        (time(19, 0), time(7, 30)),
        (time(12, 0), time(0, 0)),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LEAST + "[policy]\nround_max = 3\n", "policy.round_max"),
        ("token = 1\n" + LEAST, "token"),
        ('state = "s"\n', "data: Field required"),
        ('[data]\nkind = "digits"\n', "state: Field required"),
        ('state = 3\n[data]\nkind = "digits"\n', "state: Value error, must be a path in quotes"),
        ('state = "s"\n[data]\nkind = "folder"\n', "kind = folder needs a path"),
        (LEAST + '[policy]\nhours = ["7pm"]\n', 'must be hours like "19:00-07:00"'),
        (LEAST + '[policy]\nhours = ["07:00-07:00"]\n', "leave hours out"),
        (LEAST + '[policy]\nhours = ["07:00-24:30"]\n', "the day ends at 24:00"),
        (LEAST + '[policy]\nallow_insecure_plain_sum = "yes"\n', "policy.allow_insecure_plain_sum"),
        (LEAST + "[policy]\ncohort_min = 2.5\n", "policy.cohort_min"),
        (LEAST + "[policy]\nhours_max = -1.0\n", "policy.hours_max"),
        (LEAST + '[policy]\nruns = "all"\n', "policy.runs"),
        (LEAST + '[metrics]\nlisten = "9465"\n', "is not ADDRESS:PORT"),
        (LEAST + '[trainer]\ndevice = "gpu"\n', "trainer.device"),
        (LEAST + '[trainer]\ndevice = "cpu"\ngpus = 2\n', "gpus = 2 needs device"),
        (LEAST + "[network]\nbackoff_min_s = 10.0\nbackoff_max_s = 1.0\n", "backoff_min_s 10.0 is above backoff_max_s 1.0"),
        (LEAST + "[cache]\nlimit_gib = nan\n", "cache.limit_gib"),
        ("state = \n", "at line 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CosiloError) as raised:
        load_site_config(written(tmp_path, text))
    assert says in str(raised.value)
    assert str(tmp_path / "site.toml") in raised.value.subject


def test_a_missing_file_says_where_to_name_it(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match="COSILO_SITE_CONFIG"):
        load_site_config(tmp_path / "none.toml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CosiloError, match="not UTF-8"):
        load_site_config(path)


def test_the_example_is_toml_that_tools_read() -> None:
    assert set(tomllib.loads(EXAMPLE_PATH.read_text())) == set(SiteConfig.model_fields)
