"""Counting what the product calls: the same number on every machine, however busy, where a time is another each run."""

import gc
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import lmdb

import blockvirt
from blockvirt import syscalls
from blockvirt.volumes import io_threads

PRODUCT = str(Path(blockvirt.__file__).parent) + os.sep
# The loop's verbs that are system calls (what it polls, and waking it), and what a test's own socket stands in for.
VERBS = frozenset(
    {"add_reader", "remove_reader", "add_writer", "remove_writer", "call_soon_threadsafe", "recv_into", "sendmsg"}
)
INLINED = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>"})  # frames of their own before Python 3.12


class CallCounter:
    """Counts the calls that the product makes, or is called by, while ``running``; on threads as on the loop."""

    def __init__(self) -> None:
        self.running = False
        self._owner = threading.get_ident()
        # Appended to: that loses no call of another thread, as += may.
        self._calls: list[str] = []
        self._system: list[str] = []

    @property
    def calls(self) -> int:
        """How many functions were called, Python's own and built-in ones, and coroutines resumed."""
        return len(self._calls)

    @property
    def system(self) -> dict[str, int]:
        """How many of them were system calls, or calls of LMDB: by name."""
        return dict(Counter(self._system))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See this thread and those that are started inside."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        gc.disable()  # what it finalizes is anybody's
        try:
            yield
        finally:
            gc.enable()
            sys.setprofile(None)
            threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, called: Any) -> None:
        if not self.running:
            return
        if event == "call":
            code, caller = frame.f_code, frame.f_back.f_code if frame.f_back is not None else None
            if code.co_name not in INLINED and (_is_ours(code) or _is_ours(caller)):
                is_system = code.co_name in VERBS
                if code.co_filename == syscalls.__file__:  # by ctypes, whose calls are not seen
                    is_system = not code.co_name.startswith("_")
                self._add(code.co_name, caller, is_system)
        elif event == "c_call":
            owner = getattr(called, "__self__", None)
            if called.__module__ == "posix":  # whoever asked for it
                self._add(called.__name__, frame.f_code, True)
            elif _is_ours(frame.f_code):
                is_lmdb = isinstance(owner, lmdb.Environment | lmdb.Transaction)
                name = called.__qualname__ if is_lmdb else called.__name__
                self._add(name, frame.f_code, is_lmdb or isinstance(owner, socket.socket))

    def _add(self, name: str, caller: CodeType | None, is_system: bool) -> None:
        if is_system:
            self._system.append(name)
        elif threading.get_ident() != self._owner and caller and caller.co_filename == io_threads.__file__:
            return  # a thread on its way to its next work: while the loop goes on, or before, who knows
        self._calls.append(name)


def _is_ours(code: CodeType | None) -> bool:
    return code is not None and code.co_filename.startswith(PRODUCT)
