"""`cosilo-site` before it says anything to anybody: fast, one voice, and code 2 for what it cannot parse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest

from cosilo_client import cli
from cosilo_client.cli import main
from cosilo_client.policy import Spent
from cosilo_client.run_terms import ROUNDS_PER_MODEL_MAX
from cosilo_client.spending import FILE_NAME, Spending
from cosilo_client.standing import RunStanding, Standing
from cosilo_common.errors import CosiloError

COMMANDS = ["enrol", "check", "members", "accept", "permit", "vouch", "status", "leave", "pause", "resume", "audit", "serve"]
DOCS = (Path(__file__).parents[2] / "docs" / "cli-site.md").read_text(encoding="utf-8")
VERBS = [command for command in COMMANDS if command != "audit"] + ["audit show", "audit verify"]
HELP_SECONDS_MAX = 0.5  # issue 2
RUN = bytes(32)


def test_help_loads_nothing_slow() -> None:
    program = (
        "import json, sys\n"
        "from cosilo_client.cli import main\n"
        "code = main(['--help'])\n"
        "heavy = [name for name in ('torch', 'diffusers', 'grpc', 'numpy', 'sqlalchemy') if name in sys.modules]\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == [0, []]
    assert done.stdout.startswith("Usage: cosilo-site ")


def test_help_answers_in_under_half_a_second() -> None:
    def once() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cosilo_client.cli", "--help"], capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(once() for _ in range(3)) < HELP_SECONDS_MAX  # the best of three: the machine may be busy


def test_the_daemon_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "import cosilo_client.daemon, cosilo_client.preflight, cosilo_client.errands\n"
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("command", VERBS)
def test_every_command_explains_itself_and_takes_config_after_its_verb(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Usage: cosilo-site {command} ")
    assert "--config FILE" in said


def test_the_commands_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    _, _, listed = capsys.readouterr().out.partition("\nCommands:\n")
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", VERBS)
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"^\| `cosilo-site {command}[ `]", DOCS, re.MULTILINE)


@pytest.mark.parametrize(("name", "shape"), [("status", Standing), ("run", RunStanding)])
def test_every_key_of_status_is_documented(name: str, shape: type) -> None:
    section = DOCS.split(f"\n### {name}\n")[1].split("\n### ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(get_type_hints(shape))


def test_the_bound_that_is_repeated_to_start_fast_is_the_same() -> None:
    assert cli.ROUNDS_PER_MODEL_MAX == ROUNDS_PER_MODEL_MAX


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["status", "--nonsense"], "error: no such option: --nonsense"),
        (["stat"], "error: no such command 'stat'"),
        (["accept"], "error: missing argument 'RUN'"),
        (["enrol"], "error: missing argument 'FILE|-'"),
    ],
)
def test_bad_usage_is_code_2(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()[0].startswith(error)) == ("", True)


def test_the_configuration_is_found_by_option_by_verb_or_by_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "none.toml"
    assert main(["--config", str(missing), "status"]) == 1
    assert main(["status", "--config", str(missing)]) == 1
    monkeypatch.setenv("COSILO_SITE_CONFIG", str(missing))
    assert main(["status"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: read configuration: {missing}: No such file or directory"] * 3


def test_spending_counts_rounds_once_and_seconds_always(tmp_path: Path) -> None:
    spending = Spending(tmp_path)
    assert spending.of(RUN) == Spent(0, 0.0)
    spending.add(RUN, 1, 10.0)
    spending.add(RUN, 1, 5.0)
    spending.add(RUN, 2, 1.0)
    assert spending.of(RUN) == Spent(2, 16.0)
    assert Spending(tmp_path).of(RUN) == Spent(2, 16.0)
    assert Spending(tmp_path).of(b"\1" * 32) == Spent(0, 0.0)


def test_damaged_spending_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"00": []}')
    with pytest.raises(CosiloError, match="move it away"):
        Spending(tmp_path)
