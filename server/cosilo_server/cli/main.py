"""The command tree of `cosilo`, and the one place where failures become words and exit codes.

Imports no torch and no grpc: each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli import auditing, ca, checkpoints, parties, rounds, runs, scores, status
from cosilo_server.cli.commands import ADDRESS_VARIABLE, ADMIN_VARIABLE, DEFAULT_FOLDER, host_port, remember_seat
from cosilo_server.cli.founding import init
from cosilo_server.cli.terminal import ExitCode, explain, note, refuse, say

_HELP = """Cosilo: train one diffusion model over sites that may not pool their images.

Exit codes: 0 done, 1 refused or failed, 2 bad usage, 3 cannot reach the coordinator."""

_INTERRUPTED = 130  # how typer answers the interrupt key, after the shells' custom

# Markup and boxes off: help and errors are plain lines, in one voice, for people and for pipes.
app = typer.Typer(
    name="cosilo",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        try:
            say(f"cosilo {version('cosilo-server')}")
        except PackageNotFoundError:
            say("cosilo, not installed as a package")
        raise typer.Exit(ExitCode.DONE)


@app.callback()
def cosilo(
    context: typer.Context,
    admin: Annotated[
        Path | None,
        typer.Option(
            "--admin",
            metavar="DIR",
            envvar=ADMIN_VARIABLE,
            help=f"The admin's folder; {DEFAULT_FOLDER} unless given.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            envvar=ADDRESS_VARIABLE,
            help="The coordinator, if not where the admin's folder says.",
            callback=host_port,
            show_default=False,
        ),
    ] = None,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)] = False,
) -> None:
    remember_seat(context, admin, address)


app.command("init")(init)
parties.add_to(app)
ca.add_to(app)
runs.add_to(app)
rounds.add_to(app)
checkpoints.add_to(app)
scores.add_to(app)
auditing.add_to(app)
status.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. arguments: those of the process unless given."""
    try:
        code = app(list(sys.argv[1:] if arguments is None else arguments), prog_name="cosilo", standalone_mode=False)
    except CosiloError as error:
        return explain(error)
    except typer.Abort:
        refuse("interrupted")
        return ExitCode.FAILED
    except OSError as error:
        refuse(f"{error.filename or 'system'}: {error.strerror or error}")
        return ExitCode.FAILED
    except Exception as error:
        if not hasattr(error, "format_message"):  # a bug: its traceback is what is wanted
            raise
        return _bad_usage(error)
    if code == _INTERRUPTED:
        refuse("interrupted")
        return ExitCode.FAILED
    return code if isinstance(code, int) else ExitCode.DONE


def _bad_usage(error: Exception) -> int:
    """What typer says about a command line, in our voice.

    Its exception types are its own business, so only their shape is used.
    """
    context = getattr(error, "ctx", None)
    message = str(error.format_message())  # type: ignore[attr-defined]  # checked by the caller
    if type(error).__name__ == "NoArgsIsHelpError":
        note(message)
        return ExitCode.BAD_USAGE
    path = getattr(context, "command_path", "cosilo")
    refuse(message[:1].lower() + message[1:].rstrip("."), f"see {path} --help")
    return ExitCode.BAD_USAGE


if __name__ == "__main__":
    sys.exit(main())
