"""`cosilo-site`: what a person at a site types. Owns the command tree, and where failures become words and exit codes.

Imports no torch, no grpc and nothing slow: each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_client.terminal import ExitCode, ask, ask_to_type, columns, explain, note, refuse, say, say_json
from cosilo_common.errors import CosiloError

if TYPE_CHECKING:
    from cosilo_client.config import SiteConfig

CONFIG_VARIABLE = "COSILO_SITE_CONFIG"
DEFAULT_CONFIG = Path("/etc/cosilo/site.toml")
ROUNDS_PER_MODEL_MAX = 100  # as in cosilo_client.run_terms, which is slow to import

_HELP = """The daemon of one site, and what a person at the site asks of it.

Exit codes: 0 done, 1 refused or failed, 2 bad usage, 3 cannot reach the coordinator."""

app = typer.Typer(
    name="cosilo-site",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar=CONFIG_VARIABLE,
        help=f"The site's TOML; {DEFAULT_CONFIG} unless given.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object for programs; see docs/cli-site.md.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        try:
            say(f"cosilo-site {version('cosilo-client')}")
        except PackageNotFoundError:
            say("cosilo-site, not installed as a package")
        raise typer.Exit(ExitCode.DONE)


@app.callback()
def cosilo_site(
    context: typer.Context,
    config: ConfigOption = None,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)] = False,
) -> None:
    context.obj = config


@app.command()
def enrol(
    context: typer.Context,
    invitation: Annotated[str, typer.Argument(metavar="FILE|-", help="The invitation; - reads it from standard input.")],
    config: ConfigOption = None,
) -> None:
    """Join a federation: make this site's keys, and ask for its certificate with an invitation."""
    site = _config(context, config)
    from cosilo_client.errands import enrol_site

    said = enrol_site(site, sys.stdin.buffer if invitation == "-" else Path(invitation))
    say(f"enrolled as {said.identity.peer.uri()}")
    say(f"this site's key: {said.key_fingerprint}")
    if not said.member:
        say("not a member yet: read that fingerprint to the admin over a telephone; they then run")
        say(f"  cosilo site approve {said.identity.membership.name}")


@app.command()
def check(context: typer.Context, config: ConfigOption = None) -> None:
    """Try everything that a round would need, and say what to do about what fails."""
    site = _config(context, config)
    import asyncio

    from cosilo_client.preflight import Outcome, preflight

    say(f"ok       configuration  state {site.state}")
    findings = asyncio.run(preflight(site))
    for finding in findings:
        say(f"{finding.outcome.value:<7}  {finding.what:<13}  {finding.text}")
        if finding.hint and finding.outcome is not Outcome.OK:
            say(f"{'':<7}  {'':<13}  {finding.hint}")
    if any(finding.outcome is Outcome.FAILED for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def members(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Who belongs, by the signed members list, with the fingerprints that two people compare over a telephone."""
    site = _config(context, config)
    from cosilo_client.errands import newest_members
    from cosilo_client.standing import members_plain

    identity, newest, problem = newest_members(site)
    document = members_plain(identity, newest)
    if json:
        say_json(document)
        return
    if problem:
        note(f"warning: showing the list that this site saw last: {problem}")
    say(f"federation {document['federation']}, members list {document['version']}, signed by {document['signer']}")
    columns(
        (entry["name"], entry["role"], entry["fingerprint"], "this site" if entry["this_site"] else "") for entry in document["members"]
    )


@app.command()
def accept(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's digest, or how it begins.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; the words are shown all the same.")] = False,
    config: ConfigOption = None,
) -> None:
    """Accept a run, after saying what will leave this site, to whom, how often, and what will not."""
    site = _config(context, config)
    from cosilo_client.errands import accept_candidate, candidate_run
    from cosilo_client.joining import explain as explain_run

    identity, candidate = candidate_run(site, run)
    say(explain_run(candidate, identity.membership.name, site.policy))
    say()
    if not yes and not ask("Accept this run for this site?"):
        refuse("accept run: not accepted; nothing was written")
        raise typer.Exit(ExitCode.FAILED)
    accept_candidate(site, identity, candidate)
    say(f"accepted {candidate.run.hex()}")


@app.command()
def permit(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="An accepted run's digest, or how it begins.")],
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, max=ROUNDS_PER_MODEL_MAX, help="Uploads for that model, in all.")],
    base: Annotated[str, typer.Option("--base", metavar="DIGEST|newest", help="The model's digest, or how it begins.")] = "newest",
    config: ConfigOption = None,
) -> None:
    """Allow more uploads from one model than this site makes unasked (R8), after saying what that risks."""
    site = _config(context, config)
    from cosilo_client.overrides import explain_permit, find_model, permit_model

    found = find_model(site, run, base)
    say(explain_permit(found, rounds))
    say()
    if not ask(f"Permit {rounds} uploads in all from this model?"):
        refuse("permit model: not permitted; nothing was written")
        raise typer.Exit(ExitCode.FAILED)
    permit_model(site, found, rounds)
    say(f"permitted {rounds} uploads in all from model {found.digest.hex()}; rounds that begin from now on know it")


@app.command()
def vouch(context: typer.Context, config: ConfigOption = None) -> None:
    """Say that a state folder which was moved or changed owner is no backup, after reading why to enrol again instead."""
    site = _config(context, config)
    from cosilo_client.overrides import explain_vouch, vouch_for_folder, went_back, words_of_vouch

    if not went_back(site):
        say(f"nothing to vouch for: {site.state} is as this site's key left it")
        return
    say(explain_vouch(site))
    say()
    if not ask_to_type(words_of_vouch(site)):
        refuse("vouch: not vouched for; nothing was written", "enrol again with a new key: see docs/cli-site.md, vouch")
        raise typer.Exit(ExitCode.FAILED)
    vouch_for_folder(site)
    say(f"vouched for {site.state}; the daemon will start")


@app.command()
def status(context: typer.Context, json: JsonOption = False, config: ConfigOption = None) -> None:
    """How this site stands: its identity, whether its daemon runs and is connected, and its runs."""
    site = _config(context, config)
    from cosilo_client.standing import standing

    found = standing(site)
    if json:
        say_json(found.plain())
        return
    columns(
        [
            ("site", f"{found.site} of federation {found.federation}"),
            ("key", found.key_fingerprint),
            ("certificate", f"until {found.certificate_expires}"),
            ("coordinator", found.coordinator),
            ("members list", f"version {found.members_version}"),
            ("daemon", f"{found.daemon}: {found.connection}"),
        ]
    )
    if found.paused:
        say(f"{found.paused}; rounds that are not trained yet are declined")
    say()
    if not found.runs:
        say("no run accepted")
    for one in found.runs:
        where = f"round {one.round} {one.state}, {one.reached}" if one.round else "no round yet"
        say(f"{one.run[:12]}  {one.name}  {one.aggregation}")
        say(f"  {where}; {one.rounds_trained} rounds, {one.hours_trained:g} h trained; accepted by {one.accepted_by}")
        if one.left_at:
            say(f"  left at {one.left_at}: nothing more goes out; cosilo-site accept {one.run[:12]} takes part again")
        if one.outcome:
            say(f"  last round: {one.outcome}")


audit_app = typer.Typer(no_args_is_help=True, help="This site's own log of who did what, whose lines are chained.", rich_markup_mode=None)
app.add_typer(audit_app, name="audit")


@audit_app.command("show")
def audit_show(
    context: typer.Context,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="A date, or an age such as 24h or 7d.")] = "",
    who: Annotated[str, typer.Option("--who", metavar="TEXT", help="Only entries whose doer's name has this in it.")] = "",
    what: Annotated[str, typer.Option("--what", metavar="TEXT", help="Only entries whose deed has this in it.")] = "",
    last: Annotated[int, typer.Option("--last", min=1, max=1_000_000, help="How many at most, the newest.")] = 100,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show entries, oldest first, once the whole chain holds."""
    site = _config(context, config)
    import time

    from cosilo_client.auditing import site_log
    from cosilo_common.audit_reading import Selection, in_words, moment, plain

    chosen = Selection(who, what, moment(since, time.time()) if since else 0.0, last)
    found = chosen.of(site_log(site).entries())
    if json:
        say_json({"entries": [plain(entry) for entry in found]})
        return
    for entry in found:
        say(in_words(entry))


@audit_app.command("verify")
def audit_verify(
    context: typer.Context,
    head: Annotated[
        Path | None,
        typer.Option(
            "--head", metavar="FILE", help="Compare with the head that this file keeps, then keep the new one.", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Check the whole chain; with --head, also that nothing was cut off or written anew since the last time."""
    site = _config(context, config)
    from cosilo_client.auditing import site_log
    from cosilo_common.audit_reading import read_head, verified

    found = site_log(site).verify(read_head(head) if head else None)
    words = verified(found, head)
    say_json({"entries": found.entries, "hash": found.hash}) if json else say(words)


@app.command()
def leave(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="The run's digest, or how it begins.", show_default=False)] = None,
    federation: Annotated[bool, typer.Option("--federation", help="Leave the federation: destroy this site's keys.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; the words are shown all the same.")] = False,
    config: ConfigOption = None,
) -> None:
    """Leave a run, or the federation, after saying what ends, what stays and where, and what cannot be taken back."""
    if federation is (run is not None):
        raise typer.BadParameter("give either RUN or --federation")
    site = _config(context, config)
    from cosilo_client.leaving import explain_leaving_run, leave_run, run_to_leave

    if run is None:
        _leave_federation(site, yes)
        return
    leaving = run_to_leave(site, run)
    say(explain_leaving_run(site, leaving))
    say()
    if not yes and not ask("Leave this run?"):
        refuse("leave run: not left; nothing was written")
        raise typer.Exit(ExitCode.FAILED)
    leave_run(site, leaving)
    say(f"left {leaving.run.hex()}")


@app.command()
def pause(
    context: typer.Context,
    lasting: Annotated[str | None, typer.Option("--for", metavar="TIME", help="How long: 90m, 2h, 1d12h.", show_default=False)] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="HH:MM", help="The next time that it is so late.", show_default=False)
    ] = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="For this site's log and status.", show_default=False)] = "",
    now: Annotated[bool, typer.Option("--now", help="Stop training that runs too; what it did in this round is lost.")] = False,
    config: ConfigOption = None,
) -> None:
    """Train nothing until resume, or for a time: the GPU is given back, and rounds go on without this site."""
    site = _config(context, config)
    from cosilo_client.errands import pause_by_person

    say(pause_by_person(site, lasting, until, reason, now).words)
    say("training that runs is stopped within seconds" if now else "training that runs goes to its end; --now stops it")


@app.command()
def resume(context: typer.Context, config: ConfigOption = None) -> None:
    """End a pause: the site joins the next round, or this one where it still may."""
    site = _config(context, config)
    from cosilo_client.errands import resume_by_person

    say("resumed" if resume_by_person(site) else "was not paused")


@app.command()
def serve(context: typer.Context, config: ConfigOption = None) -> None:
    """Run the daemon until SIGTERM."""
    site = _config(context, config)
    from cosilo_client.daemon import serve as serve_site

    serve_site(site)


def _leave_federation(site: SiteConfig, yes: bool) -> None:
    from cosilo_client.leaving import explain_leaving_federation, leave_federation

    say(explain_leaving_federation(site))
    say()
    if not yes and not ask("Leave the federation and destroy this site's keys?"):
        refuse("leave federation: not left; nothing was changed")
        raise typer.Exit(ExitCode.FAILED)
    left = leave_federation(site)
    say(f"left federation {left.federation}: this site's keys are destroyed")
    if not left.problem:
        say(f"the coordinator lets {left.name} in no more; its admins make that final: cosilo site revoke {left.name}")
        return
    refuse(f"tell the coordinator: {left.problem}")
    note("call an admin of the federation, by telephone, and say:")
    note(f"  site {left.name} of federation {left.federation} has left; its key was {left.fingerprint}")
    note(f"  please run: cosilo site revoke {left.name}")
    raise typer.Exit(ExitCode.UNREACHABLE if left.unreachable else ExitCode.FAILED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. arguments: those of the process unless given."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines say less than ours, and come in between
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = app(given, prog_name="cosilo-site", standalone_mode=False)
    except CosiloError as error:
        explain(error)
        return ExitCode.UNREACHABLE if _is_unreachable(error) else ExitCode.FAILED
    except typer.Abort:
        refuse("interrupted")
        return ExitCode.FAILED
    except OSError as error:
        refuse(f"{error.filename or 'system'}: {error.strerror or error}")
        return ExitCode.FAILED
    except Exception as error:
        if not hasattr(error, "format_message"):  # a bug: its traceback is what is wanted
            raise
        return _bad_usage(error)
    return code if isinstance(code, int) else ExitCode.DONE


def _config(context: typer.Context, given: Path | None) -> SiteConfig:
    from cosilo_client.config import load_site_config

    return load_site_config(given or context.obj or DEFAULT_CONFIG)


def _is_unreachable(error: CosiloError) -> bool:
    from cosilo_client.coordinator import Unreachable

    return isinstance(error, Unreachable)


def _bad_usage(error: Exception) -> int:
    """What typer says about a command line, in our voice; only the shape of its exception is used."""
    message = str(error.format_message())  # type: ignore[attr-defined]  # checked by the caller
    if type(error).__name__ == "NoArgsIsHelpError":
        note(message)
        return ExitCode.BAD_USAGE
    path = getattr(getattr(error, "ctx", None), "command_path", "cosilo-site")
    refuse(message[:1].lower() + message[1:].rstrip("."), f"see {path} --help")
    return ExitCode.BAD_USAGE


if __name__ == "__main__":
    sys.exit(main())
