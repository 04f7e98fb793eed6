"""How every command is declared: what it is called, and the seat it is run from.

`--admin` and `--address` stand before the noun or after the verb, as people type them. Must not know what any command
does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ADMIN_VARIABLE = "COSILO_ADMIN"
ADDRESS_VARIABLE = "COSILO_ADDRESS"
DEFAULT_FOLDER = Path("~/.config/cosilo/admin")

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")
_PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class Seat:
    """Where an admin sits: their folder, and the coordinator's address where it is not the one that the folder names."""

    folder: Path
    address: str | None = None


def host_port(text: str | None) -> str | None:
    """Refuses an argument that is no HOST:PORT."""
    if text is None:
        return None
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match.group(2)) > _PORT_MAX:
        raise typer.BadParameter(f"{text!r} is not HOST:PORT")
    return text


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs; docs/cli.md gives its shape.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or the beginning of its digest.", show_default=False)]
AdminOption = Annotated[Path | None, typer.Option("--admin", metavar="DIR", help="The admin's folder.", show_default=False)]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="The coordinator, if elsewhere.", callback=host_port, show_default=False),
]


def command(group: typer.Typer, name: str, body: Callable[..., None]) -> None:
    """Registers a function as a command: its first parameter is the seat, the others are its arguments and options."""
    signature = inspect.signature(body, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(parameter.replace(kind=keyword) for parameter in list(signature.parameters.values())[1:]),
        inspect.Parameter("admin", keyword, default=None, annotation=AdminOption),
        inspect.Parameter("address", keyword, default=None, annotation=AddressOption),
    ]

    def run(context: typer.Context, admin: Path | None, address: str | None, **rest: Any) -> None:
        body(_seat(context, admin, address), **rest)

    run.__doc__ = body.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    # What typer reads instead of the function's own parameters.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # PEP 362, unknown to typeshed
    group.command(name)(run)


def group(parent: typer.Typer, name: str, words: str) -> typer.Typer:
    """A noun with its verbs."""
    made = typer.Typer(help=words, no_args_is_help=True, rich_markup_mode=None, add_completion=False)
    parent.add_typer(made, name=name)
    return made


def remember_seat(context: typer.Context, admin: Path | None, address: str | None) -> None:
    """Keeps the options that stand before the noun."""
    context.obj = Seat((admin or DEFAULT_FOLDER).expanduser(), address)


def _seat(context: typer.Context, admin: Path | None, address: str | None) -> Seat:
    before: Seat = context.obj
    return Seat(admin.expanduser() if admin else before.folder, address or before.address)
