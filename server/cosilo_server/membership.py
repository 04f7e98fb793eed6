"""The members list and the invitations as the coordinator keeps them: stores what admins signed, and answers who belongs.

Owns the newest list in memory. The coordinator can append a pre-approved site whose chain verifies (identity/endorsement.py) and nothing else:
it holds no admin's key. Blocks on the disk; callers on an event loop use a thread, and one of them at a time changes the list (a lock).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum

from cosilo_common.errors import CosiloError
from cosilo_common.identity.documents import parse_document
from cosilo_common.identity.endorsement import PREAPPROVAL_BYTES_MAX, Endorsement, parse_preapproval
from cosilo_common.identity.members import MEMBERS_BYTES_MAX, SignedMembers, read_members
from cosilo_common.identity.names import Peer, Role
from cosilo_server.enrolment import EnrolmentRecord, OpenInvitation
from cosilo_server.store import Store

AHEAD_MAX = (
    4096  # versions that a restored coordinator may have missed; one admin who signs the last version there is must not have the last word
)


def check_not_far_ahead(operation: str, offered: int, known: int) -> None:
    """Raises CosiloError where a document's version leaves too many out."""
    if offered > known + AHEAD_MAX:
        raise CosiloError(operation, f"version {offered} is {offered - known} versions ahead of {known}", "find out which admin signed it")


class Removal(Enum):
    """What an admin revoked of somebody who is no member; NAME: the name that it bears, with keys that were never a member's."""

    NOTHING = "nothing"
    NAME = "name"
    KEYS = "keys"


class StoredMembers:
    """Who belongs to the federation. founding: the list that `cosilo init` made, for a new data folder."""

    def __init__(self, store: Store, federation: str, founding: bytes, changed: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._federation = federation
        self._changed = changed
        self._lock = threading.Lock()
        stored = store.newest_members()
        first = parse_document(SignedMembers, founding, MEMBERS_BYTES_MAX, "read members list")
        anchor = first.anchor()
        self._newest = read_members(stored or founding, federation, anchor)
        if stored is None:
            store.put_members(*self._newest.revision, founding)

    def on_change(self, changed: Callable[[], None]) -> None:
        """Called, from whichever thread, after the list has changed."""
        self._changed = changed

    def newest(self) -> SignedMembers:
        """The newest list."""
        return self._newest

    def version(self) -> int:
        """Grows with every change, endorsements included: version times 2^16 plus endorsements."""
        version, revision = self._newest.revision
        return (version << 16) + revision

    def data(self) -> bytes:
        """The newest list as it travels."""
        return self._newest.canonical()

    def is_member(self, peer: Peer) -> bool:
        """Whether the peer stands in the list: its name, in its role, and under the Ed25519 key with which its TLS key enrolled.

        A certificate is issued for an invitation, before anybody approves, so a name alone is not enough: whoever got hold of a second
        invitation for a member's name, or of the certificate from before the member was readmitted with new keys, would be that member.
        A TLS key that never enrolled here is the first admin's, or of a federation's own PKI, which vouches for names.
        """
        entry = self._newest.member(peer.name.name)
        if entry is None or entry.role is not peer.name.role:
            return False
        if entry.role is Role.SITE and self._store.left_at(entry.name, entry.key):
            return False
        enrolled = self._store.enrolled_with(peer.key_digest)
        return not enrolled or (entry.role.value, entry.name, entry.key) in enrolled

    def was_removed(self, name: str, key: bytes) -> bool:
        """Whether an admin revoked this name, which nobody has readmitted, and it was this Ed25519 key's. Reads every list that is stored.

        A removed name may come back under a key that no list ever had, if an admin readmits it; the key that was removed may not.
        """
        return name in self._newest.list.removed and self._store.was_member(key)

    def removal(self, peer: Peer) -> Removal:
        """What an admin revoked of this peer, and nobody has readmitted. Reads as `was_removed` does: not for an event loop."""
        name = peer.name.name
        if name not in self._newest.list.removed:
            return Removal.NOTHING
        enrolled = self._store.enrolled_with(peer.key_digest)
        fresh = enrolled and not any(self.was_removed(name, key) for _, _, key in enrolled)
        return Removal.NAME if fresh else Removal.KEYS

    def has_site(self, name: str, key: bytes) -> bool:
        """Whether a site of this name and Ed25519 key (32 bytes) is a member and did not leave."""
        entry = self._newest.member(name)
        return entry is not None and entry.role is Role.SITE and entry.key == key and not self._store.left_at(name, key)

    def put(self, data: bytes) -> None:
        """Takes the next version from an admin, or, after a restore, the newest that an admin has seen.

        Raises CosiloError where a signature does not hold or it does not follow.
        """
        with self._lock:
            offered = read_members(data, self._federation, self._newest.anchor(), self._newest)
            if offered == self._newest:
                return
            check_not_far_ahead("store members", offered.version, self._newest.version)
            # A list that is further than the next was stored here before: this store is a restored one, and the admin saw what it forgot.
            known = self._newest
            ahead = offered.version > known.version + 1 or (offered.list == known.list and offered.signer == known.signer)
            self._keep(offered if ahead else self._newest.succeeded_by(offered))

    def leave(self, site: str) -> None:
        """A site leaves by itself: it counts as no member from now on, though the list names it until an admin signs the next."""
        with self._lock:
            entry = self._newest.member(site)
            if entry is None or entry.role is not Role.SITE:
                raise CosiloError("leave", f"{site} is not a member", "nothing is left to do")
            self._store.site_left(site, entry.key)
            self._changed()

    def endorse(self, endorsement: Endorsement) -> SignedMembers:
        """Appends a pre-approved site. Raises CosiloError where its chain does not hold."""
        with self._lock:
            endorsed = self._newest.endorse(endorsement)
            if endorsed is not self._newest:
                self._keep(endorsed)
            return self._newest

    def _keep(self, members: SignedMembers) -> None:
        self._store.put_members(*members.revision, members.canonical())
        self._newest = members
        self._changed()


class StoredInvitations:
    """The coordinator's invitation book, in its store (enrolment.InvitationBook)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, invitation: OpenInvitation) -> None:
        """Keeps an invitation. Raises CosiloError where its token is there already."""
        added = self._store.add_invitation(
            {
                "token_public": invitation.token_public,
                "name": invitation.name,
                "role": invitation.role.value,
                "expires_unix_s": invitation.expires_unix_s,
                "preapproval": invitation.preapproval.canonical() if invitation.preapproval else b"",
            }
        )
        if not added:
            raise CosiloError("invite", f"{invitation.name}: this token was used for an invitation before", "invite again")

    def find(self, token_public: bytes) -> OpenInvitation | None:
        """The invitation with this token, used or not."""
        row = self._store.invitation(token_public)
        if row is None:
            return None
        preapproval = parse_preapproval(row["preapproval"]) if row["preapproval"] else None
        return OpenInvitation(row["name"], Role(row["role"]), row["token_public"], row["expires_unix_s"], preapproval)

    def enrolment(self, token_public: bytes) -> EnrolmentRecord | None:
        """What came of it, if it was used."""
        row = self._store.enrolment(token_public)
        if row is None:
            return None
        fields = {
            key: row[key] for key in ("token_public", "name", "signing_key", "tls_key_digest", "certificate_chain", "enrolled_unix_s")
        }
        endorsement = _parse_endorsement(row["endorsement"]) if row["endorsement"] else None
        return EnrolmentRecord(**fields, role=Role(row["role"]), endorsement=endorsement)

    def wrong_tries(self, token_public: bytes) -> int:
        """How often the token was shown by somebody who did not hold what belongs to it."""
        return self._store.wrong_tries(token_public)

    def note_wrong_try(self, token_public: bytes) -> None:
        """Counts one more."""
        self._store.add_wrong_try(token_public)

    def burn(self, record: EnrolmentRecord) -> EnrolmentRecord:
        """Uses the token up with this record unless it was used before; returns the record that stands."""
        self._store.add_enrolment(
            {
                "token_public": record.token_public,
                "name": record.name,
                "role": record.role.value,
                "signing_key": record.signing_key,
                "tls_key_digest": record.tls_key_digest,
                "certificate_chain": record.certificate_chain,
                "enrolled_unix_s": record.enrolled_unix_s,
                "endorsement": record.endorsement.canonical() if record.endorsement else b"",
            }
        )
        standing = self.enrolment(record.token_public)
        assert standing is not None  # one row was just made to stand, ours or an earlier one
        return standing


def _parse_endorsement(data: bytes) -> Endorsement:
    return parse_document(Endorsement, data, 2 * PREAPPROVAL_BYTES_MAX, "read endorsement")
