"""The wiring: everything the daemon consists of, put together in one place and taken apart in reverse order."""

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import uvloop

from blockvirt.api.app import Services, build
from blockvirt.api.idempotency import Idempotency
from blockvirt.api.server import ApiServer
from blockvirt.config import Settings
from blockvirt.limits import GC_NEW_OBJECTS
from blockvirt.lun.presentation import Presentation
from blockvirt.metrics import Metrics
from blockvirt.nbd.listeners import activation_sockets, clear_activation
from blockvirt.nbd.server import NbdServer
from blockvirt.notify import notify
from blockvirt.snapshots.catalogue import Snapshots
from blockvirt.snapshots.changed_blocks import ChangedBlocks
from blockvirt.snapshots.cloning import Cloning
from blockvirt.snapshots.export import SnapshotExports
from blockvirt.snapshots.exports import Exports
from blockvirt.snapshots.flatten import Flattening
from blockvirt.snapshots.histories import Histories
from blockvirt.snapshots.importing import SnapshotImports
from blockvirt.snapshots.readers import SnapshotReaders
from blockvirt.snapshots.revert import Reverts
from blockvirt.snapshots.scheduled import ScheduledSnapshots
from blockvirt.snapshots.schedules import Schedules
from blockvirt.snapshots.scrub import Scrubbing
from blockvirt.snapshots.scrub_schedule import ScrubSchedule
from blockvirt.snapshots.sealing import Sealer
from blockvirt.tasks import TaskSet
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.engine import Engine, EngineSettings
from blockvirt.volumes.metadata_copies import MetadataCopies
from blockvirt.volumes.ports import Endpoints, SessionInfo

log = logging.getLogger("blockvirt.daemon")


class Sessions:
    """The NBD server's sessions as the control plane sees them (ports.SessionControl)."""

    def __init__(self, engine: Engine, readers: SnapshotReaders) -> None:
        self._engine = engine
        self._readers = readers
        self.server: NbdServer | None = None
        """Set once: the server needs the exports, which need the catalogue, which asks for sessions."""

    def sessions(self) -> Sequence[SessionInfo]:
        """See SessionControl."""
        if self.server is None:
            return ()
        return [
            SessionInfo(
                id=session.id,
                export=session.export,
                volume_id=self._engine.registry.volume_of(session.id) or self._readers.volume_of(session.id) or "",
                peer=session.peer,
                since_s=session.since_s,
                bytes_read=session.bytes_read,
                bytes_written=session.bytes_written,
                requests=session.requests,
                mode="ro" if session.read_only else "rw",
            )
            for session in self.server.sessions()
        ]

    async def drop(self, session_id: str) -> bool:
        """See SessionControl."""
        return self.server is not None and self.server.drop(session_id)

    async def drop_volume(self, volume_id: str) -> int:
        """See SessionControl. Who reads its snapshots is not concerned: a copy of one would have to begin anew."""
        volume_of = self._engine.registry.volume_of
        mine = [session.id for session in self.sessions() if volume_of(session.id) == volume_id]
        return sum([await self.drop(session_id) for session_id in mine])


class Daemon:
    """A running daemon. ``start`` brings it up, ``stop`` takes it down; nothing of it is global."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._not_ready = "starting"
        self.endpoints = Endpoints(
            state_dir=str(settings.state_dir.absolute()),
            http_socket=str(settings.http_socket),
            nbd_socket=str(settings.nbd_socket),
        )

    async def start(self) -> None:
        """Open the pool, recover what was left, then listen. Raises errors of the tree; nothing runs on then."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            engine = await Engine.start(settings.state_dir, settings.devices, _engine_settings(settings))
            stack.push_async_callback(engine.close)
            readers = SnapshotReaders(engine.context)
            stack.push_async_callback(readers.close)
            flattening = Flattening(engine, readers)
            scrubbing = Scrubbing(engine, rate_bytes=settings.scrub_rate)
            engine.registry.on_discard(readers.drop_volume)
            sessions = Sessions(engine, readers)
            catalogue = Catalogue(engine.store, engine.registry, engine.storage, trash_s=settings.trash_s)
            snapshots = Snapshots(engine, readers)
            stack.push_async_callback(snapshots.close)
            imports = SnapshotImports(engine, catalogue)
            stack.push_async_callback(imports.close)
            await imports.take_back_all()
            reverts = Reverts(engine, snapshots, catalogue.promises)
            stack.push_async_callback(reverts.close)
            schedules = Schedules(engine.store, time.time, ScheduledSnapshots(engine.store, snapshots))
            presentation = Presentation(engine.store, sessions)
            await presentation.finish_deletions()
            exports = Exports(
                engine.store, catalogue, engine.registry, readers, presentation.resolve, presentation.exports
            )
            server = sessions.server = NbdServer(exports)
            stack.push_async_callback(server.stop)
            services = Services(
                catalogue=catalogue,
                presentation=presentation,
                sessions=sessions,
                space=engine.storage,
                devices=engine.storage,
                idempotency=Idempotency(engine.store),
                snapshots=snapshots,
                reverts=reverts,
                cloning=Cloning(engine.store, catalogue, snapshots),
                flattening=flattening,
                changed_blocks=ChangedBlocks(engine, snapshots),
                exports=SnapshotExports(engine, snapshots, readers),
                imports=imports,
                histories=Histories(engine.context),
                schedules=schedules,
                scrubbing=scrubbing,
                jobs=engine.jobs,
                endpoints=lambda: self.endpoints,
                not_ready=lambda: self._not_ready or engine.not_ready(),
                metrics=Metrics(engine, catalogue, server, scrubs=scrubbing.counters).take,
            )
            await self._listen(services, server, stack)
            workers = TaskSet("daemon")
            stack.push_async_callback(workers.close)
            copies = MetadataCopies(engine.store, engine.storage, engine.context.threads, settings.state_dir)
            workers.start(copies.run(), "metadata copies")
            workers.start(catalogue.trash.run(), "trash")
            workers.start(schedules.run(), "schedules")
            workers.start(Sealer(engine).run(), "sealing")
            workers.start(ScrubSchedule(engine.store, scrubbing, settings.scrub_schedule).run(), "scrub schedule")
            self._not_ready = ""
            self._stack = stack.pop_all()

    async def _listen(self, services: Services, server: NbdServer, stack: AsyncExitStack) -> None:
        settings = self._settings
        await server.listen_unix(self.endpoints.nbd_socket)
        for activated in activation_sockets(os.environ, os.getpid()):
            server.adopt(activated)
        clear_activation(os.environ)
        nbd = settings.nbd_address
        if nbd is not None:
            (host, port), *_ = await server.listen_tcp(*nbd)
            self.endpoints = replace(self.endpoints, nbd_host=host, nbd_port=port)
        api = ApiServer(build(services), self.endpoints.http_socket, *(settings.http_address or ()))
        await api.start()
        stack.push_async_callback(api.stop)
        if settings.http_address is not None:
            self.endpoints = replace(self.endpoints, http_host=settings.http_address[0], http_port=api.port)

    async def stop(self) -> None:
        """Stop accepting, answer what is in flight, checkpoint and close every volume, let go of the pool."""
        self._not_ready = "stopping"
        await self._stack.aclose()


def _engine_settings(settings: Settings) -> EngineSettings:
    return EngineSettings(
        chunk_bytes=settings.chunk_size,
        leaf_cache_bytes=settings.leaf_cache,
        metadata_reserve_bytes=settings.metadata_reserve,
    )


async def run(settings: Settings, announce: Callable[[Endpoints], None]) -> None:
    """Run a daemon until SIGTERM or SIGINT; ``announce`` is called once it serves."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    daemon = Daemon(settings)
    await daemon.start()
    collect_seldom()
    try:
        announce(daemon.endpoints)
        notify("READY=1")
        await stopping.wait()
        notify("STOPPING=1")
        log.info("stopping: answering what is in flight, then a checkpoint of every open volume")
    finally:
        await daemon.stop()


def allow_open_files() -> None:
    """Raise the limit on descriptors as far as allowed: a session and its volume take four, a shell allows 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collect_seldom() -> None:
    """Have the collector of cycles leave alone what lives now, and look less often at what comes.

    Requests make no cycles, yet their objects set it off every 700: 3 % of the processor in a copy-on-write load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_NEW_OBJECTS)


def serve(settings: Settings, announce: Callable[[Endpoints], None]) -> None:
    """Run the daemon in the foreground, with logs on stderr."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    allow_open_files()
    # A thread that holds the GIL may keep the loop waiting for so long, after each system call: the default of 5 ms is
    # half a hundred requests, and a copy on write makes three calls while checkpoint and reclaim compute.
    sys.setswitchinterval(0.0001)
    uvloop.run(run(settings, announce))
