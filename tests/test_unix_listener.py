"""Unix sockets to listen on: who may connect, what in the way is replaced, whose file goes at the end."""

import os
import socket
import stat
from pathlib import Path

import pytest

from blockvirt.errors import InUse, InvalidRequest
from blockvirt.limits import UNIX_PATH_MAX_BYTES
from blockvirt.unix_listener import UnixListener, listen_on_unix


@pytest.fixture
def path(short_tmp_path: Path) -> str:
    """A path for a socket, short enough."""
    return str(short_tmp_path / "s")


def end(listener: UnixListener) -> None:
    """As a server does at its end."""
    listener.remove_file()
    listener.sock.close()


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_socket_is_for_whom_its_mode_says_and_its_file_goes_with_it(path: str, mode: int) -> None:
    listener = listen_on_unix(path, mode)
    status = os.lstat(path)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == mode
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    end(listener)
    assert not os.path.exists(path)
    listener.remove_file()  # gone already: nothing to do


def test_a_dead_socket_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(path)
    listener = listen_on_unix(path, 0o600)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    end(listener)


@pytest.mark.parametrize("queue", [8, 0])
def test_a_living_one_is_not_even_with_its_queue_full(path: str, queue: int) -> None:
    with socket.socket(socket.AF_UNIX) as living, socket.socket(socket.AF_UNIX) as waiting:
        living.bind(path)
        living.listen(queue)
        waiting.connect(path)  # listen(0) takes one, and the next would block
        with pytest.raises(InUse, match="another process listens"):
            listen_on_unix(path, 0o600)
    assert os.path.exists(path)


def test_what_is_no_socket_stays(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(InUse, match="not a socket"):
        listen_on_unix(path, 0o600)
    assert Path(path).read_text() == "precious"
    os.unlink(path)
    os.symlink("/nowhere", path)
    with pytest.raises(InUse, match="not a socket"):
        listen_on_unix(path, 0o600)


def test_a_file_that_somebody_else_put_there_stays(path: str) -> None:
    first = listen_on_unix(path, 0o600)
    os.unlink(path)
    second = listen_on_unix(path, 0o600)
    end(first)
    assert os.path.exists(path)
    end(second)
    assert not os.path.exists(path)


def test_a_long_path_is_explained() -> None:
    with pytest.raises(InvalidRequest, match=f"{UNIX_PATH_MAX_BYTES} is the most") as refused:
        listen_on_unix("/tmp/" + "x" * UNIX_PATH_MAX_BYTES, 0o600)
    assert "shorter" in refused.value.correction
