"""Waiting for jobs: the bar, and how a wait ends."""

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockvirt.cli.job_progress import bar
from blockvirt.cli.output import duration
from tests.cli.conftest import ROOT, run
from tests.cli.scripted import Script
from tests.cli.terminal import run_on_terminal

JOB = {"id": "j1", "kind": "flatten", "subject": "v", "created_at": "2026-11-22T02:00:00Z", "done_units": 0}
RUNNING = JOB | {"state": "running", "percent": 42.4, "rate_per_s": 12.34, "eta_s": 80.0}
DONE = JOB | {"state": "done", "percent": 100.0}


def test_a_bar_says_what_is_known() -> None:
    assert bar(RUNNING, 200) == "flatten of v  [##########..............]  42.4%  12.3/s  1m20s left"
    assert bar(JOB | {"state": "queued"}, 200) == "flatten of v  queued"
    assert bar(JOB | {"state": "running", "percent": 100.0}, 200).endswith("[########################] 100.0%")
    assert bar(RUNNING | {"detail": "24KiB to go"}, 200).endswith("1m20s left  24KiB to go")
    assert bar(RUNNING, 20) == "flatten of v  [#####"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.6, "1m"),
        (80, "1m20s"),
        (3600, "1h"),
        (3660, "1h1m"),
        (3601, "1h"),
        (90_000, "1d1h"),
        (-5, "0s"),
    ],
)
def test_time_spans_for_people(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


async def test_a_wait_ends_with_the_job(script: Script, tmp_path: Path) -> None:
    script.on("GET", "/v1/jobs/j1?wait_s=60", RUNNING, JOB | {"state": "paused"}, DONE)
    waited = await run("-s", str(tmp_path), "job", "wait", "j1", "-o", "json")
    assert (waited.code, waited.err) == (0, ""), "no bar where there is no terminal"
    assert waited.json == [DONE]
    assert len(script.asked) == 3


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ({"state": "failed", "error": "a disk is gone"}, ("failed", "a disk is gone", "blockvirt job resume j1")),
        ({"state": "cancelled"}, ("was cancelled",)),
    ],
)
async def test_a_job_that_is_not_done_is_a_failure(
    script: Script, tmp_path: Path, ended: dict[str, Any], said: tuple[str, ...]
) -> None:
    script.on("GET", "/v1/jobs/j1?wait_s=60", JOB | ended)
    script.on("GET", "/v1/jobs/j0?wait_s=60", DONE | {"id": "j0"})
    waited = await run("-s", str(tmp_path), "job", "wait", "j0", "j1")
    assert (waited.code, waited.out) == (1, "")
    for words in ("job j1 (flatten of v)", *said):
        assert words in waited.err


async def test_a_terminal_gets_a_bar_that_goes_away(script: Script, tmp_path: Path) -> None:
    script.on("GET", "/v1/jobs/j1?wait_s=1", RUNNING, RUNNING | {"percent": 99.0}, DONE)
    command = (sys.executable, "-m", "blockvirt", "-s", str(tmp_path), "job", "wait", "j1", "-o", "csv")
    code, seen, out = await run_on_terminal(*command, stream="stderr", width=60)
    assert code == 0
    assert out.splitlines()[1].startswith("j1,flatten,v,done,100.0")
    pictures = [picture for picture in re.split(r"\r|\x1b\[K", seen) if picture]
    assert [picture[:59] for picture in pictures] == pictures, "a line each, or it would scroll"
    assert "42.4%" in pictures[0]
    assert "99.0%" in pictures[1]
    assert seen.endswith("\r\x1b[K")


async def test_an_interrupted_wait_says_that_the_job_goes_on(script: Script, tmp_path: Path) -> None:
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    script.on("GET", "/v1/jobs/j1?wait_s=60", RUNNING)
    answer = script.answer

    def noted(method: str, path: str, body: Any) -> tuple[int, Any]:
        loop.call_soon_threadsafe(arrived.set)
        return answer(method, path, body)

    script.answer = noted  # type: ignore[method-assign]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "blockvirt", "-s", str(tmp_path), "job", "wait", "j1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    await arrived.wait()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130
    assert b"blockvirt job wait j1" in err
