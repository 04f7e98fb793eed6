"""The main job: a coordinator and its sites, separate processes over mTLS, train a diffusion UNet on images that stay at their sites.

`python -m tests.federation.demo` (or `make demo`) leaves samples.png, loss.png and summary.json in demo-out/. Owns the order of
events and the words. Must not know processes' insides: it types the commands that a person would type.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from cosilo_common.manifest import PLAIN_AGGREGATION, SECURE_AGGREGATION
from cosilo_server.cli.shapes import RoundShape
from cosilo_server.cli.terminal import ExitCode
from cosilo_server.cli.watching import CLOSED, Patience, RoundLog, Snapshot, has_ended
from tests.federation.digits import digit_labels, digits_sites, site_names
from tests.federation.local import LocalFederation
from tests.federation.pictures import draw_losses
from tests.federation.processes import FederationError
from tests.federation.splitting import class_counts
from tests.federation.summary import loss_curve, summarise
from tests.federation.toml_files import Toml

ROUNDS = 16  # 78,000 images seen by the four trainers: recognisable after half of them
SITES = 4  # the smallest federation whose masked sum survives a drop (PROTOCOL.md, Parameters)
SITES_MAX = 16  # 1,797 images leave each of them some fifty
ALPHA, LEAST, SEED = 0.5, 200, 1  # of the split: every site lacks digits that another is full of
THREADS = 1  # four trainers on two cores: more threads would only wait for one another
SAMPLES_PER_CLASS = 8
BAR_CHARS = 24

# Smaller batches and a little server momentum: below the loss of the preset's own values after three quarters of the images.
RECIPE: dict[str, Toml] = {
    "name": "digits",
    "preset": "digits",
    "ema_decay": 0.5,
    "training": {"local_epochs": 3, "batch_size": 32, "seed": 0},
    "server_optimiser": {"kind": "fedavgm", "momentum": 0.5},
    "deadlines": {"training_s": 180.0},  # nobody waits half an hour for a site that died on the same machine
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The demo; returns the exit code."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a stopped demo stops its processes
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="cosilo-demo-"))
    try:
        _run(options, scratch)
    except FederationError as error:
        print(f"\nerror: {error.what}{error.tails}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; every process is stopped", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\nDone in {_clock(time.monotonic() - began)}. Look at {options.out / 'samples.png'} and {options.out / 'loss.png'};")
    print(f"the numbers are in {options.out / 'summary.json'}.")
    return 0


def _run(options: argparse.Namespace, scratch: Path) -> None:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FederationError(f"{options.out}: {error.strerror}; choose another folder with --out") from None
    policy: dict[str, Toml] = {"allow_insecure_plain_sum": True} if options.insecure_plain_sum else {}
    least = min(LEAST, len(digit_labels()) // (2 * options.sites))
    specs = digits_sites(scratch, options.sites, alpha=ALPHA, least=least, seed=SEED, policy=policy)
    images = _tell_split(scratch, site_names(options.sites))
    with LocalFederation(scratch, specs, name="demo", threads=THREADS) as federation:
        try:
            print(f"\nStarting one coordinator and {options.sites} sites: {options.sites + 1} processes, mTLS between them ...")
            federation.start()
            print("Every site has made its own keys, is enrolled and connected.")
            run = federation.create_run(RECIPE, plain=options.insecure_plain_sum)
            federation.accept_all(run)
            print(f"Run {run[:12]} is signed by the admin and accepted by each site. {_masks(options.insecure_plain_sum)}\n")
            federation.start_rounds(run, options.rounds)
            _follow(federation, run, options.rounds)
            federation.run_rounds(run, 1, "--statistics")  # measures the last model
            rounds = federation.rounds(run)
            print("\nDrawing ...")
            federation.cosilo("sample", run, "--out", str(options.out / "samples.png"), "--per-class", str(SAMPLES_PER_CLASS))
            _write_results(options, images, rounds)
        except FederationError as error:
            raise FederationError(error.what, federation.log_files()) from None


def _tell_split(scratch: Path, names: Sequence[str]) -> dict[str, int]:
    """Says which site has which images; returns images by site."""
    labels = digit_labels()
    split = tuple(np.loadtxt(scratch / name / "images.txt", dtype=np.int64, ndmin=1) for name in names)
    print(f"{len(labels)} real handwritten digits (8x8, from scikit-learn), each at exactly one site and never anywhere else:\n")
    print(f"  {'site':<12}{'images':>7}   of digit" + "".join(f"{digit:>5}" for digit in range(10)))
    for name, row in zip(names, class_counts(labels, split), strict=True):
        print(f"  {name:<12}{row.sum():>7}           " + "".join(f"{count:>5}" for count in row))
    return {name: len(part) for name, part in zip(names, split, strict=True)}


def _follow(federation: LocalFederation, run: str, rounds: int) -> None:
    """A line for each round as it ends, and on a terminal the round in progress; raises FederationError where the run cannot go on."""
    told = RoundLog(lambda: federation.rounds(run), after=0)  # type: ignore[arg-type,return-value]  # the same shapes, from JSON
    patience = Patience()
    done = 0
    for snapshot in federation.watch(run):
        federation.check_alive()
        for entry in told.newly_ended(snapshot):
            patience.saw_end(entry)
            done += entry["phase"] == CLOSED
            _tell_round(entry, done, rounds)
        _show_progress(snapshot)
        verdict = patience.verdict(snapshot)
        if verdict is not None:
            if verdict.code is not ExitCode.DONE:
                raise FederationError(f"the training did not finish: {verdict.reason}")
            return


def _tell_round(entry: RoundShape, done: int, rounds: int) -> None:
    bar = "█" * round(BAR_CHARS * done / rounds)
    if entry["phase"] != CLOSED:
        print(f"{_clear()}round {entry['round']:>3} abandoned: {entry['reason']}", flush=True)
        return
    loss = entry["losses"]["heldout"] if entry["losses"] else None
    print(
        f"{_clear()}round {entry['round']:>3} of {rounds} {bar:░<{BAR_CHARS}} "
        f"global loss before it {'-' if loss is None else f'{loss:.4f}'}, {len(entry['survivors'])} of {len(entry['invited'])} sites, "
        f"{entry['seconds']:.1f} s, {entry['bytes_down'] / 1e6:.1f} MB down, {entry['bytes_up'] / 1e6:.1f} MB up",
        flush=True,
    )


def _show_progress(snapshot: Snapshot) -> None:
    """On a terminal: what each site does now, on one line that the next one replaces."""
    current = snapshot.round
    if not sys.stdout.isatty() or current is None or has_ended(current):
        return
    sites = "  ".join(f"{site['site']} {'█' * site['tenths']:░<10}" for site in current["sites"])
    print(f"{_clear()}round {current['round']:>3} {current['phase']:<10} {sites}"[: shutil.get_terminal_size().columns], end="", flush=True)


def _clear() -> str:
    return "\r\x1b[K" if sys.stdout.isatty() else ""


def _write_results(options: argparse.Namespace, images: dict[str, int], rounds: list[dict[str, Any]]) -> None:
    aggregation = PLAIN_AGGREGATION if options.insecure_plain_sum else SECURE_AGGREGATION
    try:
        summary, curve = summarise(images, rounds, aggregation), loss_curve(rounds)
    except ValueError as error:
        raise FederationError(str(error)) from None
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw_losses(options.out / "loss.png", curve, f"digits over {len(images)} sites, {aggregation}")
    first, last = curve[0].loss, curve[-1].loss
    print(f"Global held-out loss: {first:.4f} untrained, {last:.4f} after round {curve[-1].round} ({last / first:.0%}).")


def _masks(plain: bool) -> str:
    return (
        "insecure-plain-sum: the coordinator sees each site's update."
        if plain
        else "Updates are masked: the coordinator opens only their sum."
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.federation.demo", description="Train a diffusion model over four sites.")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS, help=f"training rounds (default {ROUNDS})")
    parser.add_argument("--sites", type=_positive, default=SITES, help=f"sites, at least 3 where updates are masked (default {SITES})")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results (default demo-out)")
    parser.add_argument("--data", choices=["digits"], default="digits", help="which images")
    parser.add_argument("--insecure-plain-sum", action="store_true", help="without masks: the coordinator sees each site's update")
    options = parser.parse_args(arguments)
    if options.sites < 3 and not options.insecure_plain_sum:
        parser.error("masked sums need at least 3 sites")
    if options.sites > SITES_MAX:
        parser.error(f"at most {SITES_MAX} sites: the images are few")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 10000")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
