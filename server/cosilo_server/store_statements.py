"""What every step of a round asks of the store and writes there, made once: building such a statement takes longer than running it.

Owns the texts of the store's frequent statements. Must not know what their rows mean, nor who asks.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from cosilo_common.secagg.messages import RoundKind
from cosilo_common.statements import Statement
from cosilo_server import schema

RUNS: Final = select(
    schema.runs, schema.paused_runs.c.admin.label("pause_admin"), schema.paused_runs.c.reason.label("pause_reason")
).select_from(schema.runs.outerjoin(schema.paused_runs, schema.runs.c.run == schema.paused_runs.c.run))


CHECKPOINTS: Final = select(
    schema.checkpoints,
    schema.steps.c.digest.label("step_digest"),
    schema.steps.c.bytes.label("step_bytes"),
    schema.steps.c.base.label("step_base"),
).select_from(
    schema.checkpoints.outerjoin(
        schema.steps, (schema.checkpoints.c.run == schema.steps.c.run) & (schema.checkpoints.c.round == schema.steps.c.round)
    )
)

NO_LIMIT: Final = -1  # as SQLite says it

RUN: Final = Statement(RUNS.where(schema.runs.c.run == bindparam("of_run")))
OPEN_ORDER: Final = Statement(
    select(schema.orders)
    .where(schema.orders.c.run == bindparam("of_run"), schema.orders.c.cancelled == 0, schema.orders.c.closed < schema.orders.c.wanted)
    .order_by(schema.orders.c.id)
    .limit(1)
)
BEGIN_ROUND: Final = Statement(
    insert(schema.rounds), ("run", "number", "kind", "started_at", "state", "phase", "bytes_down", "bytes_up", "outcome")
)
SAVE_ROUND: Final = Statement(
    update(schema.rounds)
    .where(schema.rounds.c.run == bindparam("of_run"), schema.rounds.c.number == bindparam("of_number"))
    .values(state=bindparam("to_state"), phase=bindparam("to_phase"))
)
ROUNDS: Final = select(schema.rounds).where(schema.rounds.c.run == bindparam("of_run"))
NEWEST_ROUNDS: Final = Statement(ROUNDS.order_by(schema.rounds.c.number.desc()).limit(bindparam("limit")))
ONE_ROUND: Final = Statement(ROUNDS.where(schema.rounds.c.number == bindparam("of_number")))
MESSAGES_OF: Final = Statement(
    select(schema.messages.c.digest, schema.messages.c.message).where(
        schema.messages.c.run == bindparam("of_run"), schema.messages.c.number == bindparam("of_number")
    )
)
ABANDONED_SINCE_CLOSE: Final = Statement(
    select(func.count().label("rounds")).where(
        schema.rounds.c.run == bindparam("of_run"),
        schema.rounds.c.phase == "abandoned",
        schema.rounds.c.number
        > select(func.coalesce(func.max(schema.rounds.c.number), 0))
        .where(schema.rounds.c.run == bindparam("of_run"), schema.rounds.c.phase == "closed")
        .scalar_subquery(),
    )
)
ADD_MESSAGE: Final = Statement(insert(schema.messages).on_conflict_do_nothing(), ("run", "number", "digest", "message"))
DROP_MESSAGES: Final = Statement(
    delete(schema.messages).where(schema.messages.c.run == bindparam("of_run"), schema.messages.c.number == bindparam("of_number"))
)
ADD_EVENT: Final = Statement(insert(schema.events), ("run", "number", "at", "what", "site", "phase", "attempt"))
CLOSE_ROUND: Final = Statement(
    update(schema.rounds)
    .where(schema.rounds.c.run == bindparam("of_run"), schema.rounds.c.number == bindparam("of_number"))
    .values(state=bindparam("to_state"), phase=bindparam("to_phase"), outcome=bindparam("to_outcome"))
)
ADD_STEP: Final = Statement(insert(schema.steps), ("run", "round", "digest", "bytes", "base"))
ADD_CHECKPOINT: Final = Statement(insert(schema.checkpoints), ("run", "round", "weights", "ema", "optimiser", "bytes", "created_at"))
COUNT_CLOSED: Final = Statement(
    update(schema.orders)
    .where(
        schema.orders.c.id
        == select(func.min(schema.orders.c.id))
        .where(
            schema.orders.c.run == bindparam("of_run"),
            schema.orders.c.kind == bindparam("of_kind"),
            schema.orders.c.cancelled == 0,
            schema.orders.c.closed < schema.orders.c.wanted,
        )
        .scalar_subquery()
    )
    .values(closed=schema.orders.c.closed + 1)
)
ADD_BYTES: Final = Statement(
    update(schema.rounds)
    .where(schema.rounds.c.run == bindparam("of_run"), schema.rounds.c.number == bindparam("of_number"))
    .values(bytes_down=schema.rounds.c.bytes_down + bindparam("down"), bytes_up=schema.rounds.c.bytes_up + bindparam("up"))
)
LAST_OUTCOME: Final = Statement(
    select(schema.rounds.c.outcome)
    .where(schema.rounds.c.run == bindparam("of_run"), schema.rounds.c.kind == RoundKind.TRAIN, schema.rounds.c.phase == "closed")
    .order_by(schema.rounds.c.number.desc())
    .limit(1)
)
NEWEST_CHECKPOINT: Final = Statement(
    CHECKPOINTS.where(schema.checkpoints.c.run == bindparam("of_run")).order_by(schema.checkpoints.c.round.desc()).limit(1)
)
CHECKPOINT_OF: Final = Statement(
    CHECKPOINTS.where(
        (schema.checkpoints.c.weights == bindparam("of_digest"))
        | (schema.checkpoints.c.ema == bindparam("of_digest"))
        | (schema.checkpoints.c.optimiser == bindparam("of_digest"))
        | (schema.steps.c.digest == bindparam("of_digest"))
    )
)
