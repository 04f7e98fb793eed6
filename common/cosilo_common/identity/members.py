"""Who belongs: the versioned members list, and the admins' signatures that carry it from one version to the next.

A list is signed by an admin of the version before it, with a key that the coordinator never holds. Whoever reads one
starts from an `Anchor` (the admins they already believe in, from an invitation or from the newest list they saw) and
follows the rollovers, one for each version at which the set of admins changed; so a site that slept through ten
versions needs the newest document only. Older versions are refused.
Must not know files, sockets or the clock.
"""

from __future__ import annotations

from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, field_validator, model_validator

from cosilo_common.canonical import canonical_json, lp, u64
from cosilo_common.errors import CosiloError
from cosilo_common.identity.documents import Bytes32, Bytes64, Document, Name, Version, parse_document
from cosilo_common.identity.endorsement import Endorsement
from cosilo_common.identity.keys import PUBLIC_KEY_BYTES, public_bytes, signature_holds
from cosilo_common.identity.names import PeerName, Role

MEMBERS_MAX = 4096  # four times the participants that one run may have; the list still travels in one message
ADMINS_MAX = 64  # people who may start runs; each is a key that can rewrite the list
ROLLOVERS_MAX = 256  # changes of the admins in a federation's life: one a month for twenty years
MEMBERS_BYTES_MAX = 6 << 20  # 4096 entries of 180 bytes, as many burnt names, and 4096 endorsements of 1.1 KB


class Member(Document):
    """One party that belongs: key is its Ed25519 public key, 32 bytes; added is the version of the list that brought
    this key."""

    name: Name
    role: Role
    key: Bytes32
    added: Version

    @field_validator("role")
    @classmethod
    def _no_coordinator(cls, role: Role) -> Role:
        if role is Role.COORDINATOR:
            raise ValueError("the coordinator is no member: it holds no key that members trust")
        return role


class Anchor(Document):
    """The admins that a reader already believes in: as of which version (0: since the founding), and their Ed25519
    public keys by name."""

    version: int = Field(ge=0)
    admins: dict[Name, Bytes32] = Field(min_length=1, max_length=ADMINS_MAX)


class MembersList(Document):
    """One version of the list.

    members: sorted by name, each name and key once, at least one admin; removed: burnt names, sorted, which no
    endorsement can bring back.
    """

    version: Version
    federation: Name
    members: tuple[Member, ...] = Field(max_length=MEMBERS_MAX)
    removed: tuple[Name, ...] = Field(default=(), max_length=MEMBERS_MAX)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [member.name for member in self.members]
        if names != sorted(set(names)):
            raise ValueError("members must be sorted by name, each once")
        if len({member.key for member in self.members}) != len(names):
            raise ValueError("members: two have one key")
        if list(self.removed) != sorted(set(self.removed)) or set(self.removed) & set(names):
            raise ValueError("removed must be sorted, each once, and none of them a member")
        if any(member.added > self.version for member in self.members):
            raise ValueError("members: one was added after this version")
        if not 1 <= len(self.admins()) <= ADMINS_MAX:
            raise ValueError(f"members: from 1 to {ADMINS_MAX} of them must be admins")
        return self

    def member(self, name: str) -> Member | None:
        """The entry of this name."""
        return next((member for member in self.members if member.name == name), None)

    def admins(self) -> dict[str, bytes]:
        """Ed25519 public keys of the admins by name."""
        return {member.name: member.key for member in self.members if member.role is Role.ADMIN}

    def approve(self, name: str, role: Role, key: bytes, readmit: bool = False) -> MembersList:
        """The draft with one member more. readmit: the name was used before, with another key, and that is known and
        meant."""
        PeerName(self.federation, role, name)
        if role is Role.COORDINATOR or len(key) != PUBLIC_KEY_BYTES:
            raise CosiloError("approve member", f"{name}: not a site's or an admin's Ed25519 key", "have it enrol again")
        present = self.member(name)
        if present is not None and (present.key, present.role) == (key, role):
            raise CosiloError("approve member", f"{name} is a member with this very key", "nothing is left to do")
        if present is not None and present.role is not role:
            raise CosiloError("approve member", f"{name} is {_a(present.role)}, not {_a(role)}", "choose another name")
        if not readmit and present is not None:
            raise CosiloError(
                "approve member",
                f"{name} is a member with another key",
                f"if {name} is known to have enrolled again, readmit it",
            )
        if not readmit and name in self.removed:
            raise CosiloError("approve member", f"{name} was removed from this federation", "if it may come back, readmit it")
        if any(member.key == key for member in self.members if member.name != name):
            raise CosiloError("approve member", f"{name}'s key is another member's", "have it enrol with a key of its own")
        entry = Member(name=name, role=role, key=key, added=self.version)
        others = [member for member in self.members if member.name != name]
        return self._with([*others, entry], set(self.removed) - {name})

    def remove(self, name: str) -> MembersList:
        """The draft with one member less; the name stays burnt until somebody readmits it."""
        gone = self.member(name)
        if gone is None:
            raise CosiloError("remove member", f"{name} is not a member", "run cosilo members for the list")
        if gone.role is Role.ADMIN and len(self.admins()) == 1:
            raise CosiloError("remove member", f"{name} is the only admin", "approve another admin first")
        return self._with([member for member in self.members if member.name != name], {*self.removed, name})

    def _with(self, members: list[Member], removed: set[str]) -> MembersList:
        if len(members) > MEMBERS_MAX or len(removed) > MEMBERS_MAX:
            raise CosiloError(
                "change members",
                f"a list holds at most {MEMBERS_MAX} members and as many burnt names",
                "found another federation",
            )
        ordered = tuple(sorted(members, key=lambda member: member.name))
        return MembersList(version=self.version, federation=self.federation, members=ordered, removed=tuple(sorted(removed)))


class Rollover(Document):
    """The admins as of a version at which they changed, signed by one who was an admin before it and is one still."""

    version: Version
    admins: dict[Name, Bytes32] = Field(min_length=1, max_length=ADMINS_MAX)
    signer: Name
    signature: Bytes64

    def statement(self, federation: str) -> bytes:
        """What the signer signs."""
        return _rollover_statement(federation, self.version, self.admins)


class SignedMembers(Document):
    """A members list as it travels and is stored: the list, who signed it, the rollovers so far, and the pre-approved
    sites not absorbed yet.

    rollovers: oldest first; endorsed: sorted by name.
    """

    list: MembersList
    signer: Name
    signature: Bytes64
    rollovers: tuple[Rollover, ...] = Field(default=(), max_length=ROLLOVERS_MAX)
    endorsed: tuple[Endorsement, ...] = Field(default=(), max_length=MEMBERS_MAX)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        versions = [rollover.version for rollover in self.rollovers]
        if versions != sorted(set(versions)) or any(version > self.list.version for version in versions):
            raise ValueError("rollovers must be oldest first, one a version, none after the list's")
        names = [endorsement.name for endorsement in self.endorsed]
        if names != sorted(set(names)):
            raise ValueError("endorsed must be sorted by name, each once")
        if set(names) & ({member.name for member in self.list.members} | set(self.list.removed)):
            raise ValueError("endorsed: a name is a member's already, or was removed")
        keys = {endorsement.signing_key for endorsement in self.endorsed}
        if len(keys) != len(names) or keys & {member.key for member in self.list.members}:
            raise ValueError("endorsed: two members have one key")
        return self

    @property
    def version(self) -> int:
        """The list's version."""
        return self.list.version

    @property
    def revision(self) -> tuple[int, int]:
        """Version, then endorsements: grows with every change, the unsigned-for ones too."""
        return self.version, len(self.endorsed)

    def everyone(self) -> tuple[Member, ...]:
        """All who belong, sorted by name, the endorsed among them."""
        endorsed = (Member(name=e.name, role=Role.SITE, key=e.signing_key, added=self.version) for e in self.endorsed)
        return tuple(sorted([*self.list.members, *endorsed], key=lambda member: member.name))

    def member(self, name: str) -> Member | None:
        """The entry of this name, the endorsed included."""
        return next((member for member in self.everyone() if member.name == name), None)

    def admins(self) -> dict[str, bytes]:
        """Ed25519 public keys of the admins by name."""
        return self.list.admins()

    def anchor(self) -> Anchor:
        """What a reader who has verified this list believes from now on."""
        return Anchor(version=self.version, admins=self.admins())

    def draft(self) -> MembersList:
        """The next version to change and sign; it absorbs the endorsed."""
        members = tuple(
            member if self.list.member(member.name) else member.model_copy(update={"added": self.version + 1}) for member in self.everyone()
        )
        return MembersList(version=self.version + 1, federation=self.list.federation, members=members, removed=self.list.removed)

    def endorse(self, endorsement: Endorsement) -> SignedMembers:
        """The same version with a pre-approved site appended. Raises CosiloError where its chain does not hold or its
        name or key is taken."""
        if endorsement in self.endorsed:
            return self
        if not endorsement.holds(self.list.federation, self.admins()):
            raise CosiloError(
                "endorse site",
                f"{endorsement.name}'s pre-approval is not by an admin of this list",
                "have an admin approve it",
            )
        if self.member(endorsement.name) is not None or endorsement.name in self.list.removed:
            raise CosiloError("endorse site", f"the name {endorsement.name} is taken or was removed", "have an admin approve it")
        if any(member.key == endorsement.signing_key for member in self.everyone()):
            raise CosiloError("endorse site", f"{endorsement.name}'s key is another member's", "have it enrol with a key of its own")
        if len(self.everyone()) >= MEMBERS_MAX:
            raise CosiloError("endorse site", f"a list holds at most {MEMBERS_MAX} members", "found another federation")
        endorsed = tuple(sorted([*self.endorsed, endorsement], key=lambda e: e.name))
        return self._with_endorsed(endorsed)

    def succeeded_by(self, offered: SignedMembers) -> SignedMembers:
        """What the coordinator stores when an admin offers a verified next version: that, and the endorsements that
        came in meanwhile.

        Raises CosiloError unless it is exactly the next version.
        """
        if offered.version != self.version + 1:
            raise CosiloError(
                "store members",
                f"version {offered.version} does not follow {self.version}",
                "somebody else changed the list meanwhile: run the command again",
            )
        taken = {member.name for member in offered.everyone()} | set(offered.list.removed)
        keys = {member.key for member in offered.everyone()}
        kept = [
            e
            for e in self.endorsed
            if e.name not in taken and e.signing_key not in keys and e.holds(self.list.federation, offered.admins())
        ]
        return offered._with_endorsed(tuple(sorted([*offered.endorsed, *kept], key=lambda e: e.name)))

    def _with_endorsed(self, endorsed: tuple[Endorsement, ...]) -> SignedMembers:
        return SignedMembers(list=self.list, signer=self.signer, signature=self.signature, rollovers=self.rollovers, endorsed=endorsed)


def found_members(federation: str, admin: str, key: Ed25519PrivateKey) -> SignedMembers:
    """Version 1: the first admin alone, signed by themselves."""
    entry = Member(name=admin, role=Role.ADMIN, key=public_bytes(key), added=1)
    first = MembersList(version=1, federation=federation, members=(entry,))
    return SignedMembers(list=first, signer=admin, signature=key.sign(_list_statement(first)))


def sign_members(previous: SignedMembers, draft: MembersList, signer: str, key: Ed25519PrivateKey) -> SignedMembers:
    """Signs a draft as the version after `previous`. Raises CosiloError unless the signer is an admin in both, by this
    key."""
    mine = public_bytes(key)
    if previous.admins().get(signer) != mine:
        raise CosiloError("sign members", f"{signer} is not an admin by this key", "sign with the key of an admin of the newest list")
    if draft.admins().get(signer) != mine:
        raise CosiloError("sign members", f"{signer} cannot remove themselves or change their own key", "ask another admin to do it")
    if draft.version != previous.version + 1 or draft.federation != previous.list.federation:
        raise CosiloError("sign members", "the draft does not follow the newest list", "run the command again")
    rollovers = previous.rollovers
    if draft.admins() != previous.admins():
        if len(rollovers) == ROLLOVERS_MAX:
            raise CosiloError("sign members", f"the admins changed {ROLLOVERS_MAX} times already", "found another federation")
        admins = draft.admins()
        signature = key.sign(_rollover_statement(draft.federation, draft.version, admins))
        rollovers = (*rollovers, Rollover(version=draft.version, admins=admins, signer=signer, signature=signature))
    return SignedMembers(list=draft, signer=signer, signature=key.sign(_list_statement(draft)), rollovers=rollovers)


def read_members(data: bytes, federation: str, anchor: Anchor, known: SignedMembers | None = None) -> SignedMembers:
    """Parses a members list and verifies it.

    anchor: the admins believed in before this list; known: the newest list seen, which replaces the anchor and which
    nothing older may follow.
    Raises CosiloError with what is wrong and what to do.
    """
    offered = parse_document(SignedMembers, data, MEMBERS_BYTES_MAX, "read members list")
    verify_members(offered, federation, anchor if known is None else known.anchor())
    if known is not None:
        _check_not_older(known, offered)
    return offered


def verify_members(offered: SignedMembers, federation: str, anchor: Anchor) -> None:
    """Follows the signatures from the anchor's admins to this list. Raises CosiloError where one link does not hold."""
    version = offered.version
    if offered.list.federation != federation:
        raise _refused(version, f"it is of federation {offered.list.federation!r}, not {federation!r}")
    if version < anchor.version:
        raise _refused(
            version,
            f"version {anchor.version} was seen before",
            "tell the admin: the coordinator went back (after a restore: cosilo members --put-back), or somebody else answers",
        )
    admins: dict[str, bytes] = dict(anchor.admins)
    for rollover in offered.rollovers:
        if rollover.version <= anchor.version:
            continue  # what led to the anchor; the anchor is believed already
        key = admins.get(rollover.signer)
        if key is None or rollover.admins.get(rollover.signer) != key:
            raise _refused(
                version,
                f"the admins of version {rollover.version} are not signed by an admin from before who stayed one",
            )
        if not signature_holds(key, rollover.signature, rollover.statement(federation)):
            raise _refused(version, f"{rollover.signer}'s signature of the admins of version {rollover.version} does not hold")
        if rollover.version == version and rollover.signer != offered.signer:
            raise _refused(version, f"{rollover.signer} signed its admins but {offered.signer} signed the list")
        admins = dict(rollover.admins)
    if offered.admins() != admins:
        raise _refused(version, "its admins are not those that the signatures lead to")
    if offered.signer not in admins:
        raise _refused(version, f"its signer {offered.signer} is not an admin")
    if not signature_holds(admins[offered.signer], offered.signature, _list_statement(offered.list)):
        raise _refused(version, f"{offered.signer}'s signature does not hold")
    for endorsement in offered.endorsed:
        if not endorsement.holds(federation, admins):
            raise _refused(version, f"the pre-approval of {endorsement.name} does not hold")


def _check_not_older(known: SignedMembers, offered: SignedMembers) -> None:
    if offered.version > known.version:
        return
    if offered.list != known.list:
        raise _refused(
            offered.version,
            "another list of the same version was seen before",
            "tell the admins: one of their keys signed twice",
        )
    if not set(known.endorsed) <= set(offered.endorsed):
        raise _refused(offered.version, "a pre-approved site that was in it is gone", "tell the admin: the coordinator went back")


def _list_statement(members: MembersList) -> bytes:
    return lp(b"cosilo/members/1", members.federation.encode(), u64(members.version), members.canonical())


def _rollover_statement(federation: str, version: int, admins: dict[str, bytes]) -> bytes:
    return lp(
        b"cosilo/admins/1",
        federation.encode(),
        u64(version),
        canonical_json({name: key.hex() for name, key in admins.items()}),
    )


def _refused(version: int, reason: str, hint: str = "keep the list you have and tell the admin") -> CosiloError:
    return CosiloError("verify members list", f"version {version}: {reason}", hint)


def _a(role: Role) -> str:
    return "an admin" if role is Role.ADMIN else f"a {role}"
