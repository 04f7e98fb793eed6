"""The round machine: pure scenarios. Time is a number; sites are names; messages are opaque bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.secagg.messages import RoundKind
from cosilo_server.rounds.assignments import assignment_for
from cosilo_server.rounds.events import (
    AdvertReceived,
    ComplaintReceived,
    Connected,
    ConsentReceived,
    Declined,
    Disconnected,
    EndRound,
    Event,
    LeftOut,
    OpenSum,
    Progressed,
    Refuse,
    Resumed,
    RevealReceived,
    SharesReceived,
    Stopped,
    SumOpened,
    SumRefused,
    Tick,
    UploadReceived,
)
from cosilo_server.rounds.machine import ATTEMPTS_MAX, GRACES_MAX, TABLE, barred, begin, step, waiting_for
from cosilo_server.rounds.record import dump, load
from cosilo_server.rounds.state import Activity, Deadlines, DeclineCode, Phase, Terms, Upload, WeightsStep

NAMES = ("st-anna", "st-beda", "st-clara", "st-david", "st-egon")
MORE = (*NAMES, "st-felix", "st-gallus", "st-hilda", "st-ida")
DEADLINES = Deadlines(gather_s=10, training_s=100, sharing_s=20, uploading_s=50, consenting_s=20, revealing_s=20)
BASE = hashlib.sha256(b"weights").digest()
STEP = WeightsStep(hashlib.sha256(b"step").digest(), hashlib.sha256(b"weights before").digest(), 786_432)


class Script:
    """Drives one round and keeps what the machine asked for."""

    def __init__(
        self,
        *,
        sites: int = 4,
        secure: bool = True,
        n_min: int = 3,
        f: int = 1,
        cohort: int = 0,
        connected: int | None = None,
        gone: tuple[str, ...] = (),
    ) -> None:
        self.names = MORE[:sites]
        terms = Terms(self.names, secure, n_min, f, cohort, DEADLINES)
        present = self.names[: sites if connected is None else connected]
        self.now = 1000.0
        self.effects: list[object] = []
        self.state, effects = begin(
            run=b"r" * 32, number=7, kind=RoundKind.TRAIN, terms=terms, base_digest=BASE, base_bytes=1 << 20,
            encoding=b"e", seed=b"s" * 32, connected=present, now=self.now, gone=gone,
        )  # fmt: skip
        self.effects += effects

    def say(self, event: Event) -> tuple[object, ...]:
        self.state, effects = step(self.state, event, self.now)
        self.effects += effects
        return effects

    def wait(self, seconds: float) -> tuple[object, ...]:
        self.now += seconds
        return self.say(Tick())

    def advert(self, *names: str) -> None:
        for name in names or self.state.invited:
            assert self.say(AdvertReceived(name, self.state.attempt, b"advert " + name.encode())) in ((), (OpenSum(),))

    def share(self, *names: str) -> None:
        for name in names or self.state.roster:
            self.say(SharesReceived(name, self.state.attempt, b"shares " + name.encode()))

    def upload(self, *names: str) -> None:
        for name in names or self.state.roster:
            self.say(UploadReceived(name, self.state.attempt, Upload(b"statement " + name.encode(), b"d" * 32, 9)))

    def consent(self, *names: str) -> None:
        for name in names:
            self.say(ConsentReceived(name, self.state.attempt, b"consent " + name.encode()))

    def reveal(self, *names: str) -> None:
        for name in names:
            self.say(RevealReceived(name, self.state.attempt, b"reveal " + name.encode()))


def test_a_masked_round_passes_every_phase_and_closes() -> None:
    script = Script()
    assert script.state.phase is Phase.TRAINING
    assert script.state.invited == NAMES[:4]
    assert script.state.threshold == 3
    script.advert()
    assert script.state.phase is Phase.SHARING
    script.share()
    assert script.state.phase is Phase.UPLOADING
    script.upload()
    assert script.state.phase is Phase.CONSENTING
    assert script.state.survivors == NAMES[:4]
    script.consent(*NAMES[:2])
    assert script.state.phase is Phase.CONSENTING
    script.consent(NAMES[2])
    assert script.state.phase is Phase.REVEALING
    script.reveal(*NAMES[1:4])
    assert script.state.phase is Phase.OPENING
    assert script.effects == [OpenSum()]
    assert script.say(SumOpened(b"c" * 32)) == (EndRound(),)
    assert (script.state.phase, script.state.checkpoint) == (Phase.CLOSED, b"c" * 32)


def test_a_plain_round_skips_sharing_consent_and_reveal() -> None:
    script = Script(secure=False)
    script.advert()
    assert script.state.phase is Phase.UPLOADING
    script.upload()
    assert script.state.phase is Phase.OPENING
    assert script.effects == [OpenSum()]


def test_one_site_makes_a_plain_round_by_itself() -> None:
    script = Script(sites=1, secure=False, n_min=1, f=0)
    script.advert()
    script.upload()
    assert script.state.survivors == NAMES[:1]
    assert script.state.phase is Phase.OPENING


def test_gathering_waits_for_everybody_then_invites_who_is_there() -> None:
    script = Script(connected=2)
    assert script.state.phase is Phase.GATHERING
    script.say(Connected(NAMES[3]))
    assert script.state.phase is Phase.GATHERING
    script.wait(9.9)
    assert script.state.phase is Phase.GATHERING
    script.wait(0.1)
    assert script.state.phase is Phase.TRAINING
    assert script.state.invited == (NAMES[0], NAMES[1], NAMES[3])


def test_gathering_does_not_wait_for_who_is_no_member_any_more() -> None:
    script = Script(connected=3, gone=NAMES[3:4])
    assert (script.state.phase, script.state.invited) == (Phase.TRAINING, NAMES[:3])
    assert Script(connected=3).state.phase is Phase.GATHERING


def test_gathering_abandons_with_the_counts_when_too_few_come() -> None:
    script = Script(connected=2)
    script.wait(10)
    assert script.state.phase is Phase.ABANDONED
    assert script.state.reason == "2 sites are connected and 3 are needed"


def test_a_cohort_is_drawn_from_the_seed_and_not_from_who_connects_first() -> None:
    one = Script(sites=5, cohort=3)
    ranked = sorted(NAMES, key=lambda name: hashlib.sha256(b"s" * 32 + name.encode()).digest())
    assert one.state.invited == tuple(sorted(ranked[:3]))
    late = Script(sites=5, cohort=3, connected=0)
    for name in reversed(NAMES):
        late.say(Connected(name))
    assert late.state.invited == one.state.invited


def test_a_site_that_stalls_is_left_out_and_one_that_progresses_is_not() -> None:
    script = Script()
    script.advert(*NAMES[:2])
    for tenth in range(1, 6):
        script.now += 60
        script.say(Progressed(NAMES[2], Activity.TRAINING, tenth, 0))
        script.say(Tick())
    assert script.state.sites[NAMES[3]].late
    assert not script.state.sites[NAMES[2]].late
    assert LeftOut(NAMES[3], Phase.TRAINING) in script.effects
    assert waiting_for(script.state) == (NAMES[2],)
    script.advert(NAMES[2])
    assert script.state.phase is Phase.SHARING
    assert script.state.roster == NAMES[:3]
    assert not assignment_for(script.state, NAMES[3]).invited


def test_a_dribble_of_bytes_is_no_progress() -> None:
    script = Script()
    script.advert(*NAMES[:3])
    script.now += 60
    script.say(Progressed(NAMES[3], Activity.FETCHING, 0, 10))
    assert script.state.sites[NAMES[3]].progressed_at == 1060  # fetching began: a later activity than idle
    for count in range(11, 40):
        script.now += 1
        script.say(Progressed(NAMES[3], Activity.FETCHING, 0, count))
    assert script.state.sites[NAMES[3]].progressed_at == 1060
    script.say(Progressed(NAMES[3], Activity.FETCHING, 0, 70_000))
    assert script.state.sites[NAMES[3]].progressed_at == 1089


def test_more_than_the_model_is_progress_only_where_a_step_was_fetched_in_vain() -> None:
    for named, counts in ((None, 1 << 20), (STEP, (1 << 20) + 786_432)):
        script = Script()
        script.state = replace(script.state, step=named)
        for moved in range(0, 4 << 20, 1 << 16):
            script.now += 1
            script.say(Progressed(NAMES[3], Activity.FETCHING, 10, moved))
        last = script.state.sites[NAMES[3]].progressed_at
        assert last == 1001 + (counts + (1 << 16)) // (1 << 16)  # one part beyond, since the count is rounded down
        assert assignment_for(script.state, NAMES[0]).step == named


def test_progress_never_runs_backwards() -> None:
    script = Script()
    script.say(Progressed(NAMES[0], Activity.TRAINING, 5, 0))
    before = script.state
    script.now += 1
    script.say(Progressed(NAMES[0], Activity.FETCHING, 10, 1 << 20))
    script.say(Progressed(NAMES[0], Activity.TRAINING, 4, 0))
    assert script.state == before


def test_a_decline_ends_the_waiting_at_once_and_work_takes_it_back() -> None:
    script = Script()
    script.say(Declined(NAMES[3], DeclineCode.NOT_ACCEPTED))
    assert waiting_for(script.state) == NAMES[:3]
    script.say(Progressed(NAMES[3], Activity.FETCHING, 1, 0))
    assert script.state.sites[NAMES[3]].declined is None
    assert waiting_for(script.state) == NAMES[:4]


def test_a_site_that_paused_may_begin_its_work_again_a_few_times_a_phase() -> None:
    """It begins below what it had said before, with a whole deadline; as often as it likes would hold the round, and write each time."""
    script, name = Script(), NAMES[3]
    script.say(Progressed(name, Activity.TRAINING, 7, 0))
    for times in range(1, GRACES_MAX + 1):
        script.say(Declined(name, DeclineCode.PAUSED))
        assert name not in waiting_for(script.state)
        script.say(Progressed(name, Activity.FETCHING, 0, 0))
        site = script.state.sites[name]
        assert (site.declined, site.activity, site.tenths, site.graces) == (None, Activity.FETCHING, 0, times)
        assert site.progressed_at == script.now
    script.say(Declined(name, DeclineCode.PAUSED))
    script.say(Progressed(name, Activity.FETCHING, 0, 0))
    assert script.state.sites[name].declined is DeclineCode.PAUSED
    script.say(Progressed(name, Activity.FETCHING, 1, 0))  # real progress always counts
    assert script.state.sites[name].declined is None


def test_all_declining_abandons_with_the_reason() -> None:
    script = Script()
    for name in NAMES[:4]:
        script.say(Declined(name, DeclineCode.POLICY))
    assert script.state.phase is Phase.ABANDONED
    assert script.state.reason == "0 sites finished training and 3 are needed; 4 declined: policy"


@pytest.mark.parametrize("secure", [True, False])
def test_fewer_uploads_than_the_quorum_abandon_the_round(secure: bool) -> None:
    script = Script(secure=secure)
    script.advert()
    script.share()
    script.upload(*NAMES[:2])
    script.wait(50)
    assert script.state.phase is Phase.ABANDONED
    assert script.state.reason == "2 sites uploaded and 3 are needed"
    assert script.effects[-1] == EndRound()


def test_one_drop_while_uploading_leaves_three_survivors_and_the_dropped_site_may_still_consent() -> None:
    script = Script()
    script.advert()
    script.share()
    script.upload(*NAMES[:3])
    script.wait(50)
    assert script.state.survivors == NAMES[:3]
    assert script.state.phase is Phase.CONSENTING
    owed = assignment_for(script.state, NAMES[3])
    assert (owed.invited, owed.delivered, owed.survivors) == (True, False, NAMES[:3])
    script.consent(NAMES[3], *NAMES[:2])
    assert script.state.phase is Phase.REVEALING


def test_missing_shares_open_a_new_attempt_without_the_silent_site() -> None:
    script = Script()
    script.advert()
    script.share(*NAMES[:3])
    script.wait(20)
    assert (script.state.phase, script.state.attempt, script.state.roster) == (Phase.TRAINING, 2, ())
    assert all(site.advert is None and site.shares is None for site in script.state.sites.values())
    script.advert(*NAMES[:3])
    assert script.state.roster == NAMES[:3]
    script.share()
    script.upload()
    assert script.state.survivors == NAMES[:3]


def test_attempts_end_at_their_bound() -> None:
    script = Script(sites=9, f=0)
    for attempt in range(1, ATTEMPTS_MAX + 1):
        assert script.state.attempt == attempt
        script.advert(*waiting_for(script.state))
        script.share()
        assert script.state.phase is Phase.UPLOADING
        script.say(ComplaintReceived(script.state.roster[0], attempt, script.state.roster[1]))
    assert script.state.phase is Phase.ABANDONED
    assert script.state.reason == "st-anna complained of st-felix; 5 attempts are spent"


A, B, C, D, E = MORE[:5]


@pytest.mark.parametrize(
    ("complaints", "f", "expected"),
    [
        ({}, 1, set()),
        ({A: (D,)}, 1, {A}),  # up to f may lie: the lie costs the liar
        ({A: (D,), B: (D,)}, 1, {D}),  # f + 1 include an honest one
        ({A: (D, D)}, 1, {A}),  # one complainer counts once
        ({A: (D,), B: (D,), C: (E,)}, 1, {D, C}),
        ({A: (D,)}, 0, {D}),
    ],
)
def test_whom_complaints_leave_out(complaints: dict[str, tuple[str, ...]], f: int, expected: set[str]) -> None:
    script = Script(sites=5, f=f)
    sites = {name: replace(site, complaints=complaints.get(name, ())) for name, site in script.state.sites.items()}
    assert barred(replace(script.state, sites=sites)) == expected


def test_one_complaint_leaves_out_the_complainer_and_more_than_f_leave_out_the_dealer() -> None:
    script = Script(sites=5, f=1)
    script.advert()
    script.share()
    script.say(ComplaintReceived(NAMES[0], 1, NAMES[4]))
    assert script.state.attempt == 2
    assert barred(script.state) == {NAMES[0]}
    script.say(ComplaintReceived(NAMES[1], 1, NAMES[4]))  # of the first attempt, late: it counts all the same
    assert script.state.attempt == 2
    assert barred(script.state) == {NAMES[4]}
    assert waiting_for(script.state) == NAMES[:4]


def test_survivors_never_change_once_proposed() -> None:
    script = Script()
    script.advert()
    script.share()
    script.upload(*NAMES[:3])
    script.wait(50)
    refused = script.say(UploadReceived(NAMES[3], 1, Upload(b"late", b"d" * 32, 9)))
    assert refused == (Refuse("upload has no place while consenting"),)
    assert script.state.survivors == NAMES[:3]


def test_the_same_bytes_again_change_nothing_and_other_bytes_are_refused() -> None:
    script = Script()
    script.advert(NAMES[0])
    before = script.state
    assert script.say(AdvertReceived(NAMES[0], 1, b"advert " + NAMES[0].encode())) == ()
    assert script.state is before
    assert script.say(AdvertReceived(NAMES[0], 1, b"another")) == (Refuse("st-anna has delivered another advert in this attempt"),)
    script.advert(*NAMES[1:4])
    assert script.say(AdvertReceived(NAMES[0], 1, b"advert " + NAMES[0].encode())) == ()  # repeated after the phase has moved on


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (AdvertReceived("stranger", 1, b"x"), "stranger is no participant of this run"),
        (AdvertReceived(NAMES[0], 2, b"x"), "advert for attempt 2; this is attempt 1"),
        (SharesReceived(NAMES[0], 1, b"x"), "shares has no place while training"),
        (ConsentReceived(NAMES[0], 1, b"x"), "consent has no place while training"),
        (SumOpened(b"c" * 32), "no sum is being opened while training"),
        (Connected("stranger"), "stranger is no participant of this run"),
    ],
)
def test_what_has_no_place_is_refused_with_its_reason(event: Event, reason: str) -> None:
    script = Script()
    before = script.state
    assert script.say(event) == (Refuse(reason),)
    assert script.state is before


def test_a_late_site_is_refused() -> None:
    script = Script()
    script.advert(*NAMES[:2])
    script.wait(99)
    script.say(Progressed(NAMES[2], Activity.TRAINING, 1, 0))
    script.wait(1)
    assert script.say(AdvertReceived(NAMES[3], 1, b"x")) == (Refuse("st-david is late in this round"),)


def test_a_refused_sum_abandons_the_round() -> None:
    script = Script(secure=False)
    script.advert()
    script.upload()
    assert script.say(SumRefused("its zeros are not zero")) == (EndRound(),)
    assert (script.state.phase, script.state.reason) == (Phase.ABANDONED, "its zeros are not zero")


def test_resuming_gives_a_whole_deadline_again_and_asks_again_to_open() -> None:
    script = Script()
    script.advert(*NAMES[:3])
    script.now += 99
    script.say(Resumed())
    assert all(not site.connected for site in script.state.sites.values())
    script.wait(99)
    assert script.state.phase is Phase.TRAINING
    plain = Script(secure=False)
    plain.advert()
    plain.upload()
    assert plain.say(Resumed()) == (OpenSum(),)


def test_nothing_moves_a_round_that_has_ended() -> None:
    script = Script()
    script.say(Stopped("stopped by an admin"))
    assert script.state.reason == "stopped by an admin"
    assert script.say(Tick()) == (Refuse("round 7 is abandoned"),)


def test_a_record_gives_the_same_round_back_without_what_is_transient() -> None:
    script = Script()
    script.advert()
    script.share()
    script.upload(*NAMES[:2])
    script.say(Declined(NAMES[3], DeclineCode.DISK))
    script.state = replace(script.state, step=STEP)
    document, blobs = dump(script.state)
    state = script.state
    again = load(document, blobs, run=state.run, number=7, kind=RoundKind.TRAIN, terms=state.terms, started_at=state.started_at)
    still = {
        n: replace(s, connected=False, activity=Activity.IDLE, tenths=0, bytes_moved=0, progressed_at=0.0) for n, s in state.sites.items()
    }
    assert again == replace(state, sites=still)


names = st.sampled_from(NAMES)
events = st.one_of(
    st.builds(Connected, names),
    st.builds(Disconnected, names),
    st.builds(Progressed, names, st.sampled_from(Activity), st.integers(0, 10), st.integers(0, 1 << 20)),
    st.builds(Declined, names, st.sampled_from(DeclineCode)),
    st.builds(AdvertReceived, names, st.integers(1, 5), names.map(str.encode)),
    st.builds(SharesReceived, names, st.integers(1, 5), names.map(str.encode)),
    st.builds(ComplaintReceived, names, st.integers(1, 5), names),
    st.builds(UploadReceived, names, st.integers(1, 5), st.builds(Upload, names.map(str.encode), st.just(b"d" * 32), st.just(9))),
    st.builds(ConsentReceived, names, st.integers(1, 5), names.map(str.encode)),
    st.builds(RevealReceived, names, st.integers(1, 5), names.map(str.encode)),
    st.just(Resumed()),
    st.just(Tick()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(events, st.floats(0, 40)), max_size=60), st.booleans(), st.integers(0, 5))
def test_whatever_happens_the_laws_hold_and_every_phase_has_an_exit(
    happenings: list[tuple[Event, float]], secure: bool, connected: int
) -> None:
    script = Script(sites=5, secure=secure, connected=connected)
    proposed: tuple[str, ...] | None = None
    for event, pause in happenings:
        script.now += pause
        script.say(event)
        state = script.state
        assert set(state.survivors) <= set(state.roster) <= set(state.invited) <= set(NAMES)
        assert state.attempt <= ATTEMPTS_MAX
        if state.survivors:
            assert len(state.survivors) >= state.quorum
            proposed = proposed or state.survivors
            assert state.survivors == proposed
        if state.phase is Phase.OPENING and secure:
            assert sum(site.consent is not None for site in state.sites.values()) >= state.threshold
            assert sum(site.reveal is not None for site in state.sites.values()) >= state.threshold
    for _ in range(len(TABLE) * ATTEMPTS_MAX + 1):
        script.wait(100)
    if script.state.phase is Phase.OPENING:
        script.say(SumRefused("disk full"))
    assert script.state.ended
    assert script.state.phase is Phase.CLOSED or script.state.reason


def test_assignments_carry_each_phase_only_what_it_needs() -> None:
    script = Script()
    script.advert()
    script.share(*NAMES[:3])
    owed = assignment_for(script.state, NAMES[0])
    assert owed.roster == tuple(b"advert " + name.encode() for name in NAMES[:4])
    assert (owed.shares, owed.survivors, owed.consents, owed.delivered) == ((), (), (), True)
    assert assignment_for(script.state, NAMES[3]).delivered is False
    script.share(NAMES[3])
    assert len(assignment_for(script.state, NAMES[0]).shares) == 4
    script.upload()
    assert assignment_for(script.state, NAMES[0]).shares == ()
    assert assignment_for(script.state, NAMES[0]).survivors == NAMES[:4]
