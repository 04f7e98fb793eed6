"""The trainer process: connects to the daemon's socket, does one job after another, ends when the socket closes.

Owns the process. Must not know what a round is, or anything of the network. Under torchrun every rank runs this and
hears every job; all ranks train, rank 0 reports. The connection is made, and watched by a thread, before torch is
imported: a daemon that dies leaves no orphan.
"""

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from pydantic import ValidationError

from cosilo_client.trainer.channel import connect, lines
from cosilo_client.trainer.jobs import (
    Failure,
    FailureCode,
    Hello,
    Notice,
    Progress,
    Report,
    TrainerFailed,
    job_from_line,
    to_line,
)
from cosilo_common.errors import CosiloError

JOBS_WAITING_MAX = 2  # the daemon sends one at a time


def main() -> None:
    """Run until the daemon closes the socket."""
    parser = argparse.ArgumentParser(prog="python -m cosilo_client.trainer.worker", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="the daemon's unix socket")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the daemon's to handle
    rank = int(os.environ.get("RANK", "0"))
    connection = connect(arguments.socket)
    inbox: queue.Queue[bytes] = queue.Queue(JOBS_WAITING_MAX)
    threading.Thread(target=_watch, args=(connection, inbox), name="watch", daemon=True).start()
    if rank == 0:
        logging.getLogger("cosilo").addHandler(_ToDaemon(connection))
    try:
        _work(connection, inbox, rank)
    except BrokenPipeError:
        sys.exit(0)  # the daemon is gone, and so is the reason to be


def _work(connection: socket.socket, inbox: "queue.Queue[bytes]", rank: int) -> None:
    # torch comes in here, after the watch has begun.
    from cosilo_client.trainer.device import is_out_of_memory, take_place
    from cosilo_client.trainer.workshop import Workshop

    workshop = Workshop(take_place())
    _send(connection, Hello(rank=rank))

    def report(progress: Progress) -> None:
        if rank == 0:
            _send(connection, progress)

    while True:
        line = inbox.get()
        try:
            _send(connection, workshop.perform(job_from_line(line), report))
        except TrainerFailed as error:
            _send(connection, Failure(code=error.code, subject=error.subject, hint=error.hint))
        except CosiloError as error:
            _send(
                connection,
                Failure(code=FailureCode.DATA, subject=f"{error.operation}: {error.subject}", hint=error.hint),
            )
        except ValidationError as error:
            _send(connection, Failure(code=FailureCode.DATA, subject=f"job: {error.errors()[0]['msg']}"))
        except BrokenPipeError:
            raise
        except Exception as error:
            traceback.print_exc()
            code = FailureCode.OUT_OF_MEMORY if is_out_of_memory(error) else FailureCode.CRASHED
            _send(connection, Failure(code=code, subject=f"{type(error).__name__}: {str(error)[:300]}"))
            sys.exit(1)  # what is left in this process is not known; the daemon starts another


def _watch(connection: socket.socket, inbox: "queue.Queue[bytes]") -> None:
    try:
        for line in lines(connection):
            inbox.put(line)
    except (OSError, ValueError):
        os._exit(1)
    os._exit(0)


def _send(connection: socket.socket, report: Report) -> None:
    connection.sendall(to_line(report))


class _ToDaemon(logging.Handler):
    """Sends warnings of the data room (skipped images) to the daemon's log."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._connection, Notice(text=record.getMessage()[:1000]))


if __name__ == "__main__":
    main()
