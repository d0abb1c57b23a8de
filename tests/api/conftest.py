"""A served API over a real store: unix socket and TCP, with stand-ins for the rooms behind."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from blockvirt.api.app import Services, build
from blockvirt.api.idempotency import Idempotency
from blockvirt.api.server import ApiServer
from blockvirt.lun.presentation import Presentation
from blockvirt.meta.store import Store
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.job_states import FINISHED
from blockvirt.volumes.ports import Endpoints
from tests.api.engines import snapshot_services, unstarted_engine
from tests.control.ports import Clock, Devices, OpenVolumes, Sessions, Space, new_store
from tests.volumes.conftest import Pool, findings, read, until, until_punched, write


@dataclass
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    raw: bytes
    json: Any


@dataclass
class Served:
    """An API that is served, and clients of it."""

    services: Services
    server: ApiServer
    unix: aiohttp.ClientSession
    tcp: aiohttp.ClientSession

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        tcp: bool = False,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Answer:
        """Send a request, by the unix socket unless ``tcp``."""
        client = self.tcp if tcp else self.unix
        base = f"http://127.0.0.1:{self.server.port}" if tcp else "http://blockvirt"
        given: dict[str, Any] = {"json": body} if body is not None else {"data": data} if data is not None else {}
        async with client.request(method, base + path, headers=headers, **given) as response:
            raw = await response.read()
            parsed = await response.json(content_type=None) if "json" in response.content_type else None
            return Answer(response.status, response.headers, raw, parsed)

    async def ok(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request that must succeed; the JSON of its answer."""
        answer = await self.call(method, path, body)
        assert answer.status in (200, 201, 202), answer.json
        return answer.json

    async def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Send a request that must be refused, with what to do about it; status and code."""
        answer = await self.call(method, path, body)
        assert answer.status >= 400, answer.json
        assert answer.json["correction"], answer.json
        return answer.status, answer.json["code"]


@dataclass
class Api(Served):
    """The running API and everything behind it."""

    store: Store
    sessions: Sessions
    open_volumes: OpenVolumes
    space: Space
    clock: Clock
    unix_path: Path
    not_ready: list[str]


@dataclass
class PoolApi(Served):
    """The running API over a running pool, with chunks of 4 KiB and a trash of an hour."""

    pool: Pool
    readers: SnapshotReaders
    handles: list[Handle]

    async def open(self, name: str) -> Handle:
        """Open a volume as an NBD session does; closed in the end at the latest."""
        volume_id = self.services.catalogue.get(name).id
        handle = await self.pool.engine.registry.open(volume_id, f"session{len(self.handles)}")
        self.handles.append(handle)
        return handle

    async def write(self, name: str, offset: int, data: bytes) -> None:
        """Write to a volume in a session of its own."""
        handle = await self.open(name)
        await write(handle, offset, data)
        await handle.close()

    async def read(self, name: str, offset: int, length: int) -> bytes:
        """Read from a volume in a session of its own."""
        handle = await self.open(name)
        data = await read(handle, offset, length)
        await handle.close()
        return data

    async def until_reclaimed(self) -> None:
        """Return when no job is left to do, and all freed space is given back."""
        board = self.pool.engine.jobs
        await until(lambda: all(job.state in FINISHED for job in board.list()))
        assert not board.list(state="failed")
        await until_punched(self.pool)


@asynccontextmanager
async def serve_pool(folder: Path) -> AsyncIterator[PoolApi]:
    """Serve an API over a pool on files in ``folder``."""
    pool = await Pool(folder).start()
    engine = pool.engine
    readers = SnapshotReaders(engine.context)
    catalogue = Catalogue(engine.store, engine.registry, engine.storage, trash_s=3600.0)
    path = folder / "http.sock"
    nobody = Sessions()
    snapshots = snapshot_services(engine, catalogue, readers, time.time)
    services = Services(
        catalogue=catalogue,
        presentation=Presentation(engine.store, nobody),
        sessions=nobody,
        space=engine.storage,
        devices=engine.storage,
        idempotency=Idempotency(engine.store),
        **snapshots,
        endpoints=lambda: Endpoints(str(folder), str(path), str(folder / "nbd.sock")),
        not_ready=lambda: "",
        metrics=lambda: lambda: b"",
    )
    server = ApiServer(build(services), str(path), "127.0.0.1", 0)
    await server.start()
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as unix,
        aiohttp.ClientSession() as tcp,
    ):
        api = PoolApi(services, server, unix, tcp, pool, readers, [])
        yield api
    await server.stop()
    for handle in api.handles:
        await handle.close()
    await services.reverts.close()
    await services.snapshots.close()
    await readers.close()
    await pool.close()


@pytest.fixture
async def pool_api(short_tmp_path: Path) -> AsyncIterator[PoolApi]:
    """An API over an empty pool; the offline proof of its map finds nothing wrong afterwards."""
    async with serve_pool(short_tmp_path) as served:
        yield served
        for handle in served.handles:
            await handle.close()
        await served.until_reclaimed()
        assert findings(served.pool, leaks=True) == []


@asynccontextmanager
async def serve_api(tmp_path: Path) -> AsyncIterator[Api]:
    """Serve an API over an empty pool of 100 GiB, its unix socket in ``tmp_path``."""
    store = new_store(tmp_path / "meta")
    engine = unstarted_engine(store)
    sessions = Sessions()
    open_volumes = OpenVolumes(sessions)
    space = Space(store)
    clock = Clock()
    catalogue = Catalogue(store, open_volumes, space, clock=clock)
    not_ready: list[str] = []
    path = tmp_path / "http.sock"
    services = Services(
        catalogue=catalogue,
        presentation=Presentation(store, sessions, clock=clock),
        sessions=sessions,
        space=space,
        devices=Devices(store, space),
        idempotency=Idempotency(store, clock=clock),
        **snapshot_services(engine, catalogue, SnapshotReaders(engine.context), clock),
        endpoints=lambda: Endpoints(
            str(tmp_path), str(path), str(tmp_path / "nbd.sock"), nbd_host="127.0.0.1", nbd_port=10809
        ),
        not_ready=lambda: not_ready[0] if not_ready else "",
        metrics=lambda: lambda: b"blockvirt_up 1\n",
    )
    server = ApiServer(build(services), str(path), "127.0.0.1", 0)
    await server.start()
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as unix,
        aiohttp.ClientSession() as tcp,
    ):
        yield Api(services, server, unix, tcp, store, sessions, open_volumes, space, clock, path, not_ready)
    await server.stop()
    await engine.registry.close()
    engine.context.threads.close()
    store.close()


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """An API over an empty pool of 100 GiB."""
    async with serve_api(tmp_path) as served:
        yield served
