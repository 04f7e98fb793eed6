"""How a site comes to join a run: what a run would take from it in plain words, and acceptance, by a person or by policy.

Owns the words a person reads before they say yes. The checks themselves are `acceptance`'s and `policy`'s. Must not
know gRPC or the terminal: manifests arrive as bytes, answers leave as text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cosilo_client.acceptance import AcceptedBy, accept_run
from cosilo_client.config import PolicyTable
from cosilo_client.coordinator import SignedRun
from cosilo_client.ledger import Ledger
from cosilo_client.owed import DeclineCode
from cosilo_client.policy import Refusal, is_listed, refuse_run, refuse_unasked
from cosilo_client.run_terms import ROUNDS_PER_MODEL
from cosilo_common.diffusion.lora import require_peft
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.keys import fingerprint, public_bytes
from cosilo_common.manifest import Manifest, verify_manifest
from cosilo_common.secagg.messages import threshold

UNLISTED_MAX: Final = 10_000  # digests of runs that the policy does not name: a federation makes some tens a year


@dataclass(frozen=True)
class Candidate:
    """A run whose manifest an admin signed. signed: as it travelled; signer: the admin that the signature proves."""

    manifest: Manifest
    signed: SignedRun
    signer: str

    @property
    def run(self) -> bytes:
        """SHA-256 of the manifest."""
        return self.manifest.digest()


def verify_candidate(identity: Identity, signed: SignedRun) -> Candidate:
    """Checks a manifest against the admins of the newest members list. Raises CosiloError."""
    manifest, signer = verify_manifest(signed.manifest, signed.signature, identity.members().admins(), identity.membership.federation)
    return Candidate(manifest, signed, signer)


def accept_as_person(identity: Identity, ledger: Ledger, candidate: Candidate, now: datetime) -> None:
    """Writes a person's acceptance, and pins the participants' keys for runs that the policy may accept later.

    now: aware, for people. Raises CosiloError where this site is no participant, an admin's key is one, or the run needs what is not
    installed.
    """
    require_installed(candidate.manifest)
    _accept(identity, ledger, candidate, AcceptedBy.PERSON, now)
    ledger.rejoin(candidate.run, at=now.isoformat())
    for name, key in candidate.manifest.participant_keys().items():
        ledger.pin(name, key, pinned_at=now.isoformat())


class PolicyAcceptance:
    """Accepts a run without a person where [policy] lists it and every key was pinned before."""

    def __init__(
        self,
        identity: Identity,
        ledger: Ledger,
        policy: PolicyTable,
        fetch: Callable[[bytes], Awaitable[SignedRun]],
        now: Callable[[], datetime],
    ) -> None:
        self._identity = identity
        self._ledger = ledger
        self._policy = policy
        self._fetch = fetch
        self._now = now
        self._candidates: dict[bytes, Candidate] = {}
        self._unlisted: set[bytes] = set()

    async def __call__(self, run: bytes) -> Refusal | None:
        """None where the run is accepted now, or why not. Raises what fetching raises."""
        if self._policy.runs == "accepted" or run in self._unlisted:
            return refuse_unlisted(run)
        if run not in self._candidates:
            candidate = verify_candidate(self._identity, await self._fetch(run))
            if candidate.run != run:
                raise CosiloError("fetch run", f"{run.hex()[:12]}: another manifest came", "tell the coordinator's admin")
            if not is_listed(self._policy, run, candidate.manifest.name):
                if len(self._unlisted) < UNLISTED_MAX:  # what a digest names never changes, and this is asked every few seconds
                    self._unlisted.add(run)
                return refuse_unlisted(run)
            self._candidates[run] = candidate  # few: only runs that the policy names
        if left := self._ledger.left_at(run):
            return Refusal(DeclineCode.NOT_ACCEPTED, f"a person left it at {left}: only a person accepts it again")
        candidate = self._candidates[run]
        refusal = refuse_unasked(self._policy, run, candidate.manifest, self._ledger.pins())
        if refusal is None:
            refusal = _refuse_uninstalled(candidate.manifest)
        if refusal is None:
            _accept(self._identity, self._ledger, candidate, AcceptedBy.POLICY, self._now())
        return refusal


def require_installed(manifest: Manifest) -> None:
    """Raises CosiloError, with what to install, where this site could not train a run."""
    if manifest.lora is not None:
        require_peft("accept run", "cosilo-client")


def _refuse_uninstalled(manifest: Manifest) -> Refusal | None:
    try:
        require_installed(manifest)
    except CosiloError as error:
        return Refusal(DeclineCode.NOT_ACCEPTED, f"{error.subject}: {error.hint}")
    return None


def refuse_unlisted(run: bytes) -> Refusal:
    """The refusal of a run that neither a person nor the policy accepted."""
    return Refusal(DeclineCode.NOT_ACCEPTED, f"nobody has accepted it: run cosilo-site accept {run.hex()[:12]}")


def explain(candidate: Candidate, site: str, policy: PolicyTable) -> str:
    """What a run would take from this site, in plain words, as `cosilo-site accept` shows it."""
    manifest = candidate.manifest
    values = manifest.tensor_table.size
    personal = 0 if manifest.split.personal_table is None else manifest.split.personal_table.size
    upload_mb = manifest.split.summed_size * manifest.encoding.bits / 8 / 1e6
    of_what = "the model's" if manifest.lora is None else "the adapters'"
    architecture = manifest.architecture
    lines = [
        f"Run {candidate.run.hex()}",
        f'  "{manifest.name}", of federation {manifest.federation}, signed by its admin {candidate.signer}',
        f"  a diffusion model for images of {architecture.sample_size}x{architecture.sample_size} pixels, "
        f"{architecture.in_channels} planes, {architecture.num_classes} classes; {values:,} values"
        + ("" if manifest.lora is None else " of adapters"),
        *_base(manifest),
        "",
        "What leaves this site, in each round that it takes part in",
        f"  one upload of {upload_mb:,.1f} MB: how much training changed each of {of_what} values",
        f"    ({_work(manifest)}; no change larger than {manifest.encoding.clip:g}),",
        f"    the number of images trained on (at most {manifest.encoding.cap}), and {manifest.loss_words} mean losses",
        *(
            ["    and as many values of how this site's mean gradient changed (control variates)"]
            if manifest.training.control_variates
            else []
        ),
        "  how far it is (fetching, training, masking, uploading; in tenths) and how many bytes have moved",
        *_moments(manifest),
        f"How often: at most {manifest.rounds_max} rounds",
        *_looks(manifest, policy),
        f"  this site's policy: {_policy_bounds(policy)}",
        "",
        "To whom",
        *_to_whom(manifest),
        "",
        "What does not leave this site",
        "  images, labels, file names, the number of images of any class",
        "  losses and counts of this site alone; its metrics and its log" if manifest.secure else "  its metrics and its log",
        "  its unmasked update, its keys and its seeds" if manifest.secure else "  its keys",
        *([f"  its own {', '.join(manifest.training.personal)}: {personal:,} values stay here"] if personal else []),
        "",
        "What this does not protect against",
        "  what the finished model has memorised, and what a sum of few sites tells: see docs/threat-model.md",
        "",
        "Who takes part (compare the fingerprints by telephone; accepting pins these keys)",
    ]
    width = max(len(p.name) for p in manifest.participants)
    for participant in manifest.participants:
        mine = "  this site" if participant.name == site else ""
        lines.append(f"  {participant.name:<{width}}  {fingerprint(bytes.fromhex(participant.key))}{mine}")
    refusal = refuse_run(policy, manifest) or _refuse_uninstalled(manifest)
    if refusal is not None:
        lines += ["", f"As things stand this site would join no round: {refusal.reason}"]
    return "\n".join(lines)


def _base(manifest: Manifest) -> list[str]:
    """What a run of adapters needs here besides, where the run is one."""
    terms = manifest.lora
    if terms is None:
        return []
    return [
        f"  the adapters (LoRA, rank {terms.rank}) change a model that stays as it is: this site fetches its {terms.base_bytes / 1e6:,.1f} MB",
        f"    once, with the SHA-256 {terms.base}, and never sends it",
    ]


def _looks(manifest: Manifest, policy: PolicyTable) -> list[str]:
    """R8 in plain words."""
    asked, most = manifest.max_rounds_per_model, min(manifest.max_rounds_per_model, policy.max_rounds_per_model)
    lines = [
        f"  at most {most} with an upload from any one model, training and statistics rounds together, over all runs (R8),",
        "    and always among the same invited sites; a rehearsal's upload is zero and does not count",
    ]
    if asked > ROUNDS_PER_MODEL:
        lines.append(f"  the run asks for up to {asked} of them from ONE AND THE SAME model, where {ROUNDS_PER_MODEL} are usual:")
        lines.append("    their differences tell of single sites")
    if asked > most:
        lines.append(f"    max_rounds_per_model in [policy] holds this site to {most}; for one model a person may say: cosilo-site permit")
    return lines


def _moments(manifest: Manifest) -> list[str]:
    """What a moments round adds, where the run has such rounds."""
    terms = manifest.evaluation
    if terms is None:
        return []
    return [
        f"  if [evaluation] here has {terms.extractor} (SHA-256 {terms.sha256[:12]}), and its admin asks: the mean and second moments of",
        f"    the {terms.features} features of this site's images, the held-out ones too, and their number (at most {terms.images_max});",
        *(["    in one sum of always the same sites, over all runs (R9)"] if manifest.secure else []),
    ]


def _work(manifest: Manifest) -> str:
    training = manifest.training
    passes = "one pass" if training.local_epochs == 1 else f"{training.local_epochs} passes"
    steps = f", at most {training.max_steps} steps" if training.max_steps else ""
    return f"{passes} over this site's training images{steps}"


def _to_whom(manifest: Manifest) -> list[str]:
    participants = len(manifest.participants)
    invited = manifest.cohort or participants
    chosen = f"{invited} of {participants} sites" if manifest.cohort else f"all {participants} sites"
    if not manifest.secure:
        return [
            "  the coordinator, which sees THIS SITE'S OWN update, image count and losses: the aggregation is",
            f"  insecure-plain-sum, without masks; rounds invite {chosen}",
        ]
    t = threshold(invited, manifest.f)
    least = max(t, manifest.n_min)
    return [
        f"  the coordinator, under masks: rounds invite {chosen}, and it can open only their sum,",
        f"    as long as no more than f = {manifest.f} of them tell it all they know",
        f"  t = {t} sites must sign before a sum is opened; a sum has at least {least} sites, of which at least",
        f"    {least - manifest.f} keep their secrets, this one among them; {invited - least} of {invited} may drop out",
    ]


def _policy_bounds(policy: PolicyTable) -> str:
    spans = ", ".join(f"{span.start:%H:%M}-{span.end:%H:%M}" for span in policy.hours) or "any hour"
    return (
        f"at most {policy.rounds_max} rounds and {policy.hours_max:g} hours of training, "
        f"{min(policy.rounds_max, policy.statistics_rounds_max)} statistics rounds, at {spans}, "
        f"with at least {policy.cohort_min} sites" + (f" and f >= {policy.f_min}" if policy.f_min is not None else "")
    )


def _accept(identity: Identity, ledger: Ledger, candidate: Candidate, by: AcceptedBy, now: datetime) -> None:
    accept_run(
        ledger,
        candidate.signed.manifest,
        candidate.signed.signature,
        admin_keys=identity.members().admins(),
        federation=identity.membership.federation,
        site=identity.membership.name,
        site_key=public_bytes(identity.signing_key()),
        accepted_by=by,
        accepted_at=now.isoformat(),
    )
