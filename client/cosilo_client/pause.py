"""The site's pause by hand: a small file in the state folder, which a person writes and the daemon looks at.

Owns the file, its words, and when the trainer's idle process gives its GPU back. What a pause means in a round is the
duties' affair; hours of the day are policy's. Must not know gRPC, rounds or the terminal.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

from cosilo_client.durable import unlink_durably, write_durably
from cosilo_common.errors import CosiloError
from cosilo_common.telemetry import get_logger
from cosilo_common.threads import in_thread

PAUSE_FILE: Final = "pause.json"
PAUSE_BYTES_MAX: Final = 4096  # four times what the longest reason makes
REASON_CHARS_MAX: Final = 200  # a line of `cosilo-site status`
PAUSE_MAX: Final = timedelta(days=90)  # a longer one is a mistake in the unit; without an end it lasts until `resume`
LOOK_S: Final = 1.0  # whoever pauses with --now waits for the GPU

_FOR = re.compile(r"(?:(?P<days>[0-9]{1,3})d)?(?:(?P<hours>[0-9]{1,4})h)?(?:(?P<minutes>[0-9]{1,5})m)?")
_UNTIL = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")

log = get_logger("cosilo.pause")


@dataclass(frozen=True)
class Pause:
    """A person's pause. until: RFC 3339, empty for no end; now: training that runs is stopped too."""

    since: str
    until: str = ""
    reason: str = ""
    now: bool = False

    @property
    def words(self) -> str:
        """As people at the site read it."""
        until = f" until {datetime.fromisoformat(self.until).astimezone():%Y-%m-%d %H:%M}" if self.until else " until cosilo-site resume"
        return f"paused{until}" + (f": {self.reason}" if self.reason else "")


class IdleTrainer(Protocol):
    """The trainer's link, as far as a pause knows it."""

    def process_ids(self) -> tuple[int, ...]:
        """Of its processes; none while it does not run."""
        ...

    async def rest(self) -> None:
        """Ends its processes once no job runs."""
        ...


def no_pause() -> Pause | None:
    """Of a site that nobody can pause."""
    return None


def pause_site(state: Path, pause: Pause) -> None:
    """Pauses the site, running or not; a pause that stands is replaced."""
    write_durably(state / PAUSE_FILE, json.dumps(asdict(pause)).encode())


def resume_site(state: Path) -> bool:
    """Ends a pause; False where none stood."""
    stood = read_pause(state, datetime.now(UTC)) is not None
    unlink_durably(state / PAUSE_FILE)
    return stood


def read_pause(state: Path, now: datetime) -> Pause | None:
    """The pause that stands now, if any. What cannot be read counts as one without an end: somebody asked for it."""
    try:
        with (state / PAUSE_FILE).open("rb") as file:
            data = file.read(PAUSE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Pause("", reason=f"{PAUSE_FILE} cannot be read: {error.strerror}")
    try:
        pause = Pause(**json.loads(data))
        if {type(pause.since), type(pause.until), type(pause.reason)} != {str} or type(pause.now) is not bool:
            raise TypeError
        over = bool(pause.until) and datetime.fromisoformat(pause.until) <= now
    except (ValueError, TypeError, RecursionError):
        return Pause("", reason=f"{PAUSE_FILE} is damaged", now=True)
    return None if over else pause


def new_pause(now: datetime, lasting: str | None, until: str | None, reason: str, at_once: bool) -> Pause:
    """What a person typed. now: aware, local; lasting: as 2h or 1d12h; until: HH:MM, its next time. Raises CosiloError."""
    if lasting and until:
        raise _bad("--for and --until were both given", "give one")
    if len(reason) > REASON_CHARS_MAX or not reason.isprintable():
        raise _bad(f"the reason is not one line of at most {REASON_CHARS_MAX} printable characters", "shorten it")
    end = None
    if lasting:
        end = now + _duration(lasting)
    elif until:
        found = _UNTIL.fullmatch(until)
        if found is None:
            raise _bad(f"--until {until!r} is not HH:MM", "write it as 17:30")
        end = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0, fold=0)
        end = end if end > now else end + timedelta(days=1)
    return Pause(now.astimezone(UTC).isoformat(), end.astimezone(UTC).isoformat() if end else "", reason, at_once)


async def give_back_while(holds: Callable[[], bool], trainer: IdleTrainer) -> None:
    """For ever: while the site holds still, ends the trainer's warm process as soon as no job runs, so that the GPU is free."""
    while True:
        warm = len(trainer.process_ids()) > 0
        if warm and await in_thread(holds):
            await trainer.rest()
            log.info("the trainer gave its device back while the site holds still")
        await asyncio.sleep(LOOK_S)


def _duration(text: str) -> timedelta:
    found = _FOR.fullmatch(text)
    parts = {name: int(count) for name, count in found.groupdict().items() if count} if found else {}
    lasting = timedelta(**parts)
    if not timedelta() < lasting <= PAUSE_MAX:
        raise _bad(f"--for {text!r} is not from 1m to {PAUSE_MAX.days}d", "write it as 90m, 2h or 1d12h")
    return lasting


def _bad(subject: str, hint: str) -> CosiloError:
    return CosiloError("pause site", subject, hint)
