"""No bytes from outside make a decoder do anything but answer or refuse in its own words: no other exception, no hang, little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cosilo_client.config import load_site_config
from cosilo_client.data import DataConfig
from cosilo_client.trainer.jobs import Hello, Progress, TrainJob, job_from_line, report_from_line, to_line
from cosilo_client.wire import chunk_from, owed_from
from cosilo_common.audit import AuditLog
from cosilo_common.canonical import MalformedBytes, id_set, parse_id_set, sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.diffusion.presets import preset
from cosilo_common.encoding import Encoding
from cosilo_common.errors import CosiloError
from cosilo_common.framing import data_of, frame_data
from cosilo_common.identity.certificates import check_chain, make_csr, read_chain, read_csr
from cosilo_common.identity.documents import parse_document
from cosilo_common.identity.endorsement import Endorsement, parse_preapproval, preapprove
from cosilo_common.identity.enrolment import make_request
from cosilo_common.identity.invitation import make_invitation, parse_invitation
from cosilo_common.identity.keys import make_signing_key, make_tls_key
from cosilo_common.identity.members import read_members
from cosilo_common.identity.names import PeerName, Role, parse_uri, peer_from_certificate
from cosilo_common.identity.trust import Trust, pem_of, read_trust, sign_trust
from cosilo_common.manifest import Participant, parse_manifest
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import (
    Advert,
    Complaint,
    ComplaintCode,
    Consent,
    MessageType,
    Reveal,
    RoundKind,
    Shares,
    Signed,
    Upload,
    sign,
)
from cosilo_common.weights import open_vector, read_header, write_weights
from cosilo_server.cli.run_file import RunFile
from cosilo_server.config import CoordinatorConfig
from cosilo_server.evaluation import refusal
from cosilo_server.rounds import machine, record
from cosilo_server.store import terms_of
from tests.fuzz.mutation import flips, fuzzed, inputs, some, truncations
from tests.identity_parties import ADMIN, FEDERATION, NOW, found
from tests.protocol.manifests import a_manifest

MEMORY_BYTES_MAX = 32 << 20  # for inputs of a few kilobytes: a length that lies is not believed
NAMES = ("st-anna", "st-beda", "st-clara")
ANNA = PeerName(FEDERATION, Role.SITE, "st-anna")
RUN, DIGEST, KEY = sha256(b"run"), sha256(b"digest"), sha256(b"key")


@dataclass(frozen=True)
class Decoder:
    """What reads bytes from outside. valid: some that it takes; refuses: what it may raise, by its own documentation."""

    read: Callable[[bytes], object]
    valid: bytes
    refuses: tuple[type[Exception], ...] = (CosiloError,)


def check(name: str, decoder: Decoder, data: bytes) -> None:
    inputs[name] += 1
    try:
        decoder.read(data)
    except decoder.refuses:
        pass


def made(folder: Path) -> dict[str, Decoder]:
    """Every decoder with something that it takes."""
    federation = found(folder / "f")
    members, key = federation.members, federation.admin_key
    expires = int(NOW.timestamp()) + 86400
    invitation = make_invitation(ANNA, ADMIN, key, members, federation.authority.root_pem, "127.0.0.1:1", "127.0.0.1:2", expires, True)
    preapproval = preapprove(FEDERATION, "st-anna", KEY, expires, ADMIN, key)
    tls_key, signing_key = make_tls_key(), make_signing_key()
    request = make_request(invitation, tls_key, signing_key)
    assert invitation.preapproval is not None
    endorsement = Endorsement(
        preapproval=invitation.preapproval, signing_key=request.signing_key, csr_digest=sha256(request.csr),
        token_signature=request.token_signature, signing_signature=request.signing_signature,
    )  # fmt: skip
    (root,) = read_chain(federation.authority.root_pem)
    trust = sign_trust(
        Trust(version=1, federation=FEDERATION, roots=(pem_of(root),), issuers=("ab" * 20,)), (), ADMIN, key, members.admins()
    )
    chain = federation.coordinator.tls.certificate.read_bytes()
    manifest = a_manifest(tuple(Participant(name=name, key=sha256(name.encode()).hex()) for name in NAMES))
    encoding = round_encoding(manifest, RoundKind.TRAIN)
    state, _ = machine.begin(
        run=RUN, number=1, kind=RoundKind.TRAIN, terms=terms_of(manifest), base_digest=DIGEST, base_bytes=192,
        encoding=encoding.canonical(), seed=bytes(32), connected=NAMES, now=0.0,
    )  # fmt: skip
    document, _ = record.dump(state)
    recipe = preset("digits")
    job = TrainJob(
        weights=Path("w"), architecture=recipe.architecture, schedule=recipe.schedule, training=recipe.training,
        data=DataConfig(kind="digits"), update=Path("u"), seed=1,
    )  # fmt: skip
    owed = site_pb2.Assignment(
        run=RUN, round=1, kind=1, phase=2, invited=True, attempt=1, invited_sites=NAMES, base_digest=DIGEST, base_bytes=192,
        encoding=encoding.canonical(), roster=[b"advert"], survivors=NAMES, deadline_s=60.0,
    )  # fmt: skip
    weights = folder / "weights"
    write_weights(weights, manifest.tensor_table, iter([np.zeros(manifest.tensor_table.size, dtype="<f4")]))
    log = AuditLog(folder / "audit")
    for number in range(3):
        log.append("site st-anna", "round begun", round=number)

    def load_round(data: bytes) -> object:
        return record.load(
            data.decode("utf-8", "replace"), {}, run=RUN, number=1, kind=RoundKind.TRAIN, terms=terms_of(manifest), started_at=0.0
        )

    def from_file(read: Callable[[Path], object], name: str = "file") -> Callable[[bytes], object]:
        path = folder / name

        def reading(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return reading

    def read_owed(data: bytes) -> object:
        return [owed_from(one) for one in site_pb2.AttendResponse.FromString(data).owed]

    site_toml = (
        b'state = "s"\n[data]\nkind = "idx"\npath = "images"\nclasses = ["a", "b"]\n'
        b'[policy]\nhours = ["18:00-06:00"]\n[metrics]\nlisten = "127.0.0.1:0"\n'
    )
    run_toml = b'name = "digits"\npreset = "digits"\n[encoding]\ncap = 10\n[training]\nlocal_epochs = 1\n'
    coordinator_toml = (
        b'federation = "north-star"\n[listen]\nfederation = "0.0.0.0:7443"\n[limits]\nfree_bytes_min = 100\n[log]\njson = true\n'
    )
    return {
        "manifest": Decoder(parse_manifest, manifest.canonical()),
        "invitation": Decoder(parse_invitation, invitation.canonical()),
        "members": Decoder(lambda data: read_members(data, FEDERATION, members.anchor()), members.canonical()),
        "trust document": Decoder(
            lambda data: read_trust(data, FEDERATION, members.admins(), federation.authority.root_pem, None), trust.canonical()
        ),
        "preapproval": Decoder(parse_preapproval, preapproval.canonical()),
        "endorsement": Decoder(lambda data: parse_document(Endorsement, data, 1 << 16, "read"), endorsement.canonical()),
        "CSR": Decoder(lambda data: read_csr(data, ANNA), make_csr(tls_key, ANNA)),
        "certificate chain": Decoder(read_chain, chain),
        "peer": Decoder(peer_from_certificate, chain),
        "checked chain": Decoder(
            lambda data: check_chain(data, federation.authority.root_pem, federation.coordinator.membership.peer(), NOW), chain
        ),
        "URI": Decoder(lambda data: parse_uri(data.decode("utf-8", "replace")), ANNA.uri().encode()),
        "encoding": Decoder(Encoding.parse, encoding.canonical()),
        "names": Decoder(lambda data: parse_id_set(data, 1000), id_set(NAMES), (MalformedBytes,)),
        "round": Decoder(load_round, document.encode()),
        "job": Decoder(job_from_line, to_line(job), (ValidationError,)),
        "report": Decoder(report_from_line, to_line(Progress(tenths=1, images=2, images_per_second=3.0, loss=0.5)), (ValidationError,)),
        "trainer's hello": Decoder(report_from_line, to_line(Hello(rank=0)), (ValidationError,)),
        "assignments": Decoder(read_owed, site_pb2.AttendResponse(owed=[owed, owed]).SerializeToString(), (CosiloError, DecodeError)),
        "chunk": Decoder(chunk_from, site_pb2.GetArtifactResponse(data=b"abc", total_bytes=3).SerializeToString()),
        "frame": Decoder(data_of, frame_data(b"abc" * 100)),
        "weights header": Decoder(from_file(read_header), weights.read_bytes()),
        "weights": Decoder(from_file(lambda path: open_vector(path, manifest.tensor_table)), weights.read_bytes()),
        "audit log": Decoder(from_file(lambda path: AuditLog(path).verify()), (folder / "audit").read_bytes()),
        "audit log's end": Decoder(from_file(lambda path: AuditLog(path).append("a", "b")), (folder / "audit").read_bytes()),
        "site.toml": Decoder(from_file(load_site_config, "site.toml"), site_toml),
        "coordinator.toml": Decoder(from_file(CoordinatorConfig.read), coordinator_toml),
        "worker's words": Decoder(
            lambda data: refusal("sample", 1, data), json.dumps({"operation": "sample", "subject": "it", "hint": "do"}).encode()
        ),
        "run file": Decoder(from_file(RunFile, "run.toml"), run_toml),
    }


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    return made(tmp_path_factory.mktemp("decoders"))


NAMED = (
    "manifest", "invitation", "members", "trust document", "preapproval", "endorsement", "CSR", "certificate chain", "peer", "checked chain", "URI",
    "encoding", "names",
    "round", "job", "report", "trainer's hello", "assignments", "chunk", "frame", "weights header", "weights", "audit log",
    "audit log's end", "worker's words", "site.toml", "coordinator.toml", "run file",
)  # fmt: skip


def test_every_decoder_is_named(decoders: dict[str, Decoder]) -> None:
    assert set(decoders) == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_what_is_valid_is_taken(name: str, decoders: dict[str, Decoder]) -> None:
    if name != "CSR":
        decoders[name].read(decoders[name].valid)


@pytest.mark.parametrize("name", NAMED)
def test_any_bytes_are_read_or_refused(name: str, decoders: dict[str, Decoder]) -> None:
    decoder = decoders[name]

    @fuzzed()
    @given(some(decoder.valid))
    def try_some(data: bytes) -> None:
        check(name, decoder, data)

    try_some()


@pytest.mark.parametrize("name", NAMED)
def test_cut_at_any_byte_it_is_read_or_refused_in_little_memory(name: str, decoders: dict[str, Decoder]) -> None:
    decoder = decoders[name]
    tracemalloc.start()
    try:
        for data in truncations(decoder.valid, 150):
            check(name, decoder, data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MEMORY_BYTES_MAX


@pytest.mark.parametrize(
    "name", ["manifest", "invitation", "members", "trust document", "preapproval", "endorsement", "round", "job", "report"]
)
def test_any_json_in_a_field_is_read_or_refused(name: str, decoders: dict[str, Decoder]) -> None:
    decoder = decoders[name]
    plain = json.loads(decoder.valid)
    leaf = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | st.sampled_from([2**63, -1, "", "a" * 64, 1e308])
    )
    values = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))

    @fuzzed()
    @given(st.sampled_from(sorted(plain)), values)
    def try_one(field: str, value: Any) -> None:
        changed = {**plain, field: value}
        check(name, decoder, json.dumps(changed, sort_keys=True, separators=(",", ":")).encode())

    try_one()


# The masking protocol's messages


def bodies() -> dict[str, Decoder]:
    ciphertexts = {name: bytes(94) for name in NAMES[1:]}
    commitments = dict.fromkeys(NAMES, DIGEST)
    consent = Consent(DIGEST, NAMES)
    reveal = Reveal(DIGEST, NAMES[:2], {name: bytes(33) for name in NAMES[:2]}, {NAMES[2]: bytes(33)})
    advert = Advert(RoundKind.TRAIN, DIGEST, DIGEST, KEY, KEY)
    signed = sign(make_signing_key(), MessageType.ADVERT, RUN, 1, 1, "st-anna", advert)
    return {
        "advert": Decoder(Advert.decode, advert.encode()),
        "shares": Decoder(Shares.decode, Shares(ciphertexts, DIGEST, commitments, commitments).encode()),
        "complaint": Decoder(Complaint.decode, Complaint("st-beda", ComplaintCode.SEAL).encode()),
        "upload": Decoder(Upload.decode, Upload(DIGEST, 100).encode()),
        "consent": Decoder(Consent.decode, consent.encode()),
        "reveal": Decoder(Reveal.decode, reveal.encode()),
        "signed": Decoder(Signed.decode, signed.encode()),
    }


MESSAGES = bodies()


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_one_encoding_whatever_bit_is_flipped(name: str) -> None:
    """Either refused, or another message whose own encoding it is: no two byte strings are one message."""
    decoder = MESSAGES[name]
    for data in flips(decoder.valid):
        inputs[name] += 1
        try:
            read: Any = decoder.read(data)
        except CosiloError:
            continue
        assert read.encode() == data


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_was_cut_is_refused(name: str) -> None:
    decoder = MESSAGES[name]
    for data in truncations(decoder.valid, 10**6):
        inputs[name] += 1
        with pytest.raises(CosiloError):
            decoder.read(data)


@pytest.mark.parametrize("name", MESSAGES)
def test_any_bytes_are_a_message_or_refused(name: str) -> None:
    decoder = MESSAGES[name]

    @fuzzed(100)
    @given(some(decoder.valid))
    def try_some(data: bytes) -> None:
        check(name, decoder, data)

    try_some()
