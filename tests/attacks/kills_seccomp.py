"""Stopping a process at each syscall that changes files or answers somebody, through seccomp's user notification.

The process puts a filter before itself (``install``) and hands out its listener. Whoever holds that is asked about each
such call before it is carried out, of whichever thread, in one order: it lets the call go on, or kills the process.
(strace counts for each thread by itself, and the threads that sync and write change from run to run.)
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import signal
import stat
import struct
import threading
from pathlib import Path

CALLS = {
    "x86_64": {
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "sendto": 44,
        "sendmsg": 46,
        "fsync": 74,
        "fdatasync": 75,
        "ftruncate": 77,
        "rename": 82,
        "mkdir": 83,
        "unlink": 87,
        "openat": 257,
        "mkdirat": 258,
        "unlinkat": 263,
        "renameat": 264,
        "fallocate": 285,
        "pwritev": 296,
        "renameat2": 316,
        "pwritev2": 328,
    },
    "aarch64": {
        "mkdirat": 34,
        "unlinkat": 35,
        "renameat": 38,
        "ftruncate": 46,
        "fallocate": 47,
        "openat": 56,
        "write": 64,
        "writev": 66,
        "pwrite64": 68,
        "pwritev": 70,
        "fsync": 82,
        "fdatasync": 83,
        "sendto": 206,
        "sendmsg": 211,
        "renameat2": 276,
        "pwritev2": 287,
    },
}
"""The numbers of the calls that are stopped at, by machine."""
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_OF_DESCRIPTORS = ("write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate", "fsync", "fdatasync")
_OF_ANY_FILE = ("write", "writev")
"""They also wake event loops and write logs: only files of the pool and sockets count."""

_SET_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3
_PR_SET_NO_NEW_PRIVS = 38
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_RECEIVE, _ANSWER, _CONTINUE = 0xC0502100, 0xC0182101, 1
_ASKED = struct.Struct("<QIIiIQ6Q")
_LOAD, _EQUAL, _HAS_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _filter(machine: str) -> bytes:
    """Return the program: ask at the calls, of ``openat`` where it may create a file, and allow everything else."""
    calls = CALLS[machine]
    others = [number for name, number in calls.items() if name != "openat"]

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    size = len(others)
    program = [step(_LOAD, 4), step(_EQUAL, _AUDIT_ARCHITECTURE[machine], 0, size + 4), step(_LOAD, 0)]
    program += [step(_EQUAL, number, size - place + 3) for place, number in enumerate(others)]
    program += [step(_EQUAL, calls["openat"], 0, 2), step(_LOAD, 32), step(_HAS_BITS, os.O_CREAT, 1, 0)]
    return b"".join([*program, step(_RETURN, _ALLOW), step(_RETURN, _ASK)])


def install() -> int:
    """Put the filter before the calling thread and all that it will start; returns the listener. Raises OSError."""
    machine = platform.machine()
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(machine)
    kept = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(kept, ctypes.c_void_p))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    listener: int = libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp gives no listener: this kernel or sandbox does not have it")
    return listener


class CallWatch(threading.Thread):
    """Answers a listener: counts the calls from ``arm`` on, and kills the process before the one that is wanted."""

    def __init__(self, listener: int, pid: int, root: Path, target: int) -> None:
        """``root`` is the folder of the pool; ``target`` counts from 1, and 0 kills at none."""
        super().__init__(name="calls", daemon=True)
        self.seen = 0
        self.killed_at = ""
        """What the process was about to do."""
        self.is_armed = False
        self.is_holding = threading.Event()
        """A call is being held."""
        self._hold = ""
        self._held: list[int] = []
        self._lock = threading.Lock()
        self._listener = listener
        self._pid = pid
        self._root = f"{root}/"
        self._target = target
        self._names = {number: name for name, number in CALLS[platform.machine()].items()}

    def hold(self, path: str) -> None:
        """Have calls on a file of the pool wait from now on, until ``release``."""
        with self._lock:
            self._hold = f"{self._root}{path}"

    def release(self) -> None:
        """Let what was held go on."""
        with self._lock:
            self._hold = ""
            self.is_holding.clear()
            while self._held:
                self._go_on(self._held.pop())

    def run(self) -> None:
        """Answer until the process is gone."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while not poll.poll()[0][1] & select.POLLHUP:
                self._answer()
        finally:
            os.close(self._listener)

    def _answer(self) -> None:
        asked = bytearray(_ASKED.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, asked, True)
        except OSError:  # who asked was killed, or a signal came first
            return
        number, thread, _, call, _, _, *arguments = _ASKED.unpack(asked)
        what, path = self._described(thread, self._names[call], arguments)
        if self.is_armed and what:
            self.seen += 1
            if self.seen == self._target:
                self.killed_at = what
                os.kill(self._pid, signal.SIGKILL)
                return
        with self._lock:
            if self._hold and path == self._hold:
                self._held.append(number)
                self.is_holding.set()
            else:
                self._go_on(number)

    def _go_on(self, number: int) -> None:
        try:
            fcntl.ioctl(self._listener, _ANSWER, bytearray(struct.pack("<QqiI", number, 0, 0, _CONTINUE)), True)
        except OSError:  # it was killed meanwhile
            return

    def _described(self, thread: int, name: str, arguments: list[int]) -> tuple[str, str]:
        """Return what a call is about, for people (empty: it does not count), and the path of its descriptor."""
        if name not in _OF_DESCRIPTORS:
            return name, ""
        try:
            path = os.readlink(f"/proc/{thread}/fd/{arguments[0]}")
            mode = os.stat(f"/proc/{thread}/fd/{arguments[0]}").st_mode
        except OSError:
            return "", ""
        if name in _OF_ANY_FILE and not stat.S_ISSOCK(mode) and not path.startswith(self._root):
            return "", path
        where = "a socket" if stat.S_ISSOCK(mode) else path.removeprefix(self._root)
        return f"{name} of {where}", path
