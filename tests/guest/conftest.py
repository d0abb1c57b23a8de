"""The kernel and the initramfs are made once for all guest tests; servers come from the real-world tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest import initramfs
from tests.guest.kernel import Kernel, debian_kernel
from tests.guest.machine import Guest
from tests.real.conftest import control, server

__all__ = ["boot", "control", "guest_software", "server"]

Boot = Callable[..., Guest]


@pytest.fixture(scope="session")
def guest_software(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernel, Path]:
    """The kernel and the initramfs to boot."""
    kernel = debian_kernel()
    return kernel, initramfs.build(kernel, tmp_path_factory.mktemp("guest"))


@pytest.fixture
def boot(guest_software: tuple[Kernel, Path], tmp_path: Path) -> Iterator[Boot]:
    """Boot a guest with these further QEMU arguments; it is powered off when the test is over."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Guest:
            return stack.enter_context(Guest(tmp_path, *guest_software, arguments))

        yield start
