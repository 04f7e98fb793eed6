"""What a daemon tells the service manager that started it: ready, alive, stopping, and one line on how it stands.

Owns systemd's notification protocol, the few lines of it that are needed (sd_notify(3): datagrams of NAME=VALUE lines to the socket
that $NOTIFY_SOCKET names; sd_watchdog_enabled(3)). The libraries that speak it are no lighter: `sdnotify` had its last release in
2017, and `systemd-python` wants a compiler and libsystemd's headers on every site. Must not know what being healthy is: it is asked.
Without a service manager every call does nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, MutableMapping
from typing import Final, Self

from cosilo_common.telemetry import State, get_logger

STATUS_S: Final = 5.0  # how old the line that `systemctl status` shows may be
FEEDS_PER_TIMEOUT: Final = 3  # one late or lost datagram must not kill a healthy daemon
STATUS_CHARS_MAX: Final = 200  # a line on a terminal

log = get_logger("cosilo.supervision")


class Supervisor:
    """The service manager, or nobody. address: of its socket; watchdog_s: after how long a silence it kills, 0 for never."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s
        self._status = ""

    @classmethod
    def of_this_process(cls, environment: MutableMapping[str, str] | None = None) -> Self:
        """Takes the manager's variables out of the environment, so that no child speaks in this process's name."""
        given = os.environ if environment is None else environment
        address, period_us, pid = (given.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        watched = period_us.isdecimal() and pid in ("", str(os.getpid()))
        return cls(address, int(period_us) / 1e6 if watched else 0.0)

    def ready(self) -> None:
        """The daemon serves: whatever waits for the unit may start."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """The daemon ends by its own will, in order."""
        self._tell("STOPPING=1", self._line("stopping"))

    async def feed_for_ever(self, healthy: Callable[[], State], standing: Callable[[], State]) -> None:
        """Feeds the watchdog from within the event loop while `healthy` says so, and shows `standing`'s words.

        A loop that hangs feeds nothing, and so does a daemon that finds itself unhealthy: then the manager kills and restarts it.
        """
        while True:
            well, reason = healthy()
            if well:
                reason = standing()[1]
                self._tell("WATCHDOG=1")
            else:
                log.error("unhealthy: the watchdog goes unfed", reason=reason)
            if reason != self._status:
                self._status = reason
                self._tell(self._line(reason))
            await asyncio.sleep(min(STATUS_S, self._watchdog_s / FEEDS_PER_TIMEOUT) if self._watchdog_s else STATUS_S)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.setblocking(False)
                channel.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:  # the next beat tries again; a manager that is gone needs no news
            log.warning("the service manager did not hear", said=lines[0], problem=error.strerror or str(error))

    @staticmethod
    def _line(status: str) -> str:
        return "STATUS=" + " ".join(status.split())[:STATUS_CHARS_MAX]
