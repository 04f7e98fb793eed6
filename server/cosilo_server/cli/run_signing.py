"""`cosilo run sign`: another admin vouches for a run whose signer is an admin no more.

Owns what that admin is shown and what is refused. The coordinator is believed in nothing: a manifest that it made up, with sites of its own
among the participants, must not get a signature. Must not know how a run is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import RunName, Seat
from cosilo_server.cli.terminal import fields, must_agree, note, say, short, warn

if TYPE_CHECKING:
    from cosilo_common.identity.members import SignedMembers
    from cosilo_common.manifest import Manifest

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask. Only where the digest was compared before.")]


def sign(seat: Seat, run: RunName, yes: Yes = False) -> None:
    """Sign a run's manifest again, in place of an admin who left."""
    from cosilo_common.manifest import PLAIN_AGGREGATION, parse_manifest, sign_manifest, verify_manifest
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import WORK_TIMEOUT_S, connect
    from cosilo_server.cli.manifests import fetch_unsigned, terms_in_words
    from cosilo_server.cli.members import fetch_members
    from cosilo_server.cli.run_names import find_run

    with connect(seat) as coordinator:
        found = find_run(coordinator, run).run
        answer = fetch_unsigned(coordinator, found)
        manifest = parse_manifest(answer.manifest)
        members, federation = fetch_members(coordinator), coordinator.identity.peer.federation
        if manifest.federation != federation:
            raise CosiloError("sign run", f"{short(found)} is of federation {manifest.federation!r}", "do not trust this coordinator")
        try:
            _, signer = verify_manifest(answer.manifest, answer.signature, members.admins(), federation)
        except CosiloError:
            pass
        else:
            raise CosiloError("sign run", f"{short(found)} is signed by {signer}, an admin", "nothing is left to do")
        gone = _revoked(manifest, members)
        fields(
            [
                ("run", short(found)),
                ("digest", found.hex()),
                ("name", manifest.name),
                ("signed by", f"{answer.signer}, says the coordinator; no admin any more"),
                ("aggregation", manifest.aggregation),
                ("participants", ", ".join(participant.name for participant in manifest.participants)),
                ("revoked since", ", ".join(gone)),
                *terms_in_words(manifest),
            ]
        )
        if manifest.aggregation == PLAIN_AGGREGATION:
            warn("insecure-plain-sum: updates are not masked; the coordinator sees every site's own update")
        if gone:
            warn(f"{', '.join(gone)}: revoked, so nobody can tell whether the keys in this manifest were theirs")
        note(
            "sites may accept what you sign: compare the digest with what a site that trained in the run has (`cosilo-site status --json`)"
        )
        must_agree(yes, f"sign {manifest.name} {short(found)}?", f"sign run: {short(found)} is not signed")
        request = admin_pb2.CreateRunRequest(
            manifest=answer.manifest, signature=sign_manifest(manifest, coordinator.identity.signing_key())
        )
        coordinator.ask("sign run", coordinator.admin.CreateRun, request, WORK_TIMEOUT_S)
    say(f"signed {manifest.name} {short(found)}")


def _revoked(manifest: Manifest, members: SignedMembers) -> list[str]:
    """The participants that were revoked since. Raises CosiloError where one is no member by the key that the manifest has."""
    gone = []
    for name, key in sorted(manifest.participant_keys().items()):
        entry = members.member(name)
        if entry is None and name in members.list.removed:
            gone.append(name)
        elif entry is None or entry.key != key:
            raise CosiloError(
                "sign run",
                f"participant {name} is no member by the key in the manifest",
                "a site that enrolled again needs a new run; if none did, do not trust this coordinator",
            )
    return gone
