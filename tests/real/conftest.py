"""One server per test, stopped and proven sound afterwards."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.real.daemon import Daemon
from tests.real.peers import ForgetfulQemuNbd, LyingQemuNbd, QemuNbd
from tests.real.process import ServerProcess

KINDS: dict[str, Callable[[], ServerProcess]] = {
    "blockvirt": Daemon,
    "raw": QemuNbd,
    "qcow2": ForgetfulQemuNbd,
    "lying": LyingQemuNbd,
}
GIB = 1 << 30


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    """A running server with a fresh 1 GiB volume; afterwards its files must be sound.

    BLOCKVIRT_TEST_SERVER=raw|qcow2|lying puts a peer in the daemon's place, to try the tests themselves.
    """
    with KINDS[os.environ.get("BLOCKVIRT_TEST_SERVER", "blockvirt")]() as started:
        started.create(GIB)
        yield started
        started.stop()
        started.check()


@pytest.fixture
def control() -> Iterator[Callable[[Callable[[], ServerProcess]], ServerProcess]]:
    """Start a peer with a fresh 1 GiB volume, for a control that a test must catch."""
    with ExitStack() as stack:

        def start(kind: Callable[[], ServerProcess]) -> ServerProcess:
            peer = stack.enter_context(kind())
            peer.create(GIB)
            return peer

        yield start
