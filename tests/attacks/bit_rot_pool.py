"""The pool that rots: volumes with snapshots, clones and hosts, made over HTTP and NBD as users make them."""

import asyncio
import json
import pickle
import random
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockvirt.config import load
from blockvirt.daemon import Daemon
from blockvirt.meta.keys import Table, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, VolumeRecord, decode
from blockvirt.meta.store import Reader, Store
from blockvirt.nbd.client import NbdClient
from blockvirt.pool.backing import backing_path
from blockvirt.volumes.checksums import GROUP_BITS, read_group
from blockvirt.volumes.journal import FRAMES_AT_BYTES
from blockvirt.volumes.journal_frames import HEADER
from tests.attacks.fsx import SmallChunks
from tests.attacks.fsx_lanes import whole
from tests.real.daemon import UnixHTTPConnection

CHUNK_BYTES = 4096
SIZE_BYTES = 1_300 * CHUNK_BYTES  # three leaves
_SNAPSHOTS = 7
_HTTP_S = 60.0
_BACKLOG = re.compile(r"""^blockvirt_lmdb_entries\{table="(?:seals|reclaim|punch)"\} (.*)$""", re.MULTILINE)


class RottingPool:
    """A pool under ``root``; ``contents`` are what its volumes and snapshots hold, by export."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.device = root / "device"
        self._contents_file = root / "contents"
        self.contents: dict[str, bytes] = {}

    @asynccontextmanager
    async def daemon(self) -> "AsyncIterator[Daemon]":
        """A daemon over the pool, in this process."""
        daemon = Daemon(
            load(
                state_dir=self.state,
                devices=(self.device,),
                http="none",
                nbd="none",
                chunk_size=f"{CHUNK_BYTES}B",
                metadata_reserve="1MiB",
            )
        )
        await daemon.start()
        try:
            yield daemon
        finally:
            await daemon.stop()

    def asked(self, method: str, path: str, body: object = None, *, key: str = "") -> tuple[int, bytes]:
        """Send a request to the API; returns the status and the answer."""
        connection = UnixHTTPConnection(self.state / "http.sock", _HTTP_S)
        try:
            headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    async def ask(self, method: str, path: str, body: object = None, *, key: str = "") -> tuple[int, bytes]:
        """The same from the event loop that the daemon runs in."""
        return await asyncio.to_thread(self.asked, method, path, body, key=key)

    async def must(self, method: str, path: str, body: object = None, *, key: str = "") -> Any:
        """The same for a request that must succeed."""
        status, answer = await self.ask(method, path, body, key=key)
        assert status < 300, (method, path, status, answer)
        return json.loads(answer)

    async def fill(self, volume: str, chance: random.Random, writes: int) -> None:
        """Write single chunks all over a volume."""
        async with await NbdClient.connect_unix(str(self.state / "nbd.sock")) as client:
            await client.go(volume)
            for _ in range(writes):
                await client.write(chance.randrange(1_300) * CHUNK_BYTES, chance.randbytes(CHUNK_BYTES))

    async def remember(self, *exports: str) -> None:
        """Note what exports hold."""
        for export in exports:
            self.contents[export] = await whole(self.state / "nbd.sock", export)

    def save_contents(self) -> None:
        """Keep ``contents`` beside the pool, for another process."""
        self._contents_file.write_bytes(pickle.dumps(self.contents))

    def load_contents(self) -> None:
        """Take them from there, if they were kept."""
        if self._contents_file.exists():
            self.contents = pickle.loads(self._contents_file.read_bytes())

    def backing_files(self) -> dict[int, tuple[int, Path]]:
        """Return the branch and the path of each backing file, of a pool at rest."""
        with self._rows() as reader:
            found = [decode(FileRecord, key, stored) for key, stored in reader.scan(Table.FILES)]
        return {each.number: (each.branch, backing_path(self.device, each.branch, each.number)) for each in found}

    def sealed_chunks(self) -> list[tuple[Path, int, int]]:
        """Return the chunks that have a checksum: file, offset, length."""
        files = self.backing_files()
        with self._rows() as reader:
            groups = [(*split_pair(key), read_group(key, stored)) for key, stored in reader.scan(Table.CHECKSUMS)]
        return [
            (files[number][1], ((group << GROUP_BITS) + place) * CHUNK_BYTES, CHUNK_BYTES)
            for number, group, checksums in groups
            for place in checksums
        ]

    def seen_chunks(self) -> list[tuple[Path, int, str, int]]:
        """Return the sealed chunks that a volume sees whose contents nobody has twice: file, offset, volume, chunk."""
        seen = {
            content[at : at + CHUNK_BYTES]: (export, at // CHUNK_BYTES)
            for export, content in self.contents.items()
            if "@" not in export
            for at in range(0, len(content), CHUNK_BYTES)
        }
        return [
            (path, offset, *seen[content])
            for path, offset, length in self.sealed_chunks()
            if any(content := _at(path, offset, length)) and content in seen
        ]

    def files_of_heads(self) -> dict[str, frozenset[Path]]:
        """Return the backing files of the branch that each volume writes to."""
        files = self.backing_files().values()
        with self._rows() as reader:
            records = [decode(VolumeRecord, key, stored) for key, stored in reader.scan(Table.VOLUMES)]
        records = [each for each in records if each.name in self.contents]  # not what is in the trash
        return {each.name: frozenset(path for branch, path in files if branch == each.branch) for each in records}

    def users_of_branches(self) -> dict[int, frozenset[str]]:
        """Return the volumes that see something of each branch."""
        with self._rows() as reader:
            records = {
                each.number: each
                for each in (decode(BranchRecord, key, stored) for key, stored in reader.scan(Table.BRANCHES))
            }
            names = {
                each.id: each.name
                for each in (decode(VolumeRecord, key, stored) for key, stored in reader.scan(Table.VOLUMES))
            }
        users: dict[int, set[str]] = {number: set() for number in records}
        for record in records.values():
            number = record.number
            while number:
                users[number].add(names[record.volume_id])
                number = records[number].origin_branch
        return {number: frozenset(each) for number, each in users.items()}

    @contextmanager
    def _rows(self) -> Iterator[Reader]:
        store = Store.open(self.state / "metadata", reserve_bytes=0)
        try:
            with store.read() as reader:
                yield reader
        finally:
            store.close()


def _at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def make(root: Path) -> RottingPool:
    """Make a pool at rest, everything sealed. The same each time, but for times."""
    chance = random.Random(1)
    pool = RottingPool(root)
    pool.device.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockvirt.ids.uuid.uuid4", lambda: uuid.UUID(int=chance.getrandbits(128), version=4))
        patch.setattr("blockvirt.snapshots.sealing.SEAL_REST_RATIO", 0)
        asyncio.run(_made(pool, chance))
    pool.save_contents()
    return pool


async def _made(pool: RottingPool, chance: random.Random) -> None:
    async with pool.daemon():
        for name in ("web", "db", "old"):
            await pool.must("POST", "/v1/volumes", {"name": name, "size": SIZE_BYTES, "labels": {"n": name}}, key=name)
            await pool.fill(name, chance, 150)
        for number in range(_SNAPSHOTS):
            taken = {"volumes": ["web", "db"], "name": f"s{number}"}
            await pool.must("POST", "/v1/snapshots/group", taken, key=f"group{number}")
            for name in ("web", "db"):
                await pool.fill(name, chance, 60)
        await pool.must("POST", "/v1/snapshots/web@s3/clone", {"name": "copy"})
        await pool.fill("copy", chance, 60)
        await pool.must("POST", "/v1/snapshots/web@s5/hold", {"tag": "kept"})
        await pool.must("POST", "/v1/snapshots/db@s6/revert", {"safety_name": "before"})
        await pool.fill("db", chance, 60)
        for host in ("alpha", "beta"):
            await pool.must("POST", "/v1/hosts", {"name": host})
        await pool.must("POST", "/v1/hosts/alpha/luns", {"volume": "web"})
        await pool.must("POST", "/v1/schedules", {"name": "daily", "cron": "0 3 * * *", "volume": "web"})
        await pool.must("DELETE", "/v1/volumes/old")
        await pool.must("DELETE", "/v1/snapshots/web@s4")
        await pool.remember("web", "db", "copy", *(f"web@s{each}" for each in (0, 3, 6)), "db@s6", "db@before")
        await asyncio.to_thread(_at_rest, pool)


def _at_rest(pool: RottingPool) -> None:
    """Return when all is sealed, freed and punched: the metrics tell, so they are asked again and again."""
    while set(_BACKLOG.findall(pool.asked("GET", "/metrics")[1].decode())) != {"0.0"}:
        time.sleep(0.05)


def leave_journal(daemon: SmallChunks) -> tuple[RottingPool, list[tuple[Path, int, int]]]:
    """Write to a volume and kill its daemon, when another one is at rest.

    Returns the pool, and the frames of its journal that have another one behind them.
    """
    daemon.create(SIZE_BYTES)
    daemon.cli("volume", "create", "other", "--size", str(SIZE_BYTES))
    pool, chance = RottingPool(daemon.root), random.Random(1)

    async def write(volume: str, last: Callable[[], None]) -> None:
        content = bytearray(SIZE_BYTES)
        async with await NbdClient.connect_unix(str(daemon.socket)) as client:
            await client.go(volume)
            for number in range(60):
                at, chunk = chance.randrange(1_300) * CHUNK_BYTES, bytes([number + 1]) * CHUNK_BYTES
                await client.write(at, chunk)
                content[at : at + CHUNK_BYTES] = chunk
            pool.contents[volume] = bytes(content)
            last()

    journals = daemon.device / "journal"
    asyncio.run(write("other", lambda: None))
    daemon.until(lambda: not any(journals.iterdir()), "the other volume is not closed", _HTTP_S)
    asyncio.run(write(daemon.export, daemon.kill9))  # open: a close brings what the journal holds into the metadata
    pool.save_contents()
    frames = []
    for path in sorted(journals.iterdir()):
        content, at = path.read_bytes(), FRAMES_AT_BYTES
        while HEADER.unpack_from(content, at)[4]:
            length = HEADER.size + HEADER.unpack_from(content, at)[2]
            frames.append((path, at, length))
            at += length
    return pool, frames[:-1]


class Kept:
    """The files of a pool as they were, to be put back after a trial that changed them."""

    def __init__(self, root: Path, aside: Path) -> None:
        self._root, self._aside = root, aside
        _copy(root, aside)

    def restore(self) -> None:
        """Bring the whole pool back."""
        shutil.rmtree(self._root)
        _copy(self._aside, self._root)


def _copy(source: Path, target: Path) -> None:
    """Copy with the holes: space in them would be a leak."""
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)
