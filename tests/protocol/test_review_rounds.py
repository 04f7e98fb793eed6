"""Attacks of one site on the round itself (rounds/machine.py, rules 1 and 2): nobody holds a round for ever, spends its attempts, or
fills the coordinator's disk with what is written down of it."""

from __future__ import annotations

from cosilo_server.rounds.events import Connected, Declined, Disconnected, LeftOut, Progressed
from cosilo_server.rounds.machine import GRACES_MAX, PROGRESS_PARTS
from cosilo_server.rounds.state import Activity, DeclineCode, Phase
from tests.unit.test_rounds_machine import NAMES, Script

MALLORY = NAMES[3]
HONEST = NAMES[:3]
ALMOST_S = 99.0  # the script's deadline for training is 100 s


def waiting_for_mallory() -> Script:
    """The honest have trained; the fourth site is what the round waits for."""
    script = Script()
    script.advert(*HONEST)
    assert script.state.phase is Phase.TRAINING
    return script


def test_claimed_bytes_do_not_hold_a_round_for_ever() -> None:
    """Rule 1: a site says how many bytes it moved, so only as many count as the model has."""
    script = waiting_for_mallory()
    passed = 0
    while script.state.phase is Phase.TRAINING:
        script.now += ALMOST_S
        passed += 1
        script.say(Progressed(MALLORY, Activity.FETCHING, 0, passed << 20))
        assert passed <= PROGRESS_PARTS + 2
    assert LeftOut(MALLORY, Phase.TRAINING) in script.effects
    assert script.state.roster == HONEST


def test_claimed_tenths_and_parts_do_not_multiply() -> None:
    """Rule 1: in one activity tenths and parts each run up once; a higher tenth does not make old bytes new again."""
    script = waiting_for_mallory()
    for tenth in range(11):
        for part in range(20):
            script.now += 1
            script.say(Progressed(MALLORY, Activity.FETCHING, tenth, part << 16))
    assert script.state.sites[MALLORY].progressed_at == 1000 + 10 * 20 + 1  # the last tenth's first word
    assert script.state.sites[MALLORY].bytes_moved == 17 << 16  # one part more than the model has


def test_reconnecting_does_not_hold_a_round_for_ever() -> None:
    """Rule 1: a site that comes back gets a whole deadline again, but only so often."""
    script = waiting_for_mallory()
    for _ in range(GRACES_MAX):
        script.now += ALMOST_S
        script.say(Disconnected(MALLORY))
        script.say(Connected(MALLORY))
    assert script.state.phase is Phase.TRAINING
    script.now += ALMOST_S
    script.say(Connected(MALLORY))
    script.wait(1)
    assert script.state.phase is Phase.SHARING
    assert script.state.roster == HONEST


def test_each_phase_excuses_reconnections_anew() -> None:
    script = Script()
    for _ in range(GRACES_MAX + 1):
        script.say(Connected(MALLORY))
    script.advert()
    script.now += 19
    script.say(Connected(MALLORY))
    script.wait(19)
    assert not script.state.sites[MALLORY].late


def test_a_site_that_declines_in_every_sharing_does_not_spend_the_attempts() -> None:
    """Rule 2: whoever was in U1 and did not share is out of the round, also where it says that it gave up."""
    script = Script()
    script.advert()
    script.share(*HONEST)
    script.say(Declined(MALLORY, DeclineCode.POLICY))
    assert (script.state.phase, script.state.attempt) == (Phase.TRAINING, 2)
    script.say(Progressed(MALLORY, Activity.WAITING, 10, 0))  # it changed its mind once more
    script.advert(*HONEST)
    assert (script.state.phase, script.state.roster) == (Phase.SHARING, HONEST)


def test_declining_again_and_again_is_written_down_once() -> None:
    """Every change that lasts is a row in the coordinator's database: a site must not make as many as it likes."""
    script = Script()
    written = 0
    for turn in range(100):
        before = script.state
        script.say(Declined(MALLORY, (DeclineCode.POLICY, DeclineCode.DISK)[turn % 2]))
        script.say(Connected(MALLORY))
        written += not script.state.same_in_store(before)
    assert written == 1
    assert script.state.sites[MALLORY].declined is DeclineCode.POLICY
