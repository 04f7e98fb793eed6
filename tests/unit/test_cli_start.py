"""`cosilo` before it says anything to anybody: it starts fast, lists its commands, and refuses what it cannot parse with code 2."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cosilo_server.cli.main import main

COMMANDS = [
    "init",
    "site invite",
    "site list",
    "site approve",
    "site revoke",
    "admin invite",
    "admin enrol",
    "admin list",
    "admin approve",
    "admin revoke",
    "members",
    "ca status",
    "ca rotate",
    "ca renew",
    "ca retire",
    "ca sign",
    "audit show",
    "audit verify",
    "run create",
    "run list",
    "run show",
    "run sign",
    "run pause",
    "run resume",
    "run stop",
    "run watch",
    "round start",
    "round list",
    "round show",
    "round trace",
    "checkpoint list",
    "checkpoint pull",
    "checkpoint export",
    "checkpoint keep",
    "checkpoint unkeep",
    "sample",
    "score",
    "status",
]
HELP_SECONDS_MAX = 0.5  # issue 2


def test_help_loads_neither_torch_nor_grpc() -> None:
    program = (
        "import json, sys\n"
        "from cosilo_server.cli.main import main\n"
        "code = main(['--help'])\n"
        "heavy = [name for name in ('torch', 'diffusers', 'grpc', 'numpy', 'sqlalchemy') if name in sys.modules]\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == [0, []]
    assert done.stdout.startswith("Usage: cosilo ")


def test_help_costs_less_than_half_a_second_of_processor_time() -> None:
    """Of processor time, which a busy machine does not lengthen; alone on a machine that is the time a person waits."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-m", "cosilo_server.cli.main", "--help"], capture_output=True, check=True)
    assert spent() - before < HELP_SECONDS_MAX


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"Usage: cosilo {command} ")
    assert said.err == ""


def test_the_tree_has_these_commands_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*path: str) -> list[str]:
        main([*path, "--help"])
        _, _, commands = capsys.readouterr().out.partition("\nCommands:\n")
        return [line.split()[0] for line in commands.splitlines() if line.startswith("  ") and not line.startswith("   ")]

    found = [f"{noun} {verb}" for noun in listed() for verb in listed(noun)] + [name for name in listed() if not listed(name)]
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("init", "admin enrol")])
def test_every_command_takes_the_seat_after_its_verb(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert "--admin DIR" in said
    assert "--address HOST:PORT" in said


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["run", "list", "--nonsense"], "error: no such option: --nonsense", "hint: see cosilo run list --help"),
        (["run", "shwo"], "error: no such command 'shwo'", "hint: see cosilo run --help"),
        (["round", "start"], "error: missing argument 'RUN'", "hint: see cosilo round start --help"),
        (
            ["--address", "nowhere", "run", "list"],
            "error: invalid value for '--address' (env var: 'COSILO_ADDRESS'): 'nowhere' is not HOST:PORT",
            "hint: see cosilo --help",
        ),
        (
            ["run", "list", "--address", "host:70000"],
            "error: invalid value for '--address': 'host:70000' is not HOST:PORT",
            "hint: see cosilo run list --help",
        ),
        (
            ["round", "start", "x", "--rehearsal", "--statistics"],
            "error: invalid value: --rehearsal, --statistics and --moments are kinds of rounds; give one",
            "hint: see cosilo round start --help",
        ),
        (
            ["init", "somewhere", "--federation", "Nord Stern"],
            "error: invalid value: --federation 'Nord Stern' is not 1 to 63 of a to z, 0 to 9 and -",
            "hint: see cosilo init --help",
        ),
    ],
)
def test_bad_usage_is_code_2_in_one_voice(arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0].startswith(error)
    assert lines[-1] == hint


def test_no_arguments_show_the_help_as_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("Usage: cosilo ")


def test_a_folder_that_is_no_admins_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--admin", str(tmp_path), "run", "list"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: read identity: {tmp_path} is not an admin's folder: it has no admin.toml",
        "hint: give the folder that cosilo init made, with --admin DIR or in COSILO_ADMIN",
    ]


def test_an_interrupted_command_is_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosilo_server.cli.connection.connect", interrupted)
    assert main(["run", "list"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
