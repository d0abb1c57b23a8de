"""The process that looks at a rotten pool: `python -m tests.attacks.bit_rot_child ROOT [BUG]`.

Damage may kill who looks at it, so somebody else must: each line of its input is JSON with "what" to do (the names are
in ``answer``) and with what, each line of its output the JSON of what came of it.
"""

import asyncio
import faulthandler
import hashlib
import json
import logging
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from blockvirt.check import run
from blockvirt.errors import BlockvirtError
from blockvirt.meta.findings import Severity
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store
from blockvirt.nbd.client import NbdClientError
from tests.attacks.bit_rot_pool import RottingPool
from tests.attacks.bit_rot_served import copy_up, cut_file, cut_metadata, use
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
                await use(pool, volume)
            except NbdClientError as error:
                exports[volume] += f", then error: {error}"
        status, _ = await pool.ask("GET", "/readyz")
        listed, _ = await pool.ask("GET", "/v1/volumes")
    return {"exports": exports, "ready": status, "listed": listed}


async def scrub(pool: RottingPool) -> dict[str, Any]:
    """Run a daemon over the pool and have it scrubbed; what it found."""
    async with pool.daemon():
        job = await pool.must("POST", "/v1/scrubs", {"rate": "10GiB"})
        ended = await pool.must("GET", f"/v1/jobs/{job['id']}?wait_s=60")
        (result,) = (await pool.must("GET", "/v1/scrubs"))["scrubs"]
        status, _ = await pool.ask("GET", "/readyz")
    findings = [{"kind": each["kind"], "where": each.get("offset_bytes")} for each in result["findings"]]
    return {"state": ended["state"], "chunks": result["chunks"], "findings": findings, "ready": status}


def restore(pool: RottingPool) -> dict[str, Any]:
    """Put the newest copy of the metadata in place; what was found in the pool then, but for leaks."""
    report = run(pool.state, repair=False, restore_metadata=True)
    return {"found": sorted({each.code for each in report.findings if each.severity is not Severity.LEAK})}


def answer(pool: RottingPool, what: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Do what a line says."""
    if what in ("check", "check-data"):
        return check(pool, data=what == "check-data")
    if what == "restore":
        return restore(pool)
    with_daemon = {
        "serve": lambda: serve(pool),
        "scrub": lambda: scrub(pool),
        "copy": lambda: copy_up(pool, asked["volume"], asked["chunk"], Path(asked["cold"]) if asked["cold"] else None),
        "cut-file": lambda: cut_file(pool, Path(asked["path"]), asked["cut_at"], asked["untouched"]),
        "cut-metadata": lambda: cut_metadata(pool, asked["cut_at"], Path(asked["acknowledged"])),
    }
    if "contents" in asked:
        pool.contents = pickle.loads(Path(asked["contents"]).read_bytes())
    try:
        return asyncio.run(asyncio.wait_for(with_daemon[what](), 60))
    except BlockvirtError as error:
        return {"refused": f"{type(error).__name__}: {error.message}"}
    finally:
        pool.load_contents()


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
            asked = json.loads(line)
            told = answer(pool, asked["what"], asked)
        except Exception:  # what nobody expects is a finding of the attack
            told = {"fault": traceback.format_exc()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
