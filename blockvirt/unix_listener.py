"""Listening on a unix socket: its file belongs to whom its mode allows, and goes when the listening ends."""

import os
import socket
import stat
from dataclasses import dataclass

from blockvirt.errors import InUse, InvalidRequest
from blockvirt.limits import UNIX_PATH_MAX_BYTES

_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class UnixListener:
    """A non-blocking socket that listens, and the file that leads to it."""

    sock: socket.socket
    path: str
    inode: tuple[int, int]
    """(st_dev, st_ino) of the file."""

    def remove_file(self) -> None:
        """Take the file away, unless somebody else has put theirs in its place.

        Call it before the socket is closed: until then no other file can have its inode number.
        """
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if (found.st_dev, found.st_ino) == self.inode:
            os.unlink(self.path)


def check_unix_path(path: str) -> None:
    """Return if a unix socket can have this path; raises InvalidRequest."""
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX_BYTES:
        raise InvalidRequest(
            f"the path of the unix socket has {length} bytes, {UNIX_PATH_MAX_BYTES} is the most: {path}",
            cause="the kernel keeps the paths of unix sockets in 108 bytes (sun_path)",
            correction="choose a state directory with a shorter path, or a symbolic link to it",
        )


def listen_on_unix(path: str, mode: int) -> UnixListener:
    """Listen on ``path``; the socket file of a process that is gone is replaced.

    ``mode`` are the permission bits: who may write to the file may connect. Raises InvalidRequest for a path that no
    socket can have, InUse where another process listens or something else lies there, and OSError.
    """
    check_unix_path(path)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(path)
        os.chmod(path, mode)  # before listen(): until then nobody can connect
        status = os.lstat(path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return UnixListener(sock, path, (status.st_dev, status.st_ino))


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise InUse(f"{path} is in the way: it is not a socket", correction="move it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:  # its queue is full, so somebody listens
            pass
    raise InUse(f"another process listens on {path}", correction="stop it, or choose another path")
