"""A disk that fails on request, in this process: what the engine calls on a pool's files goes through here.

It also remembers what no sync has made durable. A failed sync loses that, as the kernel may: a second try would succeed
and save nothing. So does a power cut.
"""

import ctypes
import errno
import io
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockvirt import syscalls
from blockvirt.meta.store import Store
from blockvirt.pool.devices import COPIES
from blockvirt.pool.labels import LABEL_FILE
from tests.attacks.faults_sites import CHANGES, DISK_CHANGE, SHORT, Cell, Site

_FALLOCATE = {0: "allocate", 1: "allocate", 3: "punch", 0x11: "zero"}
_REAL = {
    name: getattr(os, name)
    for name in (
        *("open", "close", "pwrite", "write", "pread", "preadv", "read", "fdatasync", "fsync", "ftruncate", "fstat"),
        *("posix_fadvise", "unlink", "rename", "statvfs", "listdir"),
    )
}
_REAL_OPEN = io.open


class FaultyDisk:
    """The calls on the files below one directory: counted by site, and some of them failing."""

    def __init__(self, root: Path, *cells: Cell) -> None:
        self.root = str(root)
        self.cells = cells
        self.counts: Counter[Site] = Counter()
        self.hit: set[Cell] = set()
        """Those that some call met."""
        self.lost_writes = 0
        """That failed syncs and power cuts took."""
        self.tried_again: list[str] = []
        """Files that were synced again after a failed sync."""
        self.failed_syncs: set[str] = set()
        """Files of which a sync failed, until their volume is recovered."""
        self.open_files: dict[int, str] = {}
        self._armed = False
        self._recovering = False
        self._unsynced: dict[str, list[tuple[int, bytes]]] = {}
        self._new_entries: set[str] = set()
        self._unsynced_copies: set[str] = set()
        """Of the metadata: LMDB writes them past this stand-in, so they are lost as a whole."""
        self._lock = threading.RLock()

    # --- what the harness does -----------------------------------------------------------------------------------

    def arm(self) -> None:
        """Count from here on, and fail."""
        self._armed = True

    def disarm(self) -> None:
        """All is well from here on."""
        self._armed = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """All is well meanwhile: what is done then is no part of the product."""
        armed, self._armed = self._armed, False
        try:
            yield
        finally:
            self._armed = armed

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """The volume is not served meanwhile: recovery may sync what failed before, since it trusts marks only."""
        self._recovering = True
        self.failed_syncs.clear()
        try:
            yield
        finally:
            self._recovering = False
            self.failed_syncs.clear()

    def cut_power(self) -> None:
        """Lose everything that was not synced: writes, and files that are not durably in their directory."""
        for path in list(self._unsynced):
            self._lose(path)
        for path in list(self._unsynced_copies):
            self._lose(path)
        for path in list(self._new_entries):
            Path(path).unlink(missing_ok=True)
        self._new_entries.clear()

    def _lose(self, path: str) -> None:
        with self._lock:
            if path in self._unsynced_copies and os.path.exists(path):
                self.lost_writes += 1
                os.truncate(path, 0)
            writes = self._unsynced.pop(path, [])
            self.lost_writes += len(writes)
            if not writes or not os.path.exists(path):
                return
            fd = _REAL["open"](path, os.O_WRONLY)
            for position, old in reversed(writes):
                if old:
                    os.pwritev(fd, [old], position)
            _REAL["close"](fd)

    # --- the interposition ---------------------------------------------------------------------------------------

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        """Stand in for the system's calls until ``patch`` is undone."""
        for name in _REAL:
            patch.setattr(os, name, getattr(self, f"_{name}"))
        patch.setattr(io, "open", self._io_open)
        self._real_fallocate = syscalls._fallocate
        patch.setattr(syscalls, "_fallocate", self._fallocate)
        real_copy = Store.copy_compacted

        def copy_compacted(store: Store, fd: int) -> None:
            self._fail(self.open_files.get(fd, ""), "fill")  # LMDB does the writing: this is what it says
            real_copy(store, fd)

        patch.setattr(Store, "copy_compacted", copy_compacted)

    def _kind(self, path: str) -> str:
        """Return which of the sites' kinds of files ``path`` is; empty: none."""
        if not path.startswith(self.root):
            return ""
        parts = path[len(self.root) :].strip("/").split("/")
        if parts[0] == "state":
            names = {"data.mdb": "metadata", "metadata": "state", "state": "state", "lock": "lock"}
            return names.get(parts[-1], "")
        if len(parts) == 1:
            return "device"
        if parts[1].startswith(LABEL_FILE):
            return "label"
        if len(parts) == 2:
            return "copies" if parts[1] == COPIES else "folder"
        return {"files": "data", "journal": "journal", COPIES: "copy"}.get(parts[1], "")

    def _fault(self, path: str, call: str) -> Cell | None:
        kind = self._kind(path)
        if not kind or not self._armed:
            return None
        with self._lock:
            site = Site(kind, call)
            self.counts[site] += 1
            is_change = call in CHANGES and kind in ("data", "journal", "folder", "device", "label", "copy", "copies")
            if is_change and kind not in ("copy", "copies"):  # a dead disk takes no copies; it does not die of them
                self.counts[DISK_CHANGE] += 1
            for cell in self.cells:
                concerned = cell.site == site or (cell.site == DISK_CHANGE and is_change)
                if concerned and cell.fails(self.counts[cell.site]):
                    self.hit.add(cell)
                    return cell
            return None

    def _fail(self, path: str, call: str) -> Cell | None:
        """Raise what the call gets; return a fault that is none of an error."""
        cell = self._fault(path, call)
        if cell is not None and cell.fault != SHORT:
            raise OSError(cell.number, os.strerror(cell.number))
        return cell

    # --- calls by path -------------------------------------------------------------------------------------------

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = os.fspath(path)
        if isinstance(name, bytes) or not self._kind(name):
            return int(_REAL["open"](path, flags, mode, dir_fd=dir_fd))
        is_probe = flags & os.O_TMPFILE == os.O_TMPFILE
        self._fail(name, "probe" if is_probe else "create" if flags & os.O_CREAT else "open")
        is_new = bool(flags & os.O_CREAT) and not os.path.exists(name)
        fd = int(_REAL["open"](path, flags, mode, dir_fd=dir_fd))
        with self._lock:
            self.open_files[fd] = name
            if is_new and not is_probe:
                self._new_entries.add(name)
            if flags & os.O_TRUNC:
                self._forget(name)
            if flags & os.O_CREAT and self._kind(name) == "copy":
                self._unsynced_copies.add(name)
        return fd

    def _io_open(self, file: Any, *arguments: Any, **more: Any) -> Any:
        name = file if isinstance(file, str) else os.fspath(file) if isinstance(file, Path) else ""
        if name:
            self._fail(name, "load")
        return _REAL_OPEN(file, *arguments, **more)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        name = str(os.fspath(path))
        self._fail(name, "unlink")
        _REAL["unlink"](path, dir_fd=dir_fd)
        with self._lock:
            self._forget(name)
            self._new_entries.discard(name)

    def _forget(self, path: str) -> None:
        """A file begins anew: what was to be said of it is over."""
        self._unsynced.pop(path, None)
        self._unsynced_copies.discard(path)
        self.failed_syncs.discard(path)

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        name, to = str(os.fspath(source)), str(os.fspath(target))
        self._fail(name, "rename")
        _REAL["rename"](source, target, **more)
        with self._lock:
            for those in (self._new_entries, self._unsynced_copies):
                if name in those:
                    those.discard(name)
                    those.add(to)

    def _listdir(self, path: Any = ".") -> list[Any]:
        if isinstance(path, str | Path):
            self._fail(os.fspath(path), "list")
        names: list[Any] = _REAL["listdir"](path)
        return names

    def _statvfs(self, path: Any) -> os.statvfs_result:
        if isinstance(path, str | Path):
            self._fail(os.fspath(path), "space")
        facts: os.statvfs_result = _REAL["statvfs"](path)
        return facts

    # --- calls by descriptor -------------------------------------------------------------------------------------

    def _close(self, fd: int) -> None:
        path = self.open_files.pop(fd, "")
        _REAL["close"](fd)
        if path:
            self._fail(path, "close")

    def _pwrite(self, fd: int, data: Any, position: int) -> int:
        return self._written(fd, memoryview(data).cast("B"), position)

    def _write(self, fd: int, data: Any) -> int:
        path = self.open_files.get(fd)
        if path and self._fail(path, "write") is not None:
            data = bytes(data)[: len(data) // 2]
        return int(_REAL["write"](fd, data))

    def _written(self, fd: int, data: memoryview, position: int) -> int:
        path = self.open_files.get(fd)
        if not path:
            return int(_REAL["pwrite"](fd, data, position))
        if self._fail(path, "write") is not None:
            # Whole sectors, as a disk does it, where there are several.
            half = len(data) // 2
            data = data[: half // 512 * 512 or half]
        with self._lock:
            self._note_old(fd, path, position, len(data))
            return int(_REAL["pwrite"](fd, data, position))

    def _note_old(self, fd: int, path: str, position: int, length: int) -> None:
        # Through the directory: the descriptor may be for writing only.
        old = bytearray(length)
        reading = _REAL["open"](path, os.O_RDONLY)
        try:
            got = _REAL["preadv"](reading, [old], position)
        finally:
            _REAL["close"](reading)
        self._unsynced.setdefault(path, []).append((position, bytes(old[:got])))

    def _preadv(self, fd: int, buffers: Sequence[Any], position: int, flags: int = 0) -> int:
        path = self.open_files.get(fd)
        if path and self._fail(path, "look" if flags else "read") is not None:
            buffers = [buffers[0][: max(1, len(buffers[0]) // 2)]]
        return int(_REAL["preadv"](fd, buffers, position, flags))

    def _pread(self, fd: int, length: int, position: int) -> bytes:
        path = self.open_files.get(fd)
        if path and self._fail(path, "read") is not None:
            length = max(1, length // 2)
        found: bytes = _REAL["pread"](fd, length, position)
        return found

    def _read(self, fd: int, length: int) -> bytes:
        path = self.open_files.get(fd)
        if path:
            self._fail(path, "read")
        found: bytes = _REAL["read"](fd, length)
        return found

    def _fdatasync(self, fd: int) -> None:
        path = self.open_files.get(fd)
        if not path:
            _REAL["fdatasync"](fd)
            return
        with self._lock:
            if path in self.failed_syncs and not self._recovering:
                self.tried_again.append(path)
            covered = len(self._unsynced.get(path, ()))
        try:
            self._fail(path, "sync")
        except OSError:
            if self._kind(path) in ("data", "journal", "copy"):
                self.failed_syncs.add(path)
                self._lose(path)
            raise
        with self._lock:
            del self._unsynced.get(path, [])[:covered]
            self._unsynced_copies.discard(path)

    def _fsync(self, fd: int) -> None:
        path = self.open_files.get(fd)
        if not path:
            _REAL["fsync"](fd)
            return
        self._fdatasync(fd)
        with self._lock:
            self._new_entries = {each for each in self._new_entries if os.path.dirname(each) != path}

    def _ftruncate(self, fd: int, length: int) -> None:
        path = self.open_files.get(fd)
        if path:
            self._fail(path, "truncate")
        _REAL["ftruncate"](fd, length)

    def _fstat(self, fd: int) -> os.stat_result:
        path = self.open_files.get(fd)
        if path:
            self._fail(path, "stat")
        facts: os.stat_result = _REAL["fstat"](fd)
        return facts

    def _posix_fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:
        path = self.open_files.get(fd)
        if path:
            self._fail(path, "advise")
        _REAL["posix_fadvise"](fd, offset, length, advice)

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        path, call = self.open_files.get(fd), _FALLOCATE[mode]
        try:
            if path:
                self._fail(path, call)
                if call == "zero":
                    with self._lock:
                        self._note_old(fd, path, offset, length)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return int(self._real_fallocate(fd, mode, offset, length))
