"""Decides enrolments: is this request by somebody whom an admin invited, once, for this name, in time, and do they hold
the keys they show?

The certificate it hands out opens the federation port and nothing more; membership is the admins' signature on the
members list, or the chain of a `--local-demo` pre-approval. The store is behind two small protocols. Must not know
protobuf, sockets, or the clock (`now` is passed in).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CSR_BYTES_MAX, read_csr
from cosilo_common.identity.endorsement import Endorsement, Preapproval
from cosilo_common.identity.enrolment import EnrolAnswer, EnrolRequest
from cosilo_common.identity.invitation import INVITATION_LIFE_MAX_S
from cosilo_common.identity.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, signature_holds, tls_public_bytes
from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.names import PeerName, Role
from cosilo_server.authority import Authority

ATTEMPTS_MAX = 10  # a person who mistypes needs three; a guesser of a 256-bit key needs more than ten
ATTEMPTS_WINDOW_S = 60.0
ATTEMPTS_IN_ALL_MAX = 240  # four a second from everybody: a federation enrols a few sites a day, and each attempt asks the database
WRONG_TRIES_MAX = 10  # with one invitation's token: then it is burnt, for it is in hands that do not know what it is
SOURCES_MAX = 4096  # addresses remembered; the longest silent is forgotten first, so memory stays under a megabyte
_CLOCK_SLACK_S = 300  # an admin's laptop may be this far ahead when it names the longest expiry


class RefusalReason(StrEnum):
    """Why an enrolment was refused: for the log, the metric and the answer alike."""

    MALFORMED = "malformed"
    UNKNOWN = "unknown invitation"
    EXPIRED = "invitation expired"
    USED = "invitation used"
    NAME = "wrong name"
    SIGNATURE = "signature"
    RATE = "too many attempts"
    BURNT = "invitation burnt"


class EnrolmentRefused(CosiloError):
    """An enrolment that is not granted, with the reason as an enum."""

    def __init__(self, reason: RefusalReason, subject: str, hint: str) -> None:
        self.reason = reason
        super().__init__("enrol", subject, hint)


@dataclass(frozen=True, slots=True)
class OpenInvitation:
    """The public half of an invitation, as the coordinator keeps it: token_public is Ed25519, 32 bytes; expires_unix_s
    is UTC."""

    name: str
    role: Role
    token_public: bytes
    expires_unix_s: int
    preapproval: Preapproval | None = None


@dataclass(frozen=True, slots=True)
class EnrolmentRecord:
    """What came of an invitation, kept for ever: it is what makes the token one-time, and what answers a party that
    lost the answer.

    signing_key: Ed25519, 32 bytes; tls_key_digest: SHA-256 of the TLS key's SubjectPublicKeyInfo; certificate_chain:
    PEM as issued; endorsement: set where an admin had pre-approved the site.
    """

    token_public: bytes
    name: str
    role: Role
    signing_key: bytes
    tls_key_digest: bytes
    certificate_chain: bytes
    enrolled_unix_s: int
    endorsement: Endorsement | None = None


class InvitationBook(Protocol):
    """Where invitations and what came of them are kept. Every method is one transaction."""

    def put(self, invitation: OpenInvitation) -> None:
        """Keeps an invitation. Raises CosiloError where its token is there already."""

    def find(self, token_public: bytes) -> OpenInvitation | None:
        """The invitation with this token, used or not."""

    def enrolment(self, token_public: bytes) -> EnrolmentRecord | None:
        """What came of it, if it was used."""

    def wrong_tries(self, token_public: bytes) -> int:
        """How often somebody showed this token and did not hold what belongs to it."""

    def note_wrong_try(self, token_public: bytes) -> None:
        """Counts one more, durably."""

    def burn(self, record: EnrolmentRecord) -> EnrolmentRecord:
        """Uses the token up with this record unless it was used before; returns the record that stands. Durable on
        return."""


class MembersBook(Protocol):
    """Where the newest members list is kept. Every method is one transaction."""

    def newest(self) -> SignedMembers:
        """The newest list."""

    def endorse(self, endorsement: Endorsement) -> SignedMembers:
        """Keeps `newest().endorse(endorsement)` and returns it; raises its CosiloError. Durable on return."""


class AttemptLimit:
    """At most ATTEMPTS_MAX attempts from one source in ATTEMPTS_WINDOW_S, in bounded memory."""

    def __init__(self, attempts_max: int = ATTEMPTS_MAX, window_s: float = ATTEMPTS_WINDOW_S, sources_max: int = SOURCES_MAX) -> None:
        self._attempts_max = attempts_max
        self._window_s = window_s
        self._sources_max = sources_max
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def allow(self, source: str, now_s: float) -> bool:
        """Counts an attempt and says whether it is within the limit. source: the caller's address without its port."""
        began, count = self._seen.pop(source, (now_s, 0))
        if now_s - began >= self._window_s:
            began, count = now_s, 0
        allowed = count < self._attempts_max
        self._seen[source] = (began, count + 1 if allowed else count)
        while len(self._seen) > self._sources_max:
            self._seen.popitem(last=False)
        return allowed


class EnrolmentDesk:
    """Takes invitations from admins and requests from the invited."""

    def __init__(
        self,
        authority: Authority,
        invitations: InvitationBook,
        members: MembersBook,
        attempts: AttemptLimit | None = None,
    ) -> None:
        self._authority = authority
        self._invitations = invitations
        self._members = members
        self._attempts = attempts or AttemptLimit()
        self._attempts_in_all = AttemptLimit(ATTEMPTS_IN_ALL_MAX, sources_max=1)

    def invite(self, invitation: OpenInvitation, now: datetime) -> None:
        """Keeps an invitation that an admin made. Raises CosiloError where it could never be used as it stands."""
        PeerName(self._authority.federation, invitation.role, invitation.name)
        left_s = invitation.expires_unix_s - now.timestamp()
        subject = f"{invitation.role} {invitation.name}"
        if invitation.role is Role.COORDINATOR or len(invitation.token_public) != PUBLIC_KEY_BYTES:
            raise CosiloError("invite", f"{subject}: its role or its token is malformed", "make the invitation again")
        if not 0 < left_s <= INVITATION_LIFE_MAX_S + _CLOCK_SLACK_S:
            raise CosiloError(
                "invite",
                f"{subject}: by the coordinator's clock it expires in {left_s:.0f} s",
                f"choose an expiry within {INVITATION_LIFE_MAX_S // 86400} days, and check the clocks",
            )
        if invitation.preapproval is not None:
            self._check_preapproval(invitation, invitation.preapproval)
        self._invitations.put(invitation)

    def enrol(self, request: EnrolRequest, source: str, now: datetime) -> EnrolAnswer:
        """Grants or refuses one request. source: the caller's address without its port, or its network.

        The same keys may ask again (an answer was lost) and get the same certificate; the token is used up all the
        same. Raises EnrolmentRefused.
        """
        if not self._attempts.allow(source, now.timestamp()):
            raise EnrolmentRefused(RefusalReason.RATE, "too many attempts from this address", "wait a minute and try again")
        if not self._attempts_in_all.allow("", now.timestamp()):
            raise EnrolmentRefused(RefusalReason.RATE, "too many attempts in all", "wait a minute and try again")
        invitation = self._known_invitation(request)
        role = invitation.role
        try:
            self._verify(request, invitation)
            try:
                key = read_csr(request.csr, PeerName(self._authority.federation, role, request.name))
            except CosiloError as error:
                raise EnrolmentRefused(RefusalReason.MALFORMED, error.subject, error.hint) from None
        except EnrolmentRefused:
            self._invitations.note_wrong_try(request.token_public)
            raise
        key_digest = sha256(tls_public_bytes(key))

        standing = self._invitations.enrolment(request.token_public)
        if standing is None:
            if now.timestamp() > invitation.expires_unix_s:
                raise EnrolmentRefused(
                    RefusalReason.EXPIRED,
                    f"the invitation of {request.name} has expired",
                    "ask the admin for a new one",
                )
            issue = self._authority.issue_admin_certificate if role is Role.ADMIN else self._authority.issue_site_certificate
            record = EnrolmentRecord(
                token_public=request.token_public,
                name=request.name,
                role=role,
                signing_key=request.signing_key,
                tls_key_digest=key_digest,
                certificate_chain=issue(request.csr, request.name, now),
                enrolled_unix_s=int(now.timestamp()),
                endorsement=_endorsement(invitation, request),
            )
            standing = self._invitations.burn(record)
        if (standing.signing_key, standing.tls_key_digest) != (request.signing_key, key_digest):
            raise EnrolmentRefused(
                RefusalReason.USED,
                f"the invitation of {request.name} was used before, with other keys",
                "if that was not you, tell the admin at once; otherwise ask for a new one",
            )
        return self._answer(standing)

    def _known_invitation(self, request: EnrolRequest) -> OpenInvitation:
        """The request's invitation, found before anything costs a signature's arithmetic."""
        sizes = (
            len(request.token_public),
            len(request.signing_key),
            len(request.token_signature),
            len(request.signing_signature),
        )
        if sizes != (PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES, SIGNATURE_BYTES, SIGNATURE_BYTES) or len(request.csr) > CSR_BYTES_MAX:
            raise EnrolmentRefused(RefusalReason.MALFORMED, "a key, a signature or the CSR has a wrong size", "run the enrolment again")
        invitation = self._invitations.find(request.token_public)
        if invitation is None:
            raise EnrolmentRefused(
                RefusalReason.UNKNOWN,
                "there is no such invitation here",
                "check the address, or ask the admin for a new one",
            )
        unused = self._invitations.enrolment(request.token_public) is None
        if unused and self._invitations.wrong_tries(request.token_public) >= WRONG_TRIES_MAX:
            raise EnrolmentRefused(
                RefusalReason.BURNT,
                f"the invitation of {invitation.name} was tried {WRONG_TRIES_MAX} times by somebody who did not hold what belongs to it",
                "ask the admin for a new one, and how the old one got about",
            )
        return invitation

    def _verify(self, request: EnrolRequest, invitation: OpenInvitation) -> None:
        statement = request.statement(self._authority.federation, invitation.role)
        if not signature_holds(request.token_public, request.token_signature, statement):
            raise EnrolmentRefused(RefusalReason.SIGNATURE, "the token's signature does not hold", "use the invitation's file as it is")
        if not signature_holds(request.signing_key, request.signing_signature, statement):
            raise EnrolmentRefused(RefusalReason.SIGNATURE, "the signing key's signature does not hold", "run the enrolment again")
        if request.name != invitation.name:
            raise EnrolmentRefused(
                RefusalReason.NAME,
                f"the invitation is not for {request.name[:63]!r}",
                "use the invitation's file as it is",
            )

    def _answer(self, standing: EnrolmentRecord) -> EnrolAnswer:
        members = self._members.newest()
        if standing.endorsement is not None and members.member(standing.name) is None:
            try:
                members = self._members.endorse(standing.endorsement)
            except CosiloError:  # the admin left, or the name was removed meanwhile: then an admin decides, as for any site
                pass
        entry = members.member(standing.name)
        member = entry is not None and (entry.role, entry.key) == (standing.role, standing.signing_key)
        return EnrolAnswer(certificate_chain=standing.certificate_chain, member=member, members=members.canonical())

    def _check_preapproval(self, invitation: OpenInvitation, preapproval: Preapproval) -> None:
        members = self._members.newest()
        promised = (preapproval.federation, preapproval.name, preapproval.token_public, preapproval.expires_unix_s)
        mine = (self._authority.federation, invitation.name, invitation.token_public, invitation.expires_unix_s)
        if invitation.role is not Role.SITE or promised != mine or not preapproval.holds(members.admins()):
            raise CosiloError("invite", f"{invitation.name}: its pre-approval does not hold", "make the invitation again")
        if members.member(invitation.name) is not None or invitation.name in members.list.removed:
            raise CosiloError(
                "invite",
                f"{invitation.name}: the name is a member's or was removed",
                "invite without --local-demo, and approve by hand",
            )


def _endorsement(invitation: OpenInvitation, request: EnrolRequest) -> Endorsement | None:
    if invitation.preapproval is None:
        return None
    return Endorsement(
        preapproval=invitation.preapproval,
        signing_key=request.signing_key,
        csr_digest=sha256(request.csr),
        token_signature=request.token_signature,
        signing_signature=request.signing_signature,
    )
