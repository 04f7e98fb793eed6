"""One run's duties: what each phase asks of this site, done once, in order, and done again to the same effect.

Owns the step from an assignment to the site role's calls and the messages they give. Every step may be repeated after
any crash: what was signed is sent again byte for byte, what was trained is not trained again. Must not know gRPC, other
runs, or what becomes of a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import time
from typing import Final, ParamSpec, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_client.auditing import DAEMON
from cosilo_client.config import PolicyTable
from cosilo_client.coordinator import Coordinator, UploadHeader
from cosilo_client.due_terms import check_base_bytes, checked_encoding
from cosilo_client.journal import LEFT, Journal
from cosilo_client.ledger import RoundState
from cosilo_client.owed import Activity, DeclineCode, Owed, Phase, Progress
from cosilo_client.pause import LOOK_S, Pause, no_pause
from cosilo_client.policy import Refusal, least_f, refuse_going_on, refuse_round, refuse_run
from cosilo_client.secagg import RunTerms, SiteRole, Start
from cosilo_client.spending import Spending
from cosilo_client.training import TENTHS, Training, reporter
from cosilo_common.audit import Note, no_note
from cosilo_common.encoding import Encoding
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, parse_manifest
from cosilo_common.secagg.keys import Randomness, SystemRandomness
from cosilo_common.secagg.messages import RoundKind, Signed
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_common.telemetry import get_logger
from cosilo_common.threads import in_thread

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")
Accept = Callable[[bytes], Awaitable[Refusal | None]]

AGAIN: Final = True
DONE: Final = False

log = get_logger("cosilo.duties")


@dataclass(frozen=True)
class Site:
    """This site, as its duties need it. accept: accepts a run by policy, or says why not; role_lock: one call at a time
    into the journal, over all runs; randomness: of its keys and shares; note: of what leaves this site, for its audit log;
    pause: the one by hand that stands now."""

    name: str
    key: Ed25519PrivateKey = field(repr=False)
    journal: Journal
    coordinator: Coordinator
    training: Training
    spending: Spending
    policy: PolicyTable
    accept: Accept
    local_time: Callable[[], time]
    role_lock: asyncio.Lock
    randomness: Randomness = field(default_factory=SystemRandomness)
    note: Note = no_note
    pause: Callable[[], Pause | None] = no_pause


class Unwilling(Exception):
    """This site's policy, or the want of an acceptance, stands against what is owed, perhaps not for long."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.reason)


class WentBack(ProtocolViolation):
    """The coordinator offers a round that this site has behind it: it was restored from a backup, most likely (R2)."""

    def __init__(self, offered: int, reached: int) -> None:
        self.reached = reached
        super().__init__(Rule.ORDER, f"round {offered} is offered and this site has begun {reached}: the coordinator went back")


class Duties:
    """What this site does in one run."""

    def __init__(self, site: Site, run: bytes) -> None:
        self._site = site
        self._run = run
        self._manifest: Manifest | None = None
        self._noted: frozenset[tuple[int, int, str]] = frozenset()  # of the newest round: round, attempt, what
        self._role: SiteRole | None = None
        self._start: Start | None = None
        self._checked: dict[tuple[RoundKind, bytes, int], Encoding] = {}  # the one encoding of the round
        self._looked_at: tuple[int, bool] | None = (
            None  # round, and whether it is over, for which the ledger has nothing to forget any more
        )

    async def perform(self, owed: Owed) -> bool:
        """Does one piece of what is owed; AGAIN where more follows from the newest assignment, DONE where not.

        Raises Unwilling; ProtocolViolation where the coordinator or a peer breaks a rule; TrainerFailed; CosiloError;
        Refused and Unreachable.
        """
        if owed.phase.ended:
            return await self._end(owed)
        await self._leave_earlier(owed)
        if (owed.phase is Phase.GATHERING or owed.invited) and not owed.delivered:
            await self._not_left(owed)
        if owed.phase is Phase.GATHERING:
            await self._willing(owed)
            return DONE
        if not owed.invited or owed.delivered:
            return DONE
        if owed.phase is Phase.TRAINING:
            return await self._train_and_advert(owed)
        if owed.phase is Phase.OPENING or not await self._in_roster(owed):
            return DONE
        role = await self._begun(owed)
        await self._same_attempt(owed)
        match owed.phase:
            case Phase.SHARING:
                await self._submit(await self._call(role.roster, [Signed.decode(m) for m in owed.roster]))
            case Phase.UPLOADING:
                await self._upload(owed, role)
            case Phase.CONSENTING:
                await self._consent(owed, role)
            case Phase.REVEALING:
                if await in_thread(self._site.journal.ledger.consent, owed.run, owed.round) is None:
                    # Enough others consented before this site did. One of them may be gone by now, so this one is needed too.
                    await self._consent(owed, role)
                await self._submit(await self._call(role.reveal, [Signed.decode(m) for m in owed.consents]))
            case _:
                pass
        return DONE

    # The phases

    async def _train_and_advert(self, owed: Owed) -> bool:
        manifest = await self._willing(owed)
        role = await self._begun(owed)
        # After a consent its update is gone for good, and the role refuses another attempt (R5): nothing to train for.
        consented = await in_thread(self._site.journal.ledger.consent, owed.run, owed.round)
        if consented is None and not await in_thread(self._site.training.done, owed):
            assert self._start is not None  # _begun set it
            await self._train(owed, manifest, self._start.encoding)
            return AGAIN  # the attempt may have risen meanwhile
        await self._submit(await self._call(role.advert, owed.attempt))
        self._say(owed, Activity.WAITING, TENTHS)
        return DONE

    async def _train(self, owed: Owed, manifest: Manifest, encoding: Encoding) -> None:
        """Trains, and stops at once, the trainer's process with it, where the site is paused so or its hours end."""
        work = asyncio.create_task(self._site.training.perform(owed, manifest, encoding), name=f"train {owed.label}")
        refusal: Refusal | None = None
        try:
            while refusal is None and not (await asyncio.wait({work}, timeout=LOOK_S))[0]:
                refusal = await self._interruption(owed)
        finally:
            await _end_of(work)
        if refusal is None:
            work.result()
        elif not await in_thread(self._site.training.done, owed):  # it may have ended in that very moment
            raise Unwilling(refusal)

    async def _interruption(self, owed: Owed) -> Refusal | None:
        """Why training that runs is stopped; None where it goes on."""
        pause = await in_thread(self._site.pause)
        if pause is not None and pause.now:
            return Refusal(DeclineCode.PAUSED, pause.words)
        if await in_thread(self._site.journal.ledger.left_at, owed.run):
            return Refusal(DeclineCode.NOT_ACCEPTED, LEFT)
        return refuse_going_on(self._site.policy, self._site.local_time())

    async def _consent(self, owed: Owed, role: SiteRole) -> None:
        message = await self._call(role.consent, owed.survivors)
        self._note(owed, "consented", attempt=owed.attempt, survivors=sorted(owed.survivors))
        await self._submit(message)

    async def _upload(self, owed: Owed, role: SiteRole) -> None:
        if self._terms().secure:
            complaint = await self._call(role.deliver, [Signed.decode(m) for m in owed.shares])
            if complaint is not None:
                log.warning("complained of a dealer", round=owed.label, attempt=owed.attempt)
                await self._submit(complaint)
                return
        self._say(owed, Activity.MASKING, 0)
        statement = await self._call(role.mask_chunks)
        self._say(owed, Activity.MASKING, TENTHS)
        spool = self._site.journal.files(owed.run).spool(owed.attempt)
        header = UploadHeader(owed.run, owed.round, owed.attempt, statement.encode())
        total_bytes = spool.stat().st_size
        await self._site.coordinator.put(header, spool, reporter(self._site.coordinator, owed, Activity.UPLOADING, total_bytes))
        await self._call(role.uploaded)
        self._note(owed, "uploaded", kind=owed.kind.value, bytes=total_bytes)
        self._say(owed, Activity.WAITING, TENTHS)

    async def _end(self, owed: Owed) -> bool:
        """Forgets the round, and any earlier one (R7)."""
        if self._looked_at == (owed.round, True):
            return DONE
        outcome = RoundState.CLOSED if owed.phase is Phase.CLOSED else RoundState.ABANDONED
        entry = await in_thread(self._site.journal.ledger.last_round, self._run)
        if entry is None or entry.state is not RoundState.OPEN or entry.round > owed.round:
            self._looked_at = (owed.round, True)
            return DONE
        if entry.round < owed.round:
            outcome, reason = RoundState.ABANDONED, f"round {owed.round} went on without this site"
        else:
            reason = owed.reason
        self._role = self._start = None
        await self._call(self._site.journal.finish, entry, outcome, reason)
        log.info("round ended", round=owed.label, outcome=outcome.value, reason=reason)
        return DONE

    async def _leave_earlier(self, owed: Owed) -> None:
        """Forgets an earlier round as soon as a later one is heard of, whether this site is in it or not (R7)."""
        if self._looked_at == (owed.round, False):
            return
        entry = await in_thread(self._site.journal.ledger.last_round, self._run)
        if entry is not None and entry.state is RoundState.OPEN and entry.round < owed.round:
            self._role = self._start = None
            await self._call(self._site.journal.finish, entry, RoundState.ABANDONED, f"round {owed.round} began")
        self._looked_at = (owed.round, False)

    # What stands before them

    async def _not_left(self, owed: Owed) -> None:
        """Raises Unwilling where a person withdrew this site from the run, and forgets what of this round has not gone out.

        What is uploaded stands under its masks at the coordinator: this site consents and reveals as it would have, or it would cost
        the others the round and take nothing back.
        """
        left = await in_thread(self._site.journal.ledger.left_at, self._run)
        if not left:
            return
        entry = await in_thread(self._site.journal.ledger.round, owed.run, owed.round)
        if entry is not None and entry.state is RoundState.OPEN:
            if not await in_thread(self._site.journal.leaves, entry):
                return
            self._role = self._start = None
            await self._call(self._site.journal.finish, entry, RoundState.ABANDONED, LEFT)
            self._note(owed, "forgot a round of a run that it left")
        again = f"to take part again: cosilo-site accept {self._run.hex()[:12]}"
        raise Unwilling(Refusal(DeclineCode.NOT_ACCEPTED, f"{LEFT} at {left}; {again}"))

    async def _willing(self, owed: Owed) -> Manifest:
        """The accepted run's manifest, if acceptance and policy allow this round; raises Unwilling."""
        site = self._site
        manifest = await self._accepted()
        trained = await in_thread(site.training.done, owed)
        invited = len(owed.invited_sites) or manifest.cohort or len(manifest.participants)
        if trained:  # the work is done and paid for: only what makes the run itself unacceptable stops it now
            refusal = refuse_run(site.policy, manifest)
        else:
            if (pause := await in_thread(site.pause)) is not None:
                raise Unwilling(Refusal(DeclineCode.PAUSED, pause.words))
            begun = owed.phase is Phase.TRAINING and await in_thread(site.journal.ledger.round, owed.run, owed.round) is not None
            if begun and (over := refuse_going_on(site.policy, site.local_time())) is not None:
                raise Unwilling(over)
            spent = site.spending.of(self._run)
            refusal = refuse_round(site.policy, manifest, owed.kind, invited, spent, site.local_time())
        if refusal is not None:
            raise Unwilling(refusal)
        return manifest

    async def _accepted(self) -> Manifest:
        if self._manifest is None:
            site = self._site
            accepted = await in_thread(site.journal.ledger.accepted, self._run)
            if accepted is None:
                refusal = await site.accept(self._run)
                if refusal is not None:
                    raise Unwilling(refusal)
                accepted = await in_thread(site.journal.ledger.accepted, self._run)
                if accepted is None:
                    raise CosiloError("accept run", f"{self._run.hex()[:12]}: it was not written", "see the log")
                site.note(DAEMON, "accepted a run by policy", run=self._run.hex())
            self._manifest = await in_thread(parse_manifest, accepted.manifest)
        return self._manifest

    async def _begun(self, owed: Owed) -> SiteRole:
        """The role, with this round begun or resumed."""
        manifest = await self._accepted()
        if self._role is None:
            policy = self._site.policy
            terms = RunTerms.of(
                manifest,
                least_f=least_f(policy, len(manifest.participants)),
                rounds_per_model=policy.max_rounds_per_model,
            )
            self._role = SiteRole(terms, self._site.name, self._site.key, self._site.journal, self._site.randomness)
        encoding = self._encoding(manifest, owed)
        start = Start(owed.round, owed.kind, owed.invited_sites, owed.base_digest, encoding, encoding.digest())
        if start != self._start:
            last = await in_thread(self._site.journal.ledger.last_round, self._run)
            if last is not None and last.round == owed.round and last.outcome == LEFT:
                raise Unwilling(Refusal(DeclineCode.NOT_ACCEPTED, f"{LEFT} in this round and is accepted again: it joins the next"))
            if last is not None and (last.round > owed.round or (last.round == owed.round and last.state is not RoundState.OPEN)):
                raise WentBack(owed.round, last.round)
            entry = await self._call(self._role.begin, start)
            self._start = start
            log.info("round begun", round=owed.label, kind=owed.kind.value, invited=len(entry.invited), resumed=entry.phase.name)
        return self._role

    def _encoding(self, manifest: Manifest, owed: Owed) -> Encoding:
        found = self._checked.get((owed.kind, owed.encoding, owed.base_bytes))
        if found is None:
            check_base_bytes(manifest, owed.base_bytes)
            found = checked_encoding(manifest, owed.kind, owed.encoding)
            self._checked = {(owed.kind, owed.encoding, owed.base_bytes): found}
        return found

    async def _in_roster(self, owed: Owed) -> bool:
        """Whether this site's advert stands in U1. A site that is late or declined has no part in what follows."""
        return any(Signed.decode(message).site == self._site.name for message in owed.roster)

    async def _same_attempt(self, owed: Owed) -> None:
        entry = await in_thread(self._site.journal.ledger.round, self._run, owed.round)
        if entry is None or entry.attempt != owed.attempt:
            raise ProtocolViolation(
                Rule.ROSTER, f"attempt {owed.attempt} goes on; this site adverted for {entry.attempt if entry else 'none'}"
            )

    def _terms(self) -> Manifest:
        assert self._manifest is not None  # every phase after the first begins with _begun
        return self._manifest

    # Calls out

    async def _call(self, call: Callable[Parameters, Answer], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        """One call into the role or the journal: in a thread, one at a time over all runs, never left half-way."""
        async with self._site.role_lock:
            return await in_thread(call, *args, **kwargs)

    async def _submit(self, message: Signed) -> None:
        await self._site.coordinator.submit(message.encode())
        log.info("sent", what=message.type.value, round=f"{message.run.hex()[:12]}/{message.round}", attempt=message.attempt)

    def _note(self, owed: Owed, what: str, /, **detail: object) -> None:
        said = (owed.round, owed.attempt, what)
        if said in self._noted:  # a coordinator that asks for the same for ever must not fill this site's disk
            return
        self._noted = frozenset(one for one in self._noted if one[0] == owed.round) | {said}
        self._site.note(DAEMON, what, run=owed.run.hex(), round=owed.round, **detail)

    def _say(self, owed: Owed, activity: Activity, tenths: int) -> None:
        self._site.coordinator.say(Progress(owed.run, owed.round, activity, tenths))


async def _end_of(work: asyncio.Task[None]) -> None:
    """Cancels work and waits for its end, whoever cancels the wait meanwhile: two trainings of one round must not meet."""
    cancelled = False
    work.cancel()
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    if not work.cancelled():
        work.exception()  # seen, so that asyncio does not warn of it
