"""Masked runs between real daemons: what masks change (nothing), what 24 bits cost, what a policy refuses, and what a round leaves behind."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cosilo_client.daemon import site_identity
from cosilo_client.vault import Keeps, Vault
from cosilo_common.canonical import unlp
from cosilo_common.database import open_database
from cosilo_common.diffusion.model import tensor_table
from cosilo_common.encoding import Encoding, Section
from cosilo_common.identity.tls import federation_channel_sync
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_common.secagg.keys import SystemRandomness
from cosilo_common.secagg.messages import SITES_MAX, Consent, MessageType, sign
from cosilo_common.weights import open_vector
from cosilo_server.rounds.state import Phase
from tests.federation.digits import digits_sites, site_names
from tests.federation.faults import HeldRound
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import wait_until
from tests.system.reference import CAP, CLIP, plan, recipe_of, site_data, train_at_site

WILLING, CAREFUL, CROWDED = site_names(6)[:4], site_names(6)[4], site_names(6)[5]
SEED, TRACED_SEED = 51, 52
PARTICIPANTS = 6
SHORT_S = 8.0  # how long a round waits for a site that is gone
NAMES = ["masked", "plain", "short-words", "traced"]  # a person accepts the first at each site, which pins the keys; the policy the others
LOOKS = {"max_rounds_per_model": 3}  # three runs from one untrained model: a manifest cannot raise a site's own bound (R8)
# f = 1 in a run of six is below this project's default of a third, so the willing lower it by name; t is then 4, the willing ones' number.
LISTED: dict[str, Any] = {"runs": NAMES, "max_rounds_per_model": 3}  # R8: three of the runs start from one untrained model
POLICIES: dict[str, dict[str, Any]] = {
    **{site: {**LISTED, "f_min": 1, "allow_insecure_plain_sum": True} for site in WILLING},
    CAREFUL: LISTED,
    CROWDED: {**LISTED, "f_min": 1, "allow_insecure_plain_sum": True, "cohort_min": 7},
}


@dataclass(frozen=True)
class Tried:
    """A run of all six after two rounds. declined: by site, as `cosilo round show` told during the first."""

    run: str
    rounds: list[dict[str, Any]]
    declined: dict[str, str | None]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("runs")
    specs = [replace(spec, policy=POLICIES[spec.name]) for spec in digits_sites(root, PARTICIPANTS, alpha=0.5, least=180, seed=1)]
    with LocalFederation(root, specs, typed=False) as federation:
        federation.start()
        yield federation


@pytest.fixture(scope="module")
def masked(federation: LocalFederation) -> Tried:
    run = six_sites_run(federation, "masked")
    federation.accept_all(run)
    return tried(federation, run)


@pytest.fixture(scope="module")
def plain(federation: LocalFederation, masked: Tried) -> Tried:
    return tried(federation, six_sites_run(federation, "plain", plain=True))


def six_sites_run(federation: LocalFederation, name: str, *, plain: bool = False, **more: Any) -> str:
    """A run of all six with the same seed, and so with the same untrained model, each time."""
    return federation.create_run(plan(name, seed=SEED, f=1, max_rounds_per_model=3, **more), plain=plain)


def tried(federation: LocalFederation, run: str) -> Tried:
    with HeldRound(federation, run, WILLING) as held:
        held.walk_to(Phase.TRAINING)
        declined = wait_until(lambda: _shown(federation, run, held.number), "two have declined", 60)
        table = federation.cosilo("round", "show", run, str(held.number))
    for site in (CAREFUL, CROWDED):
        (line,) = [line for line in table.splitlines() if line.startswith(site)]
        assert " policy " in line
    federation.wait_idle(run)
    assert declined is not None  # what `wait_until` returns is truthy
    return Tried(run, federation.run_rounds(run, 1), declined)


def _shown(federation: LocalFederation, run: str, number: int) -> dict[str, str | None] | None:
    entry = federation.cosilo_json("round", "show", run, str(number))
    found = {site["site"]: site["declined"] for site in entry["sites"]}
    return found if sum(code is not None for code in found.values()) == 2 else None


def test_masks_change_no_bit_of_a_checkpoint(federation: LocalFederation, masked: Tried, plain: Tried) -> None:
    for both in zip(masked.rounds, plain.rounds, strict=True):
        assert [(entry["phase"], entry["survivors"]) for entry in both] == [("closed", sorted(WILLING))] * 2
        assert both[0]["checkpoint"] == both[1]["checkpoint"]
        assert both[0]["bytes_up"] == both[1]["bytes_up"]
    made = [[(c["weights"], c["ema"]) for c in federation.checkpoints(one.run)] for one in (masked, plain)]
    assert made[0] == made[1]
    assert len(set(made[0])) == 3


def test_24_bits_stay_within_their_bound_of_32(federation: LocalFederation, masked: Tried) -> None:
    run = six_sites_run(federation, "short-words", encoding={"clip": CLIP, "cap": CAP, "bits": 24})
    (narrow,) = federation.run_rounds(run, 1)
    wide = masked.rounds[0]
    assert (narrow["phase"], narrow["survivors"], narrow["base"]) == ("closed", sorted(WILLING), wide["base"])
    assert 4 * narrow["bytes_up"] == 3 * wide["bytes_up"]
    table, total = tensor_table(recipe_of(SEED).architecture), wide["losses"]["total_weight"]
    assert narrow["losses"]["total_weight"] == total
    got, exact = (np.array(open_vector(federation.artifact(entry["checkpoint"]), table)) for entry in (narrow, wide))
    bounds = [encoding_of(bits, PARTICIPANTS, table.size, CLIP).error_bound(CLIP, len(WILLING), total) for bits in (24, 32)]
    assert np.all(np.abs(got - exact) <= sum(bounds) + 2 * np.spacing(np.maximum(np.abs(got), np.abs(exact))))
    assert not np.array_equal(got, exact)
    spread = float(np.sqrt(np.mean(np.square(got - exact, dtype=np.float64))))
    assert spread <= 1.05 * bounds[0] / math.sqrt(len(WILLING)) / 2  # PROTOCOL.md: sd <= step cap sqrt(|U3|) / (2 sum W)


def encoding_of(bits: int, participants: int, size: int, clip: float) -> Encoding:
    return Encoding(bits=bits, participants=participants, cap=CAP, sections=(Section(size, clip),), loss_max=16.0, losses=5)


def test_a_policy_refuses_and_the_coordinator_is_told_a_code_alone(federation: LocalFederation, masked: Tried, plain: Tried) -> None:
    code = {**dict.fromkeys(WILLING), CAREFUL: "policy", CROWDED: "policy"}
    assert (masked.declined, plain.declined) == (code, code)
    reasons = {site: {line["reason"] for line in log_lines(federation, site) if line["event"] == "declined"} for site in federation.sites}
    assert reasons == {
        **{site: set() for site in WILLING},
        CAREFUL: {
            "it withstands 1 colluding sites of 6 and this site's least is 2; set f_min in [policy] to allow that",
            "its aggregation is insecure-plain-sum: the coordinator would see this site's own update; "
            "set allow_insecure_plain_sum = true in [policy] to allow that",
        },
        CROWDED: {"its rounds have at most 6 sites and this site's least is 7; set cohort_min in [policy] to allow that"},
    }
    told = [line for line in log_lines(federation, COORDINATOR) if line["event"] == "site declines"]
    assert {line["site"] for line in told} == {CAREFUL, CROWDED}
    assert {line["code"] for line in told} == {"policy"}
    assert "[policy]" not in federation.log(COORDINATOR)
    assert {site: federation.metric(site, "cosilo_images_total") for site in (CAREFUL, CROWDED)} == {CAREFUL: 0, CROWDED: 0}


def log_lines(federation: LocalFederation, who: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in federation.log(who).splitlines() if line.startswith("{")]


# A round that loses a site, from its first secret to its last trace


@dataclass
class Traced:
    """A masked round of the four in which one was killed. secrets: by what they are, as they stood on the sites' disks in the round."""

    run: str
    entry: dict[str, Any]
    secrets: dict[str, bytes]
    before: dict[str, Counter[str]]
    after: dict[str, Counter[str]]


TRACED_CLIP = 1e-3  # five steps of Adam at a rate of 1e-3 go further than that for most weights
VICTIM, SENDER = WILLING[0], WILLING[1]


@pytest.fixture(scope="module")
def traced(federation: LocalFederation, masked: Tried) -> Traced:
    """The victim is killed while it owes its upload, so that the others reveal its mask key; three messages before are bad ones."""
    deadlines = {"sharing_s": 60.0, "uploading_s": SHORT_S}
    encoding = {"clip": TRACED_CLIP, "cap": CAP}
    run = federation.create_run(plan("traced", TRACED_SEED, participants=WILLING, f=1, encoding=encoding, deadlines=deadlines))
    before, secrets = figures(federation), dict[str, bytes]()
    with HeldRound(federation, run, WILLING) as held:
        for entry in held.walk():
            for site in WILLING:
                secrets |= secrets_on_disk(federation, site, run, held.number)
            if entry["phase"] == Phase.SHARING:
                assert traces(federation, secrets) == {
                    f"{site}'s {what}" for site in WILLING for what in ("update", "masks.key", "round.key")
                }
                send_bad_messages(federation, run, held.number)
            if entry["phase"] == Phase.UPLOADING:
                federation.kill(VICTIM)
                break
    federation.wait_idle(run)
    after = figures(federation)
    federation.restart(VICTIM)
    for site in WILLING:
        wait_until(lambda site=site: not rounds_folder(federation, site, run).exists(), f"{site} forgets the round", 60)  # type: ignore[misc]
    return Traced(run, federation.rounds(run)[-1], secrets, before, after)


def test_a_round_is_counted_to_the_last_drop(federation: LocalFederation, traced: Traced) -> None:
    assert (traced.entry["phase"], traced.entry["survivors"]) == ("closed", sorted(set(WILLING) - {VICTIM}))
    more = {name: traced.after[name] - traced.before[name] for name in traced.after}
    assert more["cosilo_secagg_attempts_total"] == Counter(opened=1)
    assert more["cosilo_secagg_dropouts_total"] == Counter(uploading=1)
    assert more["cosilo_secagg_refusals_total"] == Counter({"message": 1, "signature": 1, "R2": 1})
    assert more["cosilo_rejected_messages_total"] == Counter(protocol=3)
    assert more["cosilo_rounds_total"] == Counter(closed=1)
    phases = ("training", "sharing", "uploading", "consenting", "revealing", "opening")
    assert more["cosilo_phase_duration_seconds_count"] == Counter(dict.fromkeys(phases, 1))
    seconds = more["cosilo_phase_duration_seconds_sum"]
    assert min(seconds[phase] for phase in phases) > 0
    assert seconds["uploading"] >= SHORT_S
    assert sum(seconds.values()) == pytest.approx(traced.entry["seconds"], abs=0.1)


@pytest.mark.usefixtures("as_a_trainer_does")
def test_the_clipped_share_is_the_sum_s(federation: LocalFederation, traced: Traced) -> None:
    recipe, entry = recipe_of(TRACED_SEED), traced.entry
    base = np.array(open_vector(federation.artifact(entry["base"]), tensor_table(recipe.architecture)))
    updates = [train_at_site(entry["round"], site, site_data(federation)[site], base, recipe)[1] for site in entry["survivors"]]
    share = np.mean([np.mean(np.abs(update) > np.float64(TRACED_CLIP)) for update in updates])
    assert 0.05 < share < 0.95
    assert entry["losses"]["clip_ratio"] == pytest.approx(share, abs=1e-8)  # a unit of the tail, 1 / Q, a site
    assert federation.metric(COORDINATOR, "cosilo_clipped_ratio", run=traced.run[:12]) == entry["losses"]["clip_ratio"]


def test_after_a_round_no_share_no_seed_and_no_update_is_left_anywhere(federation: LocalFederation, traced: Traced) -> None:
    kinds = Counter(name.split("'s ")[1].split(" of ")[0] for name in traced.secrets)
    # Walked to UPLOADING: one site had stopped before it shared, and uploaded before the next look; the victim had not opened its shares.
    assert kinds == {
        **dict.fromkeys(("share key", "mask key", "rounding", "masks.key", "round.key", "update", "quantised update"), 4),
        **dict.fromkeys(("self secret",), 3),
        **dict.fromkeys(("share b", "share s"), 4 + 3 * 3),
    }
    assert traces(federation, traced.secrets) == set()
    assert not any(path.is_file() for path in (federation.data / "spool").rglob("*"))


def figures(federation: LocalFederation) -> dict[str, Counter[str]]:
    """The coordinator's counters that have one label, by that label; certificates, sites and bytes aside."""
    names = ("secagg_attempts", "secagg_dropouts", "secagg_refusals", "rejected_messages", "rounds")
    wanted = {*(f"cosilo_{name}_total" for name in names), *(f"cosilo_phase_duration_seconds_{part}" for part in ("count", "sum"))}
    found: dict[str, Counter[str]] = {name: Counter() for name in wanted}
    for name, labels, value in federation.metrics(COORDINATOR):
        if name in wanted:
            found[name][next(iter(labels.values()))] = value  # type: ignore[assignment]  # seconds are no integers
    return found


def send_bad_messages(federation: LocalFederation, run: str, number: int) -> None:
    """Bytes that are no message, another site's name, and a consent long before its phase; each is refused by its rule."""
    identity = site_identity(federation.state(SENDER))

    def consent(site: str) -> bytes:
        body = Consent(bytes(32), tuple(sorted(WILLING)))
        return sign(identity.signing_key(), MessageType.CONSENT, bytes.fromhex(run), number, 1, site, body).encode()

    with federation_channel_sync(federation.endpoints(COORDINATOR)["federation"], identity.tls) as channel:
        stub = site_pb2_grpc.SiteServiceStub(channel)
        for message, rule in ((b"nothing", "message"), (consent(VICTIM), "signature"), (consent(SENDER), "R2")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Submit(site_pb2.SubmitRequest(message=message), timeout=30)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert str(caught.value.details()).startswith(f"secure aggregation: {rule}: ")


def rounds_folder(federation: LocalFederation, site: str, run: str) -> Path:
    return federation.state(site) / "rounds" / run


def secrets_on_disk(federation: LocalFederation, site: str, run: str, number: int) -> dict[str, bytes]:
    """A site's secrets of the round in progress that its folder yields now, opened with the keys that lie there too."""
    folder, found = rounds_folder(federation, site, run), {}
    for keeps in Keeps:
        if (folder / f"{keeps}.key").exists():
            found[f"{site}'s {keeps}.key"] = (folder / f"{keeps}.key").read_bytes()
    if (folder / "update").exists():
        update = np.fromfile(folder / "update", dtype="<f4")
        weight = json.loads((folder / "update.json").read_text())["weight"]
        words = np.empty(update.size, np.uint32)
        encoding_of(32, len(WILLING), update.size, TRACED_CLIP).quantise(update, 0, weight, words)
        found |= {f"{site}'s update": update.tobytes(), f"{site}'s quantised update": words.tobytes()}
    engine = open_database(federation.state(site) / "state.db", synchronous="FULL")
    try:
        vault = Vault(engine, federation.state(site) / "rounds", SystemRandomness())
        names = ["rounding", "share key", "mask key", "self secret", "held", f"own shares of {site}"]
        if f"{site}'s masks.key" not in found:
            names = names[-2:]
        opened = {name: vault.get(bytes.fromhex(run), number, 1, name) for name in names}
    finally:
        engine.dispose()
    found |= {f"{site}'s {name}": secret for name in names[:-2] if (secret := opened[name]) is not None}
    held, own = opened["held"], opened[f"own shares of {site}"]
    if held is not None:
        fields = unlp(held, 3 * SITES_MAX)
        for dealer, b, s in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
            found |= {f"{site}'s share b of {dealer.decode()}": b, f"{site}'s share s of {dealer.decode()}": s}
    if own is not None:
        b, s = unlp(own, 2)
        found |= {f"{site}'s share b of {site}": b, f"{site}'s share s of {site}": s}
    return found


def traces(federation: LocalFederation, secrets: Mapping[str, bytes]) -> set[str]:
    """Which secrets some file of a site's, of the coordinator's or among the logs has as bytes, or in a log in hex or base 64."""
    pieces = [(name, piece) for name, secret in secrets.items() for piece in _pieces(secret)]
    found = set()
    for path in federation.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found |= {name for name, piece in pieces if piece in data}
            if path.parent == federation.logs:
                text = data.decode(errors="replace")
                found |= {name for name, piece in pieces if piece.hex() in text or base64.b64encode(piece).rstrip(b"=").decode() in text}
    return found


def _pieces(secret: bytes) -> list[bytes]:
    """A short secret itself; of a vector a dozen stretches of 64 bytes that are not nearly all one byte."""
    if len(secret) <= 64:
        return [secret]
    step = len(secret) // 12 // 64 * 64
    return [piece for at in range(0, len(secret) - 64, step) if len(set(piece := secret[at : at + 64])) > 8]
