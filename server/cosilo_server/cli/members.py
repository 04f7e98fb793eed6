"""The members list as this admin verifies it, and how the next version of it is signed and stored.

The coordinator only keeps lists: each one is checked against what the admin's folder trusted before, and an older one
is refused; of the trust document that comes with it, the same holds. Must not know what a command shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cosilo_common.errors import CosiloError
from cosilo_server.cli.terminal import warn

if TYPE_CHECKING:
    from cosilo_common.identity.members import MembersList, SignedMembers
    from cosilo_server.cli.connection import Coordinator


def fetch_members(coordinator: Coordinator) -> SignedMembers:
    """The newest members list, verified, and kept in the admin's folder."""
    from cosilo_common.rpc.v1 import site_pb2
    from cosilo_server.cli.connection import follow_ca

    answer = coordinator.ask("fetch members list", coordinator.admin.GetMemberList, site_pb2.GetMembersRequest())
    members = coordinator.identity.take_members(answer.members)
    before = coordinator.identity.trust()
    try:
        if coordinator.identity.take_trust(answer.trust) != before:
            follow_ca(coordinator)
    except CosiloError as error:  # ours stays; a restored coordinator is mended by the very commands that ask this
        warn(str(error))
    return members


def site_keys(members: SignedMembers) -> dict[str, bytes]:
    """Ed25519 public keys of the sites, by name."""
    from cosilo_common.identity.names import Role

    return {member.name: member.key for member in members.everyone() if member.role is Role.SITE}


def put_members_back(coordinator: Coordinator) -> SignedMembers:
    """Gives a restored coordinator the newest list that this admin's folder has seen. Raises CosiloError where it is not newer."""
    from cosilo_common.rpc.v1 import admin_pb2

    known = coordinator.identity.members()
    coordinator.ask("store members list", coordinator.admin.PutMembers, admin_pb2.PutMembersRequest(members=known.canonical()))
    return known


def change_members(coordinator: Coordinator, change: Callable[[MembersList], MembersList]) -> SignedMembers:
    """Fetches, changes, signs and stores the list. `change` turns the draft of the next version into what is signed.

    Raises CosiloError where the change is refused, or where somebody else changed the list meanwhile.
    """
    from cosilo_common.identity.members import sign_members
    from cosilo_common.rpc.v1 import admin_pb2

    newest = fetch_members(coordinator)
    identity = coordinator.identity
    signed = sign_members(newest, change(newest.draft()), identity.peer.name, identity.signing_key())
    data = signed.canonical()
    coordinator.ask("store members list", coordinator.admin.PutMembers, admin_pb2.PutMembersRequest(members=data))
    return identity.take_members(data)
