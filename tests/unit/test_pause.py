"""A pause by hand: what a person types, what stands in the folder, and what the trainer gives back."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

import cosilo_client.pause
from cosilo_client.pause import PAUSE_FILE, Pause, give_back_while, new_pause, pause_site, read_pause, resume_site
from cosilo_common.errors import CosiloError

NOW = datetime(2026, 3, 2, 17, 0, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("lasting", "until", "end"),
    [
        (None, None, ""),
        ("2h", None, "2026-03-02T18:00:00+00:00"),
        ("1d12h30m", None, "2026-03-04T04:30:00+00:00"),
        (None, "17:30", "2026-03-02T16:30:00+00:00"),
        (None, "17:00", "2026-03-03T16:00:00+00:00"),  # its next time
        (None, "06:15", "2026-03-03T05:15:00+00:00"),
    ],
)
def test_a_pause_ends_when_it_was_said(lasting: str | None, until: str | None, end: str) -> None:
    assert new_pause(NOW, lasting, until, "clinic", True) == Pause("2026-03-02T16:00:00+00:00", end, "clinic", True)


@pytest.mark.parametrize(
    ("lasting", "until", "reason"),
    [
        ("", "25:00", ""),
        ("2", None, ""),
        ("0m", None, ""),
        ("91d", None, ""),
        ("2h", "17:30", ""),
        (None, None, "a\nb"),
        (None, None, "x" * 201),
    ],
)
def test_what_cannot_be_meant_is_refused(lasting: str | None, until: str | None, reason: str) -> None:
    with pytest.raises(CosiloError, match="pause site"):
        new_pause(NOW, lasting, until, reason, False)


def test_it_stands_in_the_folder_until_its_end_or_a_resume(tmp_path: Path) -> None:
    assert read_pause(tmp_path, NOW) is None
    pause = new_pause(NOW, "2h", None, "clinic", False)
    pause_site(tmp_path, pause)
    assert (tmp_path / PAUSE_FILE).stat().st_mode & 0o777 == 0o600
    assert read_pause(tmp_path, NOW + timedelta(minutes=119)) == pause
    assert read_pause(tmp_path, NOW + timedelta(minutes=120)) is None
    pause_site(tmp_path, Pause(NOW.isoformat()))
    assert read_pause(tmp_path, NOW + timedelta(days=400)) == Pause(NOW.isoformat())
    assert resume_site(tmp_path)
    assert read_pause(tmp_path, NOW) is None
    assert not resume_site(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"since": 1}', b'{"since": "", "until": "soon"}', b'{"since": "", "until": "2026-01-01"}', b"[" * 4000]
)
def test_a_damaged_file_is_a_pause_that_says_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / PAUSE_FILE).write_bytes(data)
    pause = read_pause(tmp_path, datetime.now(UTC))
    assert pause is not None
    assert pause.words == "paused until cosilo-site resume: pause.json is damaged"


class WarmTrainer:
    def __init__(self) -> None:
        self.ids: tuple[int, ...] = (7,)
        self.rested = asyncio.Event()

    def process_ids(self) -> tuple[int, ...]:
        return self.ids

    async def rest(self) -> None:
        self.ids = ()
        self.rested.set()


async def test_a_warm_trainer_gives_its_gpu_back_while_the_site_holds_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosilo_client.pause, "LOOK_S", 0.001)
    trainer, asked, holds = WarmTrainer(), 0, False

    def look() -> bool:
        nonlocal asked
        asked += 1
        return holds

    giving = asyncio.create_task(give_back_while(look, trainer))
    async with asyncio.timeout(10):
        while asked < 3:
            await asyncio.sleep(0)
        assert trainer.ids == (7,)
        holds = True
        await trainer.rested.wait()
    giving.cancel()
