"""`cosilo site` and `cosilo admin`: invite, list, approve, revoke; and `cosilo members`.

Tokens, members lists and pre-approvals are made and signed here, at the admin's own machine; the coordinator only
stores them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.admin_enrolment import enrol_admin
from cosilo_server.cli.commands import AsJson, Seat, command, group
from cosilo_server.cli.shapes import EnrolmentShape, enrolment_shape
from cosilo_server.cli.terminal import columns, must_agree, note, say, say_json, time_words, warn

if TYPE_CHECKING:
    from cosilo_common.identity.folder import Identity
    from cosilo_common.identity.members import SignedMembers
    from cosilo_server.cli.connection import Coordinator

EXPIRES_DAYS_DEFAULT = 7
EXPIRES_DAYS_MAX = 90  # identity.invitation's own bound
DAY_S = 86_400
SITE, ADMIN = "site", "admin"
LEFT = "left"  # the state of a member that left by itself

PartyName = Annotated[str, typer.Argument(metavar="NAME", help="1 to 63 of a to z, 0 to 9 and -.", show_default=False)]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The invitation; a new file, mode 0600.", show_default=False)]
ExpiresDays = Annotated[int, typer.Option("--expires-days", min=1, max=EXPIRES_DAYS_MAX, help="Days until it is worthless.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask. Only where the fingerprint was compared before.")]
Readmit = Annotated[bool, typer.Option("--readmit", help="The name was used before, with another key, and that is meant.")]


def add_to(parent: typer.Typer) -> None:
    """Adds both nouns, and `members`, to the tree."""
    sites = group(parent, SITE, "Sites: the organisations that train.")
    command(sites, "invite", invite_site)
    command(sites, "list", list_sites)
    command(sites, "approve", approve_site)
    command(sites, "revoke", revoke_site)
    admins = group(parent, ADMIN, "Admins: the people who sign members and runs.")
    command(admins, "invite", invite_admin)
    admins.command("enrol")(enrol_admin)
    command(admins, "list", list_admins)
    command(admins, "approve", approve_admin)
    command(admins, "revoke", revoke_admin)
    command(parent, "members", members)


def invite_site(
    seat: Seat,
    name: PartyName,
    out: OutFile,
    expires_days: ExpiresDays = EXPIRES_DAYS_DEFAULT,
    local_demo: Annotated[
        bool,
        typer.Option("--local-demo", help="Approve in advance whoever holds the file. For demos on one machine only."),
    ] = False,
) -> None:
    """Invite a site: writes the one file that it enrols with."""
    if local_demo:
        warn(f"--local-demo: whoever holds {out} becomes site {name}, and nobody compares a fingerprint")
    _invite(seat, SITE, name, out, expires_days, local_demo)
    note(
        f"next: hand {out} to {name}, who runs cosilo-site enrol {out.name}" + ("" if local_demo else f"; then cosilo site approve {name}")
    )


def invite_admin(seat: Seat, name: PartyName, out: OutFile, expires_days: ExpiresDays = EXPIRES_DAYS_DEFAULT) -> None:
    """Invite another admin: writes the one file that they enrol with."""
    _invite(seat, ADMIN, name, out, expires_days, local_demo=False)
    note(f"next: hand {out} to {name}, who runs cosilo admin enrol {out.name} --to DIR; then cosilo admin approve {name}")


def list_sites(seat: Seat, as_json: AsJson = False) -> None:
    """List sites: invited, enrolled, members."""
    _list(seat, SITE, as_json)


def list_admins(seat: Seat, as_json: AsJson = False) -> None:
    """List admins: invited, enrolled, members."""
    _list(seat, ADMIN, as_json)


def approve_site(seat: Seat, name: PartyName, yes: Yes = False, readmit: Readmit = False) -> None:
    """Make an enrolled site a member, after both ends compared a fingerprint."""
    _approve(seat, SITE, name, yes, readmit)


def approve_admin(seat: Seat, name: PartyName, yes: Yes = False, readmit: Readmit = False) -> None:
    """Make an enrolled admin a member, after both ends compared a fingerprint."""
    _approve(seat, ADMIN, name, yes, readmit)


def revoke_site(seat: Seat, name: PartyName, yes: Yes = False) -> None:
    """Remove a site from the members list; its connection is cut."""
    _revoke(seat, SITE, name, yes)


def revoke_admin(seat: Seat, name: PartyName, yes: Yes = False) -> None:
    """Remove an admin from the members list."""
    _revoke(seat, ADMIN, name, yes)


def members(
    seat: Seat,
    put_back: Annotated[
        bool, typer.Option("--put-back", help="Give a restored coordinator the newest list that this folder has seen.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The verified members list, with fingerprints."""
    from cosilo_common.identity.keys import fingerprint
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.members import fetch_members, put_members_back

    with connect(seat) as coordinator:
        signed = put_members_back(coordinator) if put_back else fetch_members(coordinator)
    listed = [
        {
            "name": member.name,
            "role": member.role.value,
            "key": member.key.hex(),
            "fingerprint": fingerprint(member.key),
            "added": member.added,
        }
        for member in signed.everyone()
    ]
    if as_json:
        say_json(
            {
                "federation": signed.list.federation,
                "version": signed.version,
                "signer": signed.signer,
                "members": listed,
            }
        )
        return
    columns(("NAME", "ROLE", "FINGERPRINT"), ((str(m["name"]), str(m["role"]), str(m["fingerprint"])) for m in listed))
    note(f"version {signed.version} of {signed.list.federation}, signed by {signed.signer}; verified")


def _invite(seat: Seat, role: str, name: str, out: Path, expires_days: int, local_demo: bool) -> None:
    from cosilo_common.identity.certificates import CHAIN_BYTES_MAX
    from cosilo_common.identity.invitation import make_invitation, write_invitation
    from cosilo_common.identity.names import PeerName, Role
    from cosilo_common.identity.secret_files import read_public
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.members import fetch_members

    with connect(seat) as coordinator:
        identity = coordinator.identity
        _check_dialable(identity)
        invitation = make_invitation(
            PeerName(identity.peer.federation, Role(role), _party_name(name)),
            identity.peer.name,
            identity.signing_key(),
            fetch_members(coordinator),
            read_public(identity.tls.ca, CHAIN_BYTES_MAX),
            identity.membership.address,
            identity.membership.enrolment_address,
            int(time.time()) + expires_days * DAY_S,
            local_demo,
        )
        write_invitation(out, invitation)
        try:
            coordinator.ask(
                "store invitation",
                coordinator.admin.PutInvitation,
                admin_pb2.PutInvitationRequest(
                    name=name,
                    role=role,
                    token_public=invitation.token_public(),
                    expires_unix_s=invitation.expires_unix_s,
                    preapproval=invitation.preapproval.canonical() if invitation.preapproval else b"",
                ),
            )
        except CosiloError:
            out.unlink()  # an invitation that the coordinator does not know opens nothing
            raise
    say(f"invited {role} {name}: {out}, until {time_words(invitation.expires_unix_s)}")


def _check_dialable(identity: Identity) -> None:
    """Refuses to put an address into an invitation that nobody could dial."""
    for address in (identity.membership.address, identity.membership.enrolment_address):
        if address.endswith(":0"):
            raise CosiloError("invite", f"the admin's folder says that the coordinator listens at {address}", "correct it in admin.toml")


def _list(seat: Seat, role: str, as_json: bool) -> None:
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.members import fetch_members

    with connect(seat) as coordinator:
        listed = _standing(_enrolments(coordinator, role), fetch_members(coordinator), role)
    if as_json:
        say_json({"enrolments": listed})
        return
    columns(
        ("NAME", "STATE", "FINGERPRINT", "INVITED UNTIL", "ENROLLED"),
        (
            (
                e["name"],
                f"left: revoke {e['name']}" if e["state"] == LEFT else e["state"],
                e["fingerprint"] or "",
                time_words(e["expires_unix_s"]),
                time_words(e["enrolled_unix_s"] or 0),
            )
            for e in listed
        ),
    )


def _approve(seat: Seat, role: str, name: str, yes: bool, readmit: bool) -> None:
    from cosilo_common.identity.names import Role
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.members import change_members, fetch_members

    with connect(seat) as coordinator:
        enrolment = _waiting(_standing(_enrolments(coordinator, role), fetch_members(coordinator), role), role, name)
        key = bytes.fromhex(enrolment["key"] or "")
        say(f"{role} {name} enrolled with the key")
        say(f"    {enrolment['fingerprint']}")
        must_agree(yes, f"Does {name} read the same fingerprint to you, over a telephone?", f"{name} is not approved")
        signed = change_members(coordinator, lambda draft: draft.approve(name, Role(role), key, readmit))
    say(f"approved {role} {name}: members list version {signed.version}")


def _revoke(seat: Seat, role: str, name: str, yes: bool) -> None:
    from cosilo_common.identity.names import Role
    from cosilo_server.cli.connection import connect
    from cosilo_server.cli.members import change_members, fetch_members

    with connect(seat) as coordinator:
        member = fetch_members(coordinator).member(name)
        if member is None or member.role is not Role(role):
            raise CosiloError(f"revoke {role}", f"{name} is not a member as {_a(role)}", "run cosilo members for the list")
        must_agree(yes, f"Remove {role} {name} from the federation?", f"{name} stays")
        signed = change_members(coordinator, lambda draft: draft.remove(name))
    say(f"revoked {role} {name}: members list version {signed.version}")
    if role == SITE:
        note("runs that name it go on with the others; its accepted updates stay in past checkpoints")


def _enrolments(coordinator: Coordinator, role: str) -> list[EnrolmentShape]:
    from cosilo_common.rpc.v1 import admin_pb2

    answer = coordinator.ask("list enrolments", coordinator.admin.ListEnrolments, admin_pb2.ListEnrolmentsRequest())
    return [enrolment_shape(enrolment) for enrolment in answer.enrolments if enrolment.role == role]


def _standing(enrolments: list[EnrolmentShape], signed: SignedMembers, role: str) -> list[EnrolmentShape]:
    """Enrolments with the state that the verified list gives them: who is a member is not the coordinator's to say."""
    from cosilo_common.identity.keys import fingerprint

    keys = {member.name: member.key.hex() for member in signed.everyone() if member.role.value == role}
    listed: list[EnrolmentShape] = []
    for enrolment in enrolments:
        member = enrolment["key"] is not None and keys.get(enrolment["name"]) == enrolment["key"]
        if member:
            keys.pop(enrolment["name"])
        claimed = "enrolled" if enrolment["state"] in ("member", LEFT) else enrolment["state"]
        belongs = LEFT if enrolment["state"] == LEFT else "member"
        listed.append({**enrolment, "state": belongs if member else claimed})
    for name, key in sorted(keys.items()):  # the first admin, and members whose enrolment the coordinator has forgotten
        listed.append(
            {
                "name": name,
                "role": role,
                "state": "member",
                "key": key,
                "fingerprint": fingerprint(bytes.fromhex(key)),
                "expires_unix_s": 0,
                "enrolled_unix_s": None,
            }
        )
    return listed


def _waiting(listed: list[EnrolmentShape], role: str, name: str) -> EnrolmentShape:
    """The newest enrolment of this name that waits for an admin. Raises CosiloError that says how the name stands."""
    operation = f"approve {role}"
    of_name = [enrolment for enrolment in listed if enrolment["name"] == name]
    for enrolment in of_name:
        if enrolment["state"] == "enrolled" and enrolment["key"]:
            return enrolment
    if not of_name:
        raise CosiloError(operation, f"{name} was never invited", f"run cosilo {role} invite {name} --out FILE")
    state = of_name[0]["state"]
    hints: dict[str, Callable[[], str]] = {
        "member": lambda: "nothing is left to do",
        LEFT: lambda: f"cosilo {role} revoke {name}; to have it back, invite it again after that",
        "invited": lambda: f"have {name} enrol with the invitation first",
        "expired": lambda: f"invite it again: cosilo {role} invite {name} --out FILE",
        "revoked": lambda: f"invite it under a new name: cosilo {role} invite {name}-2 --out FILE",
    }
    raise CosiloError(operation, f"{name} is {_state_words(state)}", hints.get(state, lambda: "")())


def _state_words(state: str) -> str:
    return {
        "member": "a member already",
        LEFT: "a member that left by itself",
        "invited": "invited and has not enrolled yet",
        "expired": "not enrolled, and its invitation expired",
    }.get(state, state)


def _party_name(name: str) -> str:
    from cosilo_common.canonical import MalformedBytes, check_name

    try:
        return check_name(name)
    except MalformedBytes:
        raise typer.BadParameter(f"NAME {name!r} is not 1 to 63 of a to z, 0 to 9 and -") from None


def _a(role: str) -> str:
    return "an admin" if role == ADMIN else f"a {role}"
