"""A served API over a real store: unix socket and TCP, with stand-ins for the rooms behind."""

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
from blockvirt.volumes.ports import Endpoints
from tests.api.engines import snapshot_services, unstarted_engine
from tests.control.ports import Clock, Devices, OpenVolumes, Sessions, Space, new_store


@dataclass
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    raw: bytes
    json: Any


@dataclass
class Api:
    """The running API and everything behind it."""

    store: Store
    sessions: Sessions
    open_volumes: OpenVolumes
    space: Space
    clock: Clock
    services: Services
    server: ApiServer
    unix_path: Path
    not_ready: list[str]
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
        yield Api(store, sessions, open_volumes, space, clock, services, server, path, not_ready, unix, tcp)
    await server.stop()
    await engine.registry.close()
    engine.context.threads.close()
    store.close()


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """An API over an empty pool of 100 GiB."""
    async with serve_api(tmp_path) as served:
        yield served
