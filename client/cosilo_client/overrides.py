"""What only a person at the site may override: R8's count for one model, and the alarm about a folder that went back in time.

Owns the words that they read before, and the writing after. Both overrides weaken what protects this site's own images, so the words say
what is lost first. Must not know the terminal or gRPC: everything is in the state folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cosilo_client.auditing import by_person
from cosilo_client.config import SiteConfig
from cosilo_client.daemon import site_identity
from cosilo_client.incarnation import FolderWentBack
from cosilo_client.journal import Journal, open_ledger
from cosilo_client.ledger import Ledger, ModelUpload
from cosilo_client.standing import matching_run
from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import public_bytes
from cosilo_common.manifest import parse_manifest

NEWEST = "newest"
_LISTED = 10  # uploads or models that a person is shown


@dataclass(frozen=True)
class BaseModel:
    """A model that this site may be asked to train from again.

    digest: 32 bytes; run_name: of the run in which it was looked for; uploads: made from it so far, over all runs; unasked: how many this
    site makes in that run without a person; permitted: what a person allowed before, 0 for nothing. extractor: where the digest is no
    model's but what R9 counts that extractor's moments by.
    """

    digest: bytes
    run_name: str
    uploads: tuple[ModelUpload, ...]
    unasked: int
    permitted: int
    extractor: str = ""


def find_model(config: SiteConfig, run_prefix: str, base: str) -> BaseModel:
    """The one base model that is meant.

    run_prefix: how an accepted run's digest begins; base: "newest", which is that of the run's newest round here, or how the digest of a
    model begins that this site has met in any run. Raises CosiloError where nothing, or more than one, fits.
    """
    ledger = open_ledger(config.state)
    runs = {accepted.run: accepted for accepted in ledger.accepted_runs()}
    run = matching_run(run_prefix, tuple(runs))
    manifest = parse_manifest(runs[run].manifest)
    digest = _newest(ledger, run) if base == NEWEST else _matching(ledger, base)
    return BaseModel(
        digest=digest,
        run_name=manifest.name,
        uploads=ledger.model_uploads(digest),
        unasked=min(manifest.max_rounds_per_model, config.policy.max_rounds_per_model),
        permitted=ledger.permitted_rounds(digest),
        extractor=manifest.evaluation.extractor if manifest.evaluation is not None and manifest.evaluation.key == digest else "",
    )


def explain_permit(model: BaseModel, rounds: int) -> str:
    """What permitting so many uploads from one model risks, in plain words. Raises CosiloError where it would allow nothing."""
    made = len(model.uploads)
    if rounds <= made and rounds >= model.permitted:
        raise CosiloError(
            "permit model", f"{rounds} uploads in all are no more than the {made} made already", f"give --rounds {made + 1} for one more"
        )
    shown = [f"    round {upload.round} of run {upload.run.hex()[:12]}" for upload in model.uploads[-_LISTED:]]
    if model.permitted:
        shown.append(f"  a person permitted {model.permitted} in all before; {rounds} takes its place")
    if model.extractor:
        return "\n".join(
            [
                f"Moments by {model.extractor} ({model.digest.hex()})",
                f"  this site has put its moments into {made} sums, over all runs; unasked only into the very same sum again (R9)",
                *shown,
                f"  {rounds} in all: {max(0, rounds - made)} more, of whichever sites are invited",
                "",
                "What this risks",
                "  Two sums that differ by one site differ by exactly its moments: the mean and the covariance of the features of",
                "  THIS SITE'S images, if it is in one of them only, or if its images changed in between. Nothing blurs them.",
                "",
                "When it is right",
                "  The earlier round was abandoned before its sum was opened, for a reason that you know, and the run's admin, asked",
                "  over a telephone, says the same. Permit one more, not many.",
            ]
        )
    return "\n".join(
        [
            f"Model {model.digest.hex()}",
            f'  this site has made {made} uploads from it, over all runs; unasked it makes {model.unasked} in run "{model.run_name}" (R8),',
            "    and always among the same invited sites",
            *shown,
            f"  {rounds} in all: {max(0, rounds - made)} more, with whichever sites are invited",
            "",
            "What this risks",
            "  Masks hide this site's update in a sum. Two sums from ONE model, among nearly the same sites, differ by what a",
            "  single site put in: who runs the coordinator can choose who is invited or dropped, subtract one sum from the",
            "  other, and be left with this site's update. Each further sum also averages out the noise of training, which",
            "  was all that blurred it. The masks do not help against this; only the count does.",
            "",
            "When it is right",
            "  Rounds were abandoned for reasons that you know (sites or the coordinator went down, a disk was full), and the",
            "  run's admin, asked over a telephone, says the same. Permit one more, not many.",
            "  A new run with another seed starts from another model and needs no permit.",
        ]
    )


def permit_model(config: SiteConfig, model: BaseModel, rounds: int) -> None:
    """Writes the permit; a running daemon asks for it at the next round."""
    by_person(config, "permit", model=model.digest.hex(), rounds=rounds)
    open_ledger(config.state).permit_model(model.digest, rounds, permitted_at=datetime.now(UTC).isoformat())


def went_back(config: SiteConfig) -> bool:
    """Whether the state folder is not as this site's key left it, so that the daemon refuses to start.

    Raises CosiloError where the daemon runs, and where nobody can vouch: the ledger is gone, or the site has not enrolled.
    """
    try:
        _open(config, vouched=False)
    except FolderWentBack:
        return True
    return False


def explain_vouch(config: SiteConfig) -> str:
    """Why enrolling again is right, and when vouching is, in plain words."""
    return "\n".join(
        [
            f"{config.state} is not as this site's key left it: a backup was put back, it is a copy, or it was moved or changed owner.",
            "",
            "Why the daemon refuses",
            "  The ledger in this folder decides what this site may still sign: one consent a round (R5), few uploads a model (R8).",
            "  A backup, even of an hour ago, has forgotten what was signed since. With it the same key would sign a second,",
            "  different consent in one round, or upload once more from one model. Who runs the coordinator could then open",
            "  single sites' updates, THIS SITE'S among them, and nothing would show it, then or later.",
            "",
            "What is right in nearly every case",
            "  Enrol again with a new key: what the old one signed cannot be signed twice then. Ask the admin for an invitation;",
            "    mv " + str(config.state / "identity") + " " + str(config.state / "identity.old"),
            "    cosilo-site enrol FILE",
            "  Runs that exist name the old key, so this site takes part in new runs only. That costs rounds, and no image.",
            "",
            "When to vouch",
            "  Only where you know all three: this folder is the very one that the daemon last wrote, moved to another disk or given",
            "  to another owner; the daemon was stopped all the while; no other copy of it has run since.",
        ]
    )


def words_of_vouch(config: SiteConfig) -> str:
    """What a person types to vouch: a sentence that they would have to lie in."""
    return f"the state of {site_identity(config.state).membership.name} is no backup"


def vouch_for_folder(config: SiteConfig) -> None:
    """Binds the folder to this site's key again. Raises CosiloError where the daemon runs or the ledger is gone."""
    by_person(config, "vouch for the state folder")
    _open(config, vouched=True)


def _open(config: SiteConfig, *, vouched: bool) -> None:
    key = public_bytes(site_identity(config.state).signing_key())
    Journal.open(config.state, site_key=key, vouched=vouched).close()


def _newest(ledger: Ledger, run: bytes) -> bytes:
    last = ledger.last_round(run)
    if last is None:
        raise CosiloError(
            "find model",
            f"this site has begun no round of run {run.hex()[:12]}",
            "give the model with --base: the line in the log that names R8 has it",
        )
    return last.base_digest


def _matching(ledger: Ledger, prefix: str) -> bytes:
    known = ledger.base_models()
    found = [digest for digest in known if prefix and digest.hex().startswith(prefix.lower())]
    if len(found) != 1:
        what = f"{len(found)} models begin so" if found else "no model that this site has trained from begins so"
        shown = ", ".join(sorted(digest.hex()[:12] for digest in found or known)[:_LISTED]) or "none"
        raise CosiloError("find model", f"{prefix!r}: {what}", f"it knows: {shown}")
    return found[0]
