"""The members list: who may sign the next version, and what a reader refuses."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import (
    MEMBERS_BYTES_MAX,
    Anchor,
    Member,
    MembersList,
    SignedMembers,
    found_members,
    read_members,
    sign_members,
)
from cosilo_common.identity.names import Role

F = "north-star"
ADA, BEA, CAL, ANNA, OLAV = (make_signing_key() for _ in range(5))
ANCHOR = Anchor(version=0, admins={"ada": public_bytes(ADA)})
FOUNDED = found_members(F, "ada", ADA)


def with_member(
    previous: SignedMembers,
    name: str,
    role: Role,
    key: Ed25519PrivateKey,
    signer: tuple[str, Ed25519PrivateKey] = ("ada", ADA),
) -> SignedMembers:
    return sign_members(previous, previous.draft().approve(name, role, public_bytes(key)), *signer)


def read(signed: SignedMembers, anchor: Anchor = ANCHOR, known: SignedMembers | None = None, federation: str = F) -> SignedMembers:
    return read_members(signed.canonical(), federation, anchor, known)


def refused(signed: SignedMembers, anchor: Anchor = ANCHOR, known: SignedMembers | None = None) -> str:
    with pytest.raises(CosiloError) as caught:
        read(signed, anchor, known)
    assert caught.value.operation == "verify members list"
    assert caught.value.hint
    return caught.value.subject


def test_a_federation_begins_with_its_first_admin() -> None:
    assert read(FOUNDED) == FOUNDED
    assert FOUNDED.everyone() == (Member(name="ada", role=Role.ADMIN, key=public_bytes(ADA), added=1),)
    assert FOUNDED.revision == (1, 0)


def test_an_admin_adds_a_site() -> None:
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    assert read(v2) == v2
    assert v2.version == 2
    assert v2.member("st-anna") == Member(name="st-anna", role=Role.SITE, key=public_bytes(ANNA), added=2)
    assert v2.admins() == {"ada": public_bytes(ADA)}
    assert v2.rollovers == ()


def test_a_site_that_slept_follows_the_admins_from_the_one_it_knew() -> None:
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA)
    v3 = with_member(v2, "cal", Role.ADMIN, CAL, ("bea", BEA))
    v4 = sign_members(v3, v3.draft().remove("ada"), "cal", CAL)
    v5 = with_member(v4, "st-anna", Role.SITE, ANNA, ("cal", CAL))
    assert [rollover.version for rollover in v5.rollovers] == [2, 3, 4]
    for anchor in (ANCHOR, FOUNDED.anchor(), v2.anchor(), v3.anchor(), v4.anchor(), v5.anchor()):
        assert read(v5, anchor) == v5
    assert read(v5, ANCHOR, known=v2) == v5
    assert set(v5.admins()) == {"bea", "cal"}


def test_an_admin_who_left_signs_no_more() -> None:
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA)
    v3 = sign_members(v2, v2.draft().remove("ada"), "bea", BEA)
    with pytest.raises(CosiloError, match="ada is not an admin by this key"):
        with_member(v3, "st-anna", Role.SITE, ANNA)
    forged = SignedMembers(
        list=v3.draft().approve("st-anna", Role.SITE, public_bytes(ANNA)),
        signer="ada",
        signature=ADA.sign(b"whatever"),
        rollovers=v3.rollovers,
    )
    assert refused(forged) == "version 4: its signer ada is not an admin"


def test_a_stranger_cannot_sign_as_an_admin() -> None:
    draft = FOUNDED.draft().approve("st-anna", Role.SITE, public_bytes(ANNA))
    stranger = make_signing_key()
    with pytest.raises(CosiloError, match="ada is not an admin by this key"):
        sign_members(FOUNDED, draft, "ada", stranger)
    theirs = found_members(F, "ada", stranger)
    forged = sign_members(theirs, theirs.draft().approve("st-anna", Role.SITE, public_bytes(ANNA)), "ada", stranger)
    assert refused(forged) == "version 2: its admins are not those that the signatures lead to"
    mixed = forged.model_copy(update={"list": draft})
    assert refused(mixed) == "version 2: ada's signature does not hold"


def test_a_site_is_no_admin() -> None:
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    with pytest.raises(CosiloError, match="st-anna is not an admin by this key"):
        with_member(v2, "olav", Role.SITE, OLAV, ("st-anna", ANNA))


def test_an_unknown_admin_cannot_be_slipped_in() -> None:
    """A rollover signed by somebody who was no admin before leads nowhere, whatever the list says."""
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA)
    rollover = v2.rollovers[0].model_copy(update={"signer": "bea", "signature": BEA.sign(v2.rollovers[0].statement(F))})
    forged = v2.model_copy(update={"rollovers": (rollover,), "signer": "bea"})
    assert refused(forged) == "version 2: the admins of version 2 are not signed by an admin from before who stayed one"
    tampered = v2.model_copy(update={"rollovers": (v2.rollovers[0].model_copy(update={"signature": bytes(64)}),)})
    assert refused(tampered) == "version 2: ada's signature of the admins of version 2 does not hold"


def test_a_rollover_left_out_is_missed() -> None:
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA)
    assert refused(v2.model_copy(update={"rollovers": ()})) == ("version 2: its admins are not those that the signatures lead to")


def test_nobody_but_the_lists_signer_may_have_changed_its_admins() -> None:
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA)
    v3 = with_member(v2, "cal", Role.ADMIN, CAL)
    by_bea = sign_members(v2, v3.list, "bea", BEA)
    assert refused(by_bea.model_copy(update={"rollovers": v3.rollovers})) == ("version 3: ada signed its admins but bea signed the list")


def test_older_versions_are_refused() -> None:
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    assert refused(FOUNDED, known=v2) == "version 1: version 2 was seen before"
    assert refused(FOUNDED, anchor=v2.anchor()) == "version 1: version 2 was seen before"
    assert read(v2, known=v2) == v2


def test_two_lists_of_one_version_are_told_apart() -> None:
    one = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    other = with_member(FOUNDED, "st-olav", Role.SITE, OLAV)
    assert refused(other, known=one) == "version 2: another list of the same version was seen before"


def test_another_federations_list_is_refused() -> None:
    with pytest.raises(CosiloError, match="it is of federation 'north-star', not 'south-star'"):
        read(FOUNDED, federation="south-star")


def test_a_removed_name_stays_burnt_until_somebody_readmits_it() -> None:
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    v3 = sign_members(v2, v2.draft().remove("st-anna"), "ada", ADA)
    assert (v3.member("st-anna"), v3.list.removed) == (None, ("st-anna",))
    with pytest.raises(CosiloError, match="st-anna was removed from this federation; if it may come back, readmit it"):
        v3.draft().approve("st-anna", Role.SITE, public_bytes(OLAV))
    v4 = sign_members(v3, v3.draft().approve("st-anna", Role.SITE, public_bytes(OLAV), readmit=True), "ada", ADA)
    assert read(v4).list.removed == ()
    assert v4.member("st-anna") == Member(name="st-anna", role=Role.SITE, key=public_bytes(OLAV), added=4)


def test_approving_says_what_is_in_the_way() -> None:
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA).draft()
    with pytest.raises(CosiloError, match="st-anna is a member with this very key"):
        v2.approve("st-anna", Role.SITE, public_bytes(ANNA))
    with pytest.raises(CosiloError, match=r"st-anna is a member with another key; .* readmit it"):
        v2.approve("st-anna", Role.SITE, public_bytes(OLAV))
    with pytest.raises(CosiloError, match="st-anna is a site, not an admin"):
        v2.approve("st-anna", Role.ADMIN, public_bytes(OLAV), readmit=True)
    with pytest.raises(CosiloError, match="st-olav's key is another member's"):
        v2.approve("st-olav", Role.SITE, public_bytes(ANNA))
    again = v2.approve("st-anna", Role.SITE, public_bytes(OLAV), readmit=True).member("st-anna")
    assert again is not None
    assert (again.key, again.added) == (public_bytes(OLAV), 3)


def test_removing_says_what_is_in_the_way() -> None:
    with pytest.raises(CosiloError, match="nobody is not a member"):
        FOUNDED.draft().remove("nobody")
    with pytest.raises(CosiloError, match="ada is the only admin; approve another admin first"):
        FOUNDED.draft().remove("ada")


def test_an_admin_cannot_remove_themselves() -> None:
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA)
    with pytest.raises(CosiloError, match="ada cannot remove themselves or change their own key"):
        sign_members(v2, v2.draft().remove("ada"), "ada", ADA)


def test_a_draft_of_an_old_version_is_not_signed() -> None:
    stale = FOUNDED.draft()
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    with pytest.raises(CosiloError, match="the draft does not follow the newest list"):
        sign_members(v2, stale, "ada", ADA)


def test_the_coordinator_takes_exactly_the_next_version() -> None:
    v2 = with_member(FOUNDED, "st-anna", Role.SITE, ANNA)
    v3 = with_member(v2, "st-olav", Role.SITE, OLAV)
    assert FOUNDED.succeeded_by(v2) == v2
    with pytest.raises(CosiloError, match="version 3 does not follow 1; somebody else changed the list"):
        FOUNDED.succeeded_by(v3)
    with pytest.raises(CosiloError, match="version 2 does not follow 2"):
        v2.succeeded_by(v2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda d: d["list"].update(version=0), "list.version"),
        (lambda d: d["list"].update(version=1 << 53), "list.version"),
        (lambda d: d["list"].update(version="1"), "list.version"),
        (lambda d: d["list"].update(federation="F"), "list.federation"),
        (lambda d: d["list"].update(members=[]), "list: Value error, members: from 1 to 64 of them must be admins"),
        (lambda d: d["list"]["members"].append(d["list"]["members"][0]), "members must be sorted by name, each once"),
        (lambda d: d["list"]["members"][0].update(role="coordinator"), "the coordinator is no member"),
        (lambda d: d["list"]["members"][0].update(key="00"), "list.members.0.key"),
        (lambda d: d["list"]["members"][0].update(key="zz" * 32), "must be lower-case hex"),
        (lambda d: d["list"]["members"][0].update(added=2), "one was added after this version"),
        (lambda d: d["list"].update(removed=["ada"]), "none of them a member"),
        (lambda d: d["list"].update(removed=["b", "a"]), "removed must be sorted"),
        (lambda d: d.update(signature="00" * 63), "signature"),
        (lambda d: d.update(rollovers=[1]), "rollovers.0"),
    ],
)
def test_a_list_of_an_impossible_shape_is_refused_by_its_field(change: object, field: str) -> None:
    document = json.loads(FOUNDED.canonical())
    assert callable(change)
    change(document)
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(CosiloError) as caught:
        read_members(data, F, ANCHOR)
    assert caught.value.operation == "read members list"
    assert field in caught.value.subject


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"\n",
        lambda data: data.replace(b'"removed"', b' "removed"'),
        lambda data: data.replace(b'{"endorsed":[]', b'{"endorsed":[],"endorsed":[]'),
        lambda data: data.replace(public_bytes(ADA).hex().encode(), public_bytes(ADA).hex().upper().encode()),
    ],
)
def test_bytes_that_are_not_canonical_are_refused(spoil: object) -> None:
    assert callable(spoil)
    with pytest.raises(CosiloError, match=r"^read members list: "):
        read_members(spoil(FOUNDED.canonical()), F, ANCHOR)


def test_a_list_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(CosiloError, match=f"{MEMBERS_BYTES_MAX + 1} bytes are more than {MEMBERS_BYTES_MAX}"):
        read_members(bytes(MEMBERS_BYTES_MAX + 1), F, ANCHOR)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(CosiloError, match=r"^read members list: "):
        read_members(b"[" * 100_000, F, ANCHOR)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(repr).map(str.encode))
def test_bytes_that_are_no_list_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(CosiloError):
        read_members(data, F, ANCHOR)


@given(st.data())
def test_no_single_byte_of_a_signed_list_can_be_changed(data: st.DataObject) -> None:
    v2 = with_member(FOUNDED, "bea", Role.ADMIN, BEA).canonical()
    at = data.draw(st.integers(0, len(v2) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != v2[at]))
    with pytest.raises(CosiloError):
        read_members(v2[:at] + bytes([other]) + v2[at + 1 :], F, ANCHOR)


def test_the_signature_is_over_this_version_and_federation() -> None:
    """A signature moves to no other list: the statement is length-prefixed and names both."""
    other = MembersList(version=2, federation=F, members=FOUNDED.list.members)
    assert refused(FOUNDED.model_copy(update={"list": other})) == "version 2: ada's signature does not hold"
