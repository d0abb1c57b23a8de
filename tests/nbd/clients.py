"""Running other people's clients beside the loop that serves them."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.conftest import Bench

TOOL_S = 90.0
both_transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


def uri(bench: Bench, transport: str, export: str = "v") -> str:
    return bench.uri(export) if transport == "unix" else f"nbd://127.0.0.1:{bench.address[1]}/{export}"


async def run(*command: str | Path) -> str:
    """Run a tool to its end while the server serves it; its output. It must succeed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(TOOL_S):
            output, _none = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, f"{command}: {output.decode(errors='replace')}"
    return output.decode()


def in_thread(work: Callable[[], Any]) -> "asyncio.Future[Any]":
    """Run a blocking client beside the loop that serves it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def target() -> None:
        try:
            loop.call_soon_threadsafe(future.set_result, work())
        except BaseException as error:
            loop.call_soon_threadsafe(future.set_exception, error)

    threading.Thread(target=target, daemon=True).start()
    return future
