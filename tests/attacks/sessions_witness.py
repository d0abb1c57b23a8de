"""`python -m tests.attacks.sessions_witness SOCKET BUG ARGUMENTS...`: blockvirt that can be asked what it holds.

BUG is "-" for none. A thread answers every connection to SOCKET with the number of tasks, of the objects of
``blockvirt.nbd`` that are alive, by type, and of all blocks of memory.
"""

import asyncio
import gc
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from blockvirt import daemon
from blockvirt.cli.main import main as blockvirt
from tests.attacks.planted.bugs import bug_named

_run = daemon.run


def main() -> None:
    """Plant the bug, and be blockvirt with a witness beside it."""
    path, bug = sys.argv.pop(1), sys.argv.pop(1)
    if bug != "-":
        bug_named(bug).plant(pytest.MonkeyPatch())

    async def watched(settings: Any, announce: Callable[[Any], None]) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            loop = asyncio.get_running_loop()
            threading.Thread(target=_answer, args=(listener, loop), name="witness", daemon=True).start()
            await _run(settings, announce)

    daemon.run = watched
    sys.argv[0] = "blockvirt"
    blockvirt()


def _answer(listener: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the daemon has ended
            return
        with connection:
            gc.collect()
            alive = Counter(type(each).__qualname__ for each in gc.get_objects() if _is_of_nbd(each))
            seen = {"tasks": len(asyncio.all_tasks(loop)), "alive": alive, "blocks": sys.getallocatedblocks()}
            connection.sendall(json.dumps(seen).encode())


def _is_of_nbd(thing: object) -> bool:
    return str(getattr(type(thing), "__module__", "")).startswith("blockvirt.nbd.")


if __name__ == "__main__":
    main()
