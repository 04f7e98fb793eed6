"""Small faults put into the production code, each of which the simulator must find: what it cannot see, it does not guard.

Owns the list, and the way a fault gets in: this module, run by itself, changes a module's source as it is imported, simulates seeds until a rule
breaks, and says which. Nothing on disk is changed, and no other process sees it. The seeds are the campaign's own, from 1 on; where a fault can
show only in some scenarios (a coordinator that lies, power cuts), the seeds that give others are passed over.

    python -m tests.simulation --mutants                       all of them; exit code 1 where one survives
    python -m tests.simulation --mutants "a spool is kept"     one of them
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # it imports what is to be changed
    from tests.simulation.scenario import Scenario

ROOT: Final = Path(__file__).parents[2]
SEEDS_MAX: Final = 12  # a mutant that lives longer is not caught: some need a crash at one point of many
SITES_MAX: Final = 6  # of a scenario in which a mutant is looked for: more sites show no other fault, and cost more
Where = Callable[["Scenario"], bool]


def anywhere(scenario: Scenario) -> bool:
    """Any scenario."""
    return True


def secure(scenario: Scenario) -> bool:
    """Masks, and so shares, consents and reveals."""
    return scenario.manifests[0].secure


def lying(scenario: Scenario) -> bool:
    """Masks, and a coordinator that lies often."""
    return secure(scenario) and scenario.lies >= 0.1


def misdealt(scenario: Scenario) -> bool:
    """Sites that often deal wrong shares, so that attempts end while others upload."""
    return scenario.misdealt >= 0.1


def coordinator_dies(scenario: Scenario) -> bool:
    """Faults come often, and some of them kill the coordinator."""
    return _often(scenario, "coordinator killed")


def sites_die(scenario: Scenario) -> bool:
    """Faults come often, and some of them kill a site."""
    return _often(scenario, "site killed")


def sites_drop(scenario: Scenario) -> bool:
    """Masks, four sites or more, and faults that come often and kill sites: some between their shares and their upload."""
    return secure(scenario) and len(scenario.sites) > 3 and sites_die(scenario) and "site powered off" in scenario.mischief.weights


def dawdling(scenario: Scenario) -> bool:
    """Masks, four sites or more, and uploads that come after their time."""
    return secure(scenario) and len(scenario.sites) > 3 and scenario.weather.dawdled >= 0.05


def corrupting(scenario: Scenario) -> bool:
    """Chunks change on their way."""
    return scenario.weather.corrupted > 0.001


def reset(scenario: Scenario) -> bool:
    """Messages are often lost with their connection, and calls reset while they are served."""
    return scenario.weather.cut >= 0.01


def _often(scenario: Scenario, fault: str) -> bool:
    return fault in scenario.mischief.weights and scenario.mischief.pause_s <= 8.0


@dataclass(frozen=True)
class Edit:
    """One change of a module's source; `old` stands there exactly once."""

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A fault of the program. rules: which of the watch's rules may be the one that finds it; where: the scenarios in which it can show."""

    name: str
    rules: tuple[str, ...]
    edits: tuple[Edit, ...]
    where: Where = anywhere


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. rule: empty where it lived through all seeds; seeds: how many were simulated, seed: the last of them."""

    mutant: Mutant
    rule: str
    what: str
    seeds: int
    rounds: int
    seed: int = 0

    @property
    def caught(self) -> bool:
        """By a rule that says what is wrong."""
        return self.rule in self.mutant.rules


SITE, JOURNAL, LEDGER = "cosilo_client.secagg", "cosilo_client.journal", "cosilo_client.ledger"
MACHINE, CONDUCTOR, STORE = "cosilo_server.rounds.machine", "cosilo_server.conductor", "cosilo_server.store"
TRANSFER, UPLOADS = "cosilo_common.transfer", "cosilo_server.services.uploads"

MUTANTS: Final = (
    Mutant(
        "a site takes part with any number invited",
        ("R1",),
        (
            Edit("cosilo_common.secagg.roster", "if not self.least_invited <= len(self.invited)", "if not 1 <= len(self.invited)"),
            Edit(
                "cosilo_client.policy", "    if invited < policy.cohort_min:\n", "    if False:\n"
            ),  # it would decline, for reasons of its own
        ),
        where=lying,
    ),
    Mutant(
        "a site goes back to a round behind it",
        ("R2",),
        (
            Edit("cosilo_client.duties", "if last is not None and (last.round > owed.round or (", "if last is not None and (False and ("),
            Edit(
                SITE,
                "        if start.round < last.round:\n",
                "        if start.round < last.round and (behind := self._ledger.round(self._terms.run, start.round)) is not None:\n"
                "            return behind\n        if start.round < last.round:\n",
            ),
            Edit(SITE, "if entry is None or entry.state is not RoundState.OPEN:", "if entry is None:"),
            Edit(JOURNAL, "if entry is None or entry.state is not RoundState.OPEN:", "if entry is None:"),
        ),
        where=lying,
    ),
    Mutant(
        "a site changes the base model within a round",
        ("R3",),
        (Edit(SITE, '            ("base model", last.base_digest, start.base_digest),\n', ""),),
        where=lying,
    ),
    Mutant(
        "an advert is made anew when it is asked for again",
        ("R4",),
        (Edit(SITE, "stored = self._get(entry, _ADVERT)\n            if stored is not None:", "stored = b''\n            if stored:"),),
    ),
    Mutant(
        "an update is rounded anew under the same masks",
        ("R4",),
        (Edit(SITE, "self._secret(entry, _ROUNDING), workers=workers", "generate_secret(self._random), workers=workers"),),
        where=sites_die,
    ),
    Mutant(
        "a second survivor set is signed",
        ("R5",),
        (
            Edit(
                SITE,
                'raise ProtocolViolation(Rule.ONE_CONSENT, f"consented already in round {entry.round}, to other survivors")',
                "return self._sign(MessageType.CONSENT, entry, Consent(roster.ctx, proposed))",
            ),
        ),
        where=lying,
    ),
    Mutant(
        "a quorum of consents is one fewer",
        ("R5",),
        (
            Edit(MACHINE, "lambda s: s.threshold, _after_consenting", "lambda s: s.threshold - 1, _after_consenting"),
            Edit(
                MACHINE,
                'if len(delivered) < state.threshold:\n        return _abandon(state, f"{len(delivered)} sites consented',
                'if len(delivered) < state.threshold - 1:\n        return _abandon(state, f"{len(delivered)} sites consented',
            ),
            Edit(SITE, "if len(signers) < roster.terms.threshold:", "if len(signers) < roster.terms.threshold - 1:"),
        ),
    ),
    Mutant(
        "a reveal that is asked for again shows the other share",
        ("R6",),
        (
            Edit(
                SITE,
                "        if stored is not None:\n            return Signed.decode(stored)\n"
                "        held, survivors = self._held(entry), set(own.survivors)",
                "        held, survivors = self._held(entry), set(own.survivors[: -1 if stored is not None else None])",
            ),
            Edit(SITE, "self._put(entry, {_REVEAL: signed.encode()})", "self._put(entry, {} if stored else {_REVEAL: signed.encode()})"),
        ),
        where=lying,
    ),
    Mutant(
        "a round's keys and secrets are kept", ("R7",), (Edit(JOURNAL, "        self.vault.forget(run)\n        remove", "        remove"),)
    ),
    Mutant(
        "a round's files are kept",
        ("R7",),
        (Edit(JOURNAL, "        remove_folder(self.files(run).folder)\n", "        pass\n"),),
    ),
    Mutant("uploads for a model are not counted", ("R8",), (Edit(LEDGER, "            if counted:\n", "            if False:\n"),)),
    Mutant(
        "a message names another site",
        ("signature",),
        (Edit(SITE, "entry.attempt, self._site, body)", "entry.attempt, sorted(self._terms.participants)[0], body)"),),
    ),
    Mutant(
        "an update is counted again after a restart",
        ("persist", "counted", "leak"),
        (
            Edit(STORE, "            db.run(_CLOSE_ROUND,", "            (lambda *_, **__: None)(_CLOSE_ROUND,"),
            Edit(
                STORE,
                "            db.run(_DROP_MESSAGES, of_run=state.run, of_number=state.number)\n            if checkpoint",
                "            if checkpoint",
            ),
        ),
        where=coordinator_dies,
    ),
    Mutant(
        "a checkpoint is not stored with its round",
        ("counted",),
        (Edit(STORE, "if checkpoint is not None:\n                db.run", "if False:\n                db.run"),),
    ),
    Mutant(
        "a message is acknowledged before it is stored",
        ("persist", "lost"),
        (Edit(CONDUCTOR, "await self._persist(record, before, after, event)", "self._spawn(self._persist(record, before, after, event))"),),
    ),
    Mutant(
        "a cancelled call leaves memory behind the store",
        ("persist",),
        (Edit(CONDUCTOR, "return await asyncio.shield(task)", "return await task"),),
        where=reset,
    ),
    Mutant(
        "an upload is acknowledged before it is synced",
        ("durable",),
        (Edit(TRANSFER, "            os.fsync(self._fd)\n            self._partial.replace", "            self._partial.replace"),),
    ),
    Mutant("an upload's digest is not looked at", ("sum",), (Edit(TRANSFER, "if found != self.digest:", "if False:"),), where=corrupting),
    Mutant(
        "an upload that comes too late is taken",
        ("late",),
        (
            Edit(MACHINE, "    if state.phase is not phase:\n", "    if state.phase is not phase and phase is not Phase.UPLOADING:\n"),
            Edit(UPLOADS, "if current is None or (current.number", "if current is None or False and (current.number"),
        ),
        where=dawdling,
    ),
    Mutant(
        "an upload of a former attempt is counted",
        ("attempt",),
        (Edit(MACHINE, "replace(s, advert=None, shares=None, upload=None)", "replace(s, advert=None, shares=None)"),),
        where=misdealt,
    ),
    Mutant(
        "the pair masks of a dropped site stay in the sum",
        ("sum",),
        (Edit("cosilo_common.secagg.dealing", "return own + tuple(mask for masks in dropped for mask in masks)", "return own"),),
        where=sites_drop,
    ),
    Mutant(
        "the survivors are whoever consented",
        ("survivors",),
        (
            Edit(
                MACHINE,
                "return _enter(state, Phase.REVEALING, now), ()",
                "return _enter(replace(state, survivors=delivered), Phase.REVEALING, now), ()",
            ),
        ),
    ),
    Mutant(
        "an attempt goes on with a smaller roster",
        ("phase-2",),
        (
            Edit(
                MACHINE,
                "    return _next_attempt(state, f\"no shares from {', '.join(missing)}\", now)",
                "    return _enter(replace(state, roster=delivered), Phase.UPLOADING, now), ()",
            ),
        ),
        where=sites_drop,
    ),
    Mutant(
        "a spool is kept",
        ("leak",),
        (Edit(CONDUCTOR, "await asyncio.to_thread(self._spool.discard_round, record.run.hex(), state.number)", "pass"),),
    ),
    Mutant(
        "what sites revealed is kept",
        ("leak",),
        (
            Edit(
                STORE,
                "                db.run(_DROP_MESSAGES, of_run=state.run, of_number=state.number)\n            else",
                "                pass\n            else",
            ),
        ),
    ),
    Mutant("a cut upload leaves its file open", ("leak",), (Edit(UPLOADS, "sink.close()  # also", "pass  # also"),), where=reset),
    Mutant(
        "a finished training is not found again",
        ("trained",),
        (Edit(JOURNAL, "return update if whole and update.round == round_ else None", "return None"),),
    ),
    Mutant(
        "a site that is killed between two writes does not start again",
        ("recovery",),
        (Edit("cosilo_client.incarnation", "if found == coming and coming != token:", "if False:"),),
        where=sites_die,
    ),
    Mutant(
        "an opening that a crash cut off is not begun again",
        ("progress",),
        (Edit(MACHINE, "return (state, (OpenSum(),)) if state.phase is Phase.OPENING else (state, ())", "return state, ()"),),
        where=coordinator_dies,
    ),
)


def try_all(names: Sequence[str], jobs: int, tell: Callable[[Verdict], None]) -> list[Verdict]:
    """Runs mutants, each in a process of its own, and tells of each as it ends. names: all where empty; raises KeyError."""
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    chosen = [by_name[name] for name in names] or list(MUTANTS)

    def run(mutant: Mutant) -> Verdict:
        verdict = try_one(mutant)
        tell(verdict)
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, chosen))


def try_one(mutant: Mutant) -> Verdict:
    """Simulates one mutant until a rule breaks; one that does not fit the code any more breaks none."""
    command = [sys.executable, "-m", "tests.simulation.mutants", mutant.name]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        return Verdict(mutant, "", ran.stderr.strip()[-1000:], 0, 0)
    return Verdict(mutant, **json.loads(ran.stdout.splitlines()[-1]))


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the mutant's modules from changed source, and leaves all others to Python."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(edit.module == name for edit in self._edits):
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(name, found.origin, loader=self)  # type: ignore[arg-type]  # a loader of source

    def exec_module(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        for edit in self._edits:
            if edit.module == module.__name__:
                if source.count(edit.old) != 1:
                    raise ImportError(f"{edit.module}: stands there {source.count(edit.old)} times: {edit.old!r}")
                source = source.replace(edit.old, edit.new)
        exec(compile(source, module.__file__, "exec"), vars(module))


def _main(name: str) -> None:
    [mutant] = [each for each in MUTANTS if each.name == name]
    sys.meta_path.insert(0, _Changed(mutant.edits))
    from tests.simulation.scenario import scenario_of
    from tests.simulation.world import simulate

    rounds = seeds = seed = 0
    rule = what = ""
    while seeds < SEEDS_MAX and not rule:
        seed += 1
        scenario = scenario_of(seed)
        if len(scenario.sites) > SITES_MAX or not mutant.where(scenario):
            continue
        seeds += 1
        report = simulate(scenario)
        rounds += report.counts["rounds closed"] + report.counts["rounds abandoned"]
        if report.violation is not None:
            rule, what = report.violation.rule, str(report.violation)
        print(f"{seed}: {report.about}: {rule or 'nothing'}", file=sys.stderr, flush=True)
    print(json.dumps({"rule": rule, "what": what, "seeds": seeds, "rounds": rounds, "seed": seed}))


if __name__ == "__main__":
    _main(sys.argv[1])
