"""`cosilo init`: founds a federation in a folder, the one command that asks nobody."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cosilo_server.cli.commands import ADMIN_VARIABLE, host_port
from cosilo_server.cli.terminal import fields, note, say

CONFIG_FILE = "coordinator.toml"

_CONFIG = """\
# The coordinator of federation {federation}. Start it with
#     cosilo-coordinator serve --config coordinator.toml
# Relative paths are taken from this file's own folder. An unknown key is an error.

# The federation's name, as its certificates carry it.
federation = "{federation}"

[listen]
# Sites and admins, mutual TLS. They dial {address}.
federation = "0.0.0.0:{port}"
# New sites and admins, who have no certificate yet. They dial {enrolment_address}.
enrolment = "0.0.0.0:{enrolment_port}"
# /metrics, /healthz and /readyz, without TLS: keep it on this machine or behind a proxy.
metrics = "127.0.0.1:9464"
# The status page, read-only and without a password: keep it on this machine or behind a proxy that asks who is there. "" for none.
page = "127.0.0.1:7480"

[paths]
# Certificates and keys, as cosilo init made them: this folder.
identity = "."
# state.db, artifacts/ and spool/: needs room for the checkpoints that are kept, and for one update of each site.
data = "data"

# What is kept of each run, beside the newest checkpoint and those of `cosilo checkpoint keep`; the rest is deleted. These are the defaults.
# [retention]
# keep_last = 5
# keep_every = 10  # the checkpoint of every tenth round, for good; 0 for none
"""


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.", show_default=False)],
    federation: Annotated[str, typer.Option("--federation", metavar="NAME", help="Of the federation: a-z, 0-9 and -.", show_default=False)],
    address: Annotated[
        str,
        typer.Option("--address", metavar="HOST:PORT", help="Where sites will dial the coordinator.", callback=host_port),
    ] = "localhost:7443",
    enrolment_address: Annotated[
        str | None,
        typer.Option(
            "--enrolment-address",
            metavar="HOST:PORT",
            help="Where new sites will dial it; --address with port 7444 unless given.",
            callback=host_port,
            show_default=False,
        ),
    ] = None,
    admin_name: Annotated[str, typer.Option("--admin-name", metavar="NAME", help="The first admin's name.")] = "admin",
) -> None:
    """Found a federation: its CA, the coordinator's identity, the first admin."""
    from cosilo_common.canonical import MalformedBytes, check_name
    from cosilo_common.identity.secret_files import write_public
    from cosilo_server.authority import ADMIN_FOLDER, CA_FOLDER, COORDINATOR_FOLDER, Founding, found_federation

    for option, name in (("--federation", federation), ("--admin-name", admin_name)):
        try:
            check_name(name)
        except MalformedBytes:
            raise typer.BadParameter(f"{option} {name!r} is not 1 to 63 of a to z, 0 to 9 and -") from None
    host, _, port = address.rpartition(":")
    enrolment_address = enrolment_address or f"{host}:7444"
    found_federation(directory, Founding(federation, admin_name, address, enrolment_address), datetime.now(UTC))
    coordinator = directory / COORDINATOR_FOLDER
    config = _CONFIG.format(
        federation=federation,
        address=address,
        port=port,
        enrolment_address=enrolment_address,
        enrolment_port=enrolment_address.rpartition(":")[2],
    )
    write_public(coordinator / CONFIG_FILE, config.encode())
    admin = directory / ADMIN_FOLDER
    say(f"founded federation {federation} in {directory}")
    fields(
        [
            (f"{directory / CA_FOLDER}/", "the root's key: take it off this machine, into a safe"),
            (f"{coordinator}/", "for the coordinator's machine"),
            (f"{admin}/", f"for {admin_name} alone: it signs members and runs"),
        ]
    )
    note(f"next: cosilo-coordinator serve --config {coordinator / CONFIG_FILE}")
    note(f"then: export {ADMIN_VARIABLE}={admin.resolve()} and cosilo site invite NAME --out NAME.invitation")
