"""The process that looks at a rotten pool: `python -m tests.attacks.bit_rot_child ROOT [BUG]`.

Damage may kill who looks at it, so somebody else must: each line of its input is "check", "check-data", "serve" or
"scrub", each line of its output the JSON of what came of it.
"""

import asyncio
import faulthandler
import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockvirt.check import run
from blockvirt.errors import BlockvirtError
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store
from blockvirt.nbd.client import NbdClient, NbdClientError
from tests.attacks.bit_rot_pool import CHUNK_BYTES, RottingPool
from tests.attacks.fsx_lanes import whole
from tests.attacks.planted.bugs import bug_named

_BARE = frozenset(
    {
        Table.VOLUME_BRANCHES,
        Table.BRANCH_FILES,
        Table.BORN,
        Table.POINTS,
        Table.SEALS,
        Table.VOLUME_UNITS,
        Table.TRASH,
    }
)
"""Tables whose values are empty and read by nobody, or may be empty and are compared with their records."""


def check(pool: RottingPool, *, data: bool) -> dict[str, Any]:
    """Check the pool; what was found, or a digest of all rows where nothing was."""
    try:
        report = run(pool.state, repair=False, restore_metadata=False, data=data)
    except BlockvirtError as error:
        return {"found": [type(error).__name__]}
    if report.findings:
        return {"found": sorted({each.code for each in report.findings})}
    return {"found": [], "digest": digest(pool)}


def digest(pool: RottingPool) -> str:
    """A digest of every row of every table, found in order and by its key."""
    store = Store.open(pool.state / "metadata", reserve_bytes=0)
    try:
        sha = hashlib.sha256()
        with store.read() as reader:
            for table in Table:
                for key, value in reader.scan(table):
                    found = reader.get(table, key)
                    told = b"" if table in _BARE else value
                    sha.update(repr((table.value, key, told, found == value)).encode())
        return sha.hexdigest()
    finally:
        store.close()


async def serve(pool: RottingPool) -> dict[str, Any]:
    """Run a daemon over the pool; what became of each export, and of a write to each volume."""
    exports: dict[str, str] = {}
    async with pool.daemon():
        for export, expected in pool.contents.items():
            try:
                found = await whole(pool.state / "nbd.sock", export)
                exports[export] = "same" if found == expected else "differs"
            except NbdClientError as error:
                exports[export] = f"error: {error}"
        for volume in [export for export in exports if "@" not in export]:
            try:
                await _use(pool, volume)
            except NbdClientError as error:
                exports[volume] += f", then error: {error}"
        status, _ = await pool.ask("GET", "/readyz")
        listed, _ = await pool.ask("GET", "/v1/volumes")
    return {"exports": exports, "ready": status, "listed": listed}


async def _use(pool: RottingPool, volume: str) -> None:
    """Write, flush, read back."""
    async with await NbdClient.connect_unix(str(pool.state / "nbd.sock")) as client:
        await client.go(volume)
        for chunk in (3, 700, 1_200):
            await client.write(chunk * CHUNK_BYTES + 5, b"new")
        await client.flush()
        assert await client.read(700 * CHUNK_BYTES + 5, 3) == b"new"


async def scrub(pool: RottingPool) -> dict[str, Any]:
    """Run a daemon over the pool and have it scrubbed; what it found."""
    async with pool.daemon():
        job = await pool.must("POST", "/v1/scrubs", {"rate": "10GiB"})
        ended = await pool.must("GET", f"/v1/jobs/{job['id']}?wait_s=60")
        (result,) = (await pool.must("GET", "/v1/scrubs"))["scrubs"]
        status, _ = await pool.ask("GET", "/readyz")
    findings = [{"kind": each["kind"], "where": each.get("offset_bytes")} for each in result["findings"]]
    return {"state": ended["state"], "chunks": result["chunks"], "findings": findings, "ready": status}


def served(pool: RottingPool, work: Callable[[RottingPool], Coroutine[Any, Any, dict[str, Any]]]) -> dict[str, Any]:
    """Do something with a daemon, or say why none starts."""
    try:
        return asyncio.run(asyncio.wait_for(work(pool), 60))
    except BlockvirtError as error:
        return {"refused": f"{type(error).__name__}: {error.message}"}


def main() -> None:
    """Do what the lines say."""
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    pool = RottingPool(Path(sys.argv[1]))
    pool.load_contents()
    if len(sys.argv) > 2:
        bug_named(sys.argv[2]).plant(pytest.MonkeyPatch())
    for line in sys.stdin:
        try:
            what = line.strip()
            work = {"serve": serve, "scrub": scrub}.get(what)
            answer = served(pool, work) if work is not None else check(pool, data=what == "check-data")
        except Exception:  # what nobody expects is a finding of the attack
            answer = {"fault": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
