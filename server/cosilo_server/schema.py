"""The coordinator's tables. Owns columns and their meaning; queries are in store.py.

Times are UTC seconds; digests, runs and keys are raw bytes. Bump SCHEMA_VERSION with every change, and say in UPGRADES how an older database
becomes the new one.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sqlalchemy import (
    Column,
    Connection,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

SCHEMA_VERSION = 3

metadata = MetaData()

members = Table(
    "members",
    metadata,
    Column("version", Integer, primary_key=True),
    Column("revision", Integer, primary_key=True),  # how many endorsed entries were appended since an admin signed this version
    Column("list", LargeBinary, nullable=False),
    Column("at", Float, nullable=False),
)

invitations = Table(
    "invitations",
    metadata,
    Column("token_public", LargeBinary, primary_key=True),
    Column("name", String(63), nullable=False),
    Column("role", String(16), nullable=False),
    Column("expires_unix_s", Integer, nullable=False),
    Column("preapproval", LargeBinary, nullable=False),  # empty where an admin will approve by hand
    Column("invited_at", Float, nullable=False),
)

# What came of an invitation; a row here is what makes its token one-time.
enrolments = Table(
    "enrolments",
    metadata,
    Column("token_public", LargeBinary, ForeignKey("invitations.token_public"), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("role", String(16), nullable=False),
    Column("signing_key", LargeBinary, nullable=False),
    Column("tls_key_digest", LargeBinary, nullable=False),
    Column("certificate_chain", LargeBinary, nullable=False),
    Column("enrolled_unix_s", Integer, nullable=False),
    Column("endorsement", LargeBinary, nullable=False),  # empty where there was no pre-approval
)

# Tries of an invitation's token with a signature, a name or a CSR that is not its own; a few burn it.
wrong_tries = Table(
    "wrong_tries",
    metadata,
    Column("token_public", LargeBinary, ForeignKey("invitations.token_public"), primary_key=True),
    Column("tries", Integer, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("manifest", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("signer", String(63), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("stopped", Integer, nullable=False, default=0),
)

# Runs whose next round does not start until an admin says so; what was ordered waits. A row goes when the run is resumed or stopped.
paused_runs = Table(
    "paused_runs",
    metadata,
    Column("run", LargeBinary, ForeignKey("runs.run"), primary_key=True),
    Column("admin", String(63), nullable=False),
    Column("reason", String(200), nullable=False),
    Column("since", Float, nullable=False),
)

# What admins asked for: rounds of a kind, worked off in the order of their ids.
orders = Table(
    "orders",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", LargeBinary, ForeignKey("runs.run"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("wanted", Integer, nullable=False),
    Column("closed", Integer, nullable=False, default=0),
    Column("cancelled", Integer, nullable=False, default=0),
    Column("ordered_at", Float, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", LargeBinary, ForeignKey("runs.run"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("state", Text, nullable=False),  # rounds/record.py
    Column("phase", String(16), nullable=False),
    Column("bytes_down", Integer, nullable=False, default=0),
    Column("bytes_up", Integer, nullable=False, default=0),
    Column("outcome", Text, nullable=False, default=""),  # JSON of closing.RoundOutcome, once the sum is open
)

# Messages of rounds in progress, by digest; dropped when the round ends.
messages = Table(
    "messages",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", LargeBinary, primary_key=True),
    Column("message", LargeBinary, nullable=False),
)

# What moved each round, for `cosilo round trace` and for people; never replayed.
events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", LargeBinary, nullable=False),
    Column("number", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("what", String(32), nullable=False),
    Column("site", String(63), nullable=False, default=""),
    Column("phase", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
)

# How long what took in each round, for `cosilo round trace` (spans.py); never replayed. How many a round may have is trace.py's to bound.
spans = Table(
    "spans",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", LargeBinary, nullable=False),
    Column("number", Integer, nullable=False),
    Column("party", String(63), nullable=False),  # "" is the coordinator
    Column("lane", String(16), nullable=False),
    Column("what", String(32), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("began_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("pieces", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),
    Index("spans_of_round", "run", "number"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run", LargeBinary, ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("weights", LargeBinary, nullable=False),
    Column("ema", LargeBinary, nullable=False),
    Column("optimiser", LargeBinary, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
)

# How a checkpoint is made from the weights before it (a manifest's downlink): an artifact that stays while that checkpoint is the newest.
steps = Table(
    "steps",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("base", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run", "round"], ["checkpoints.run", "checkpoints.round"]),
)

# Sample grids that were drawn, by the round of their checkpoint; the pictures are artifacts.
grids = Table(
    "grids",
    metadata,
    Column("run", LargeBinary, ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("digest", LargeBinary, primary_key=True),
    Column("created_at", Float, nullable=False),
)

# Checkpoints that an admin keeps whatever the policy says. name: "" for none.
kept_checkpoints = Table(
    "kept_checkpoints",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("kept_at", Float, nullable=False),
    ForeignKeyConstraint(["run", "round"], ["checkpoints.run", "checkpoints.round"]),
)

# Checkpoints whose files policy has given free; their rows stay, so that a list can say what became of them.
retired_checkpoints = Table(
    "retired_checkpoints",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    ForeignKeyConstraint(["run", "round"], ["checkpoints.run", "checkpoints.round"]),
)

sites_seen = Table(
    "sites_seen",
    metadata,
    Column("site", String(63), primary_key=True),
    Column("at", Float, nullable=False),
    Column("address", String(256), nullable=False),
    Column("software", String(64), nullable=False),
    Column("certificate_expires_at", Float, nullable=False),
)

# Sites that left by themselves, by the key under which they were members: barred until an admin revokes them, or readmits the name with another.
left_sites = Table(
    "left_sites",
    metadata,
    Column("site", String(63), primary_key=True),
    Column("key", LargeBinary, primary_key=True),
    Column("at", Float, nullable=False),
)

# What the adapters of a run stand on (a manifest's lora.base): an artifact that stays for as long as the run does.
bases = Table(
    "bases",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("digest", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
)

# The newest certificate that each member was seen with: what expires when, and who still has one of a CA that goes.
certificates_seen = Table(
    "certificates_seen",
    metadata,
    Column("role", String(16), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("key_digest", LargeBinary, nullable=False),
    Column("issuer", String(40), nullable=False),
    Column("expires_at", Float, nullable=False),
)


def _from_version_1(db: Connection) -> None:
    certificates_seen.create(db)
    for table in (grids, wrong_tries, kept_checkpoints, retired_checkpoints, paused_runs, left_sites, spans, bases):
        table.create(db)


def _from_version_2(db: Connection) -> None:
    steps.create(db)


UPGRADES: Mapping[int, Callable[[Connection], None]] = MappingProxyType({1: _from_version_1, 2: _from_version_2})
"""By version: what makes the next one. Grids that were drawn before version 2 are not in the table."""
