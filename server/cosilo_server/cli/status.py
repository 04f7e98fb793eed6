"""`cosilo status`: the federation at a glance."""

from __future__ import annotations

import typer

from cosilo_server.cli.commands import AsJson, Seat, command
from cosilo_server.cli.runs import run_columns
from cosilo_server.cli.shapes import status_shape
from cosilo_server.cli.terminal import byte_words, columns, fields, say, say_json, second_words, time_words


def add_to(parent: typer.Typer) -> None:
    """Adds the command to the tree."""
    command(parent, "status", status)


def status(seat: Seat, as_json: AsJson = False) -> None:
    """Show the coordinator, the sites' connections and the runs."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        shape = status_shape(coordinator.ask("status", coordinator.admin.GetStatus, admin_pb2.GetStatusRequest()))
    if as_json:
        say_json({**shape})
        return
    fields(
        [
            ("federation", shape["federation"]),
            ("coordinator", f"{coordinator.address}, {shape['software']}, up {second_words(shape['uptime_s'])}"),
            (
                "certificate",
                f"until {time_words(shape['certificate_expires_unix_s'] or 0)}" if shape["certificate_expires_unix_s"] else "",
            ),
            ("disk free", byte_words(shape["disk_free_bytes"])),
            ("members list", f"version {shape['members_version']}"),
        ]
    )
    say()
    columns(
        ("SITE", "CONNECTED", "LAST SEEN", "ADDRESS", "CERTIFICATE UNTIL", "SOFTWARE"),
        (
            (
                site["site"],
                f"left: revoke {site['site']}" if site["left_unix_s"] else "yes" if site["connected"] else "no",
                time_words(site["last_seen_unix_s"] or 0),
                site["address"],
                time_words(site["certificate_expires_unix_s"] or 0),
                site["software"],
            )
            for site in shape["sites"]
        ),
    )
    say()
    run_columns(shape["runs"])
