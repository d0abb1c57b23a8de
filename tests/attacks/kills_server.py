"""`python -m tests.attacks.kills_server SOCKET [BUG]`: starts daemons by forking, each in milliseconds.

It has everything imported, and the bug planted. Each message on SOCKET (a descriptor) asks for one daemon: a process of
its own that is `blockvirt -s STATE serve` from there on, alone or watched: by seccomp for each call that changes a file
(``calls``), or by a trace function that kills it at the N-th line of the code that writes (``lines``).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

CONTROL = struct.Struct("<QQQ")
"""Of the file that is shared with the trace function: whether it is armed, the line to kill at, the lines seen."""
CONTROL_BYTES = 4096
PACKAGE = Path(__file__).resolve().parents[2] / "blockvirt"
TRACED = tuple(
    str(PACKAGE / name)
    for name in (
        *(f"volumes/{each}.py" for each in ("volume", "journal", "flush", "checkpoint", "commit", "transfer")),
        *(f"volumes/{each}.py" for each in ("tail", "slow_path", "recovery", "reclaim", "handle", "leaf_map")),
        *(f"volumes/{each}.py" for each in ("ranges", "journal_frames", "journal_opening")),
        "nbd/dispatch.py",
        "pool/backing.py",
        "meta/store.py",
        "meta/group_commit.py",
    )
)
_PR_SET_PDEATHSIG = 1
_NEW_MOUNTS, _NEW_USERS = 0x0002_0000, 0x1000_0000


class LineKiller:
    """Kills this process at one of the lines that it runs: the N-th of all, or at a certain one the N-th time."""

    def __init__(self, control: Path, line: str) -> None:
        """``line`` is "FILE:NUMBER", below the package, or empty."""
        with control.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), CONTROL_BYTES)
        self._target = CONTROL.unpack_from(self._shared)[1]
        self._seen = 0
        name, _, number = line.partition(":")
        self._line = (str(PACKAGE / name), int(number)) if line else None
        self._runs = Counter[tuple[str, int]]()

    def install(self) -> None:
        """Trace this thread and those to come."""
        threading.settrace(self.call)
        sys.settrace(self.call)

    def call(self, frame: FrameType, event: str, argument: object) -> Any:
        """See sys.settrace: which calls to look into."""
        return self.line if frame.f_code.co_filename in TRACED else None

    def line(self, frame: FrameType, event: str, argument: object) -> Any:
        """See sys.settrace: count a line, and die at the one that is wanted."""
        if event == "line" and self._shared[0]:
            here = frame.f_code.co_filename, frame.f_lineno
            self._runs[here] += 1
            self._seen += 1
            struct.pack_into("<Q", self._shared, 16, self._seen)
            if self._target == (self._seen if self._line is None else self._runs[here] if here == self._line else 0):
                where = _named(here).encode()
                self._shared[CONTROL.size : CONTROL.size + len(where)] = where
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line

    def list_runs(self, path: str) -> None:
        """Write down how often each line was run: a JSON object."""
        Path(path).write_text(json.dumps({_named(line): runs for line, runs in self._runs.items()}))


def _named(line: tuple[str, int]) -> str:
    return f"{Path(line[0]).relative_to(PACKAGE)}:{line[1]}"


def be_daemon(wanted: dict[str, Any], channel: socket.socket) -> None:
    """Become the daemon that was asked for; never returns."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    code, killer = 1, None
    try:
        os.environ.update(wanted["environment"])
        if wanted["is_apart"]:
            go_apart(libc)
        if wanted["mode"] == "calls":
            be_watched(channel)
        channel.close()
        if wanted["mode"] == "lines":
            killer = LineKiller(Path(wanted["control"]), wanted["line"])
            killer.install()
        from blockvirt.cli.main import main as blockvirt

        sys.argv = ["blockvirt", *wanted["arguments"]]
        blockvirt()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        if killer is not None and wanted["listing"]:
            killer.list_runs(wanted["listing"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def be_watched(channel: socket.socket) -> None:
    """Have every call from here on asked about, and hand out the listener.

    By a thread that is older than the filter: sending it is such a call itself.
    """
    installed = threading.Event()
    listeners: list[int] = []

    def hand_out() -> None:
        installed.wait()
        socket.send_fds(channel, [json.dumps({"watched": bool(listeners)}).encode()], listeners)

    thread = threading.Thread(target=hand_out)
    thread.start()
    try:
        from tests.attacks.kills_seccomp import install

        listeners.append(install())
    finally:
        installed.set()
        thread.join()
    os.close(listeners[0])


def go_apart(libc: ctypes.CDLL) -> None:
    """Go on in a mount namespace of one's own; without root in a user namespace too."""
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_MOUNTS | (_NEW_USERS if user else 0)):
        raise OSError(ctypes.get_errno(), "no mount namespace can be had")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def main() -> None:
    """Fork daemons until the other end is closed."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    if len(sys.argv) > 2:
        import pytest

        from tests.attacks.planted.bugs import bug_named

        bug_named(sys.argv[2]).plant(pytest.MonkeyPatch())
    for name in ("cli.main", "config", "daemon", "cli.greeting"):  # for the children's sake
        importlib.import_module(f"blockvirt.{name}")
    # Nobody asks for the API's description here, and to write it takes longer than all else that a start does.
    vars(sys.modules["blockvirt.api.app"])["document"] = lambda operations, version: {}
    gc.collect()
    gc.freeze()
    channel.send(json.dumps({"started": os.getpid()}).encode())
    while message := channel.recv(65536):
        wanted = json.loads(message)
        if "reap" in wanted:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(wanted["reap"], 0)[1])}
        else:
            pid = os.fork()
            if not pid:
                be_daemon(wanted, channel)
            answer = {"pid": pid}
        channel.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
