"""What is written is what tomllib reads."""

import tomllib

from tests.federation.toml_files import Toml, to_toml


def test_a_document_comes_back() -> None:
    document: dict[str, Toml] = {
        "name": 'a "quoted" \\ name',
        "flag": True,
        "count": 3,
        "rate": 2e-05,
        "training": {"widths": [16, 32], "inner": {"x": False}, "path": "/tmp/å"},
        "empty": {},
    }
    assert tomllib.loads(to_toml(document)) == document
