"""The command line as users run it: a process of its own, against a served API."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Api, serve_api
from tests.cli.scripted import Script, scripted

ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output as JSON."""
        return json.loads(self.out)


Command = Callable[..., Awaitable[Run]]


async def run(*words: str, environment: dict[str, str] | None = None) -> Run:
    """Run ``python -m blockvirt`` with ``words``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BLOCKVIRT_")}
    clean["PYTHONPATH"] = str(ROOT)  # a test may run it from elsewhere
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "blockvirt",
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean | (environment or {}),
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Run(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    """An API over an empty pool of 100 GiB, its socket where the command line looks for it."""
    async with serve_api(tmp_path) as api:
        yield api


@pytest.fixture
def blockvirt(served: Api, tmp_path: Path) -> Command:
    """Run a command against the served API."""

    async def command(*words: str) -> Run:
        return await run("-s", str(tmp_path), *words)

    return command


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """A daemon with a script."""
    with scripted(tmp_path) as served:
        yield served


@pytest.fixture
def command(script: Script, tmp_path: Path) -> Command:
    """Run a command against it."""
    return lambda *words: run("-s", str(tmp_path), *words)
