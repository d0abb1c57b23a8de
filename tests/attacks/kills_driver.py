"""What clients do to the daemon that is killed, step by step, and what they may count on from each answer on."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blockvirt.nbd import constants as c
from tests.attacks.kills_clients import Died, NbdSession, Refused
from tests.attacks.kills_daemon import Daemon
from tests.attacks.kills_model import CHUNK_BYTES, Expected, Snapshot, Volume, World, Write, differences

JOB_WAIT_S = 15
LOOK_S = 0.02
METADATA = "state/metadata/data.mdb"


class Driver:
    """Clients of one daemon. Every verb raises Died where the daemon's end came before the answer."""

    def __init__(self, daemon: Daemon, world: World, seed: int, streams: dict[str, bytes], root: Path) -> None:
        """``world`` is what the pool holds; ``streams`` are there to be imported; the pool's folder is ``root``."""
        self.daemon = daemon
        self.root = root
        self.expected = Expected(world)
        self.streams = streams
        self.answers = 0
        """So many operations were answered."""
        self._dice = random.Random(seed)
        self._sessions: dict[str, NbdSession] = {}
        self._trash: dict[str, Volume] = {}
        self._stack = ExitStack()

    @property
    def world(self) -> World:
        """What everything that was answered amounts to."""
        return self.expected.answered

    # --- NBD ---------------------------------------------------------------------------------------------------------

    def session(self, export: str) -> NbdSession:
        """Return the session of an export; opens it."""
        if export not in self._sessions:
            self._sessions[export] = self.daemon.session(export)
        return self._sessions[export]

    def write(self, volume: str, *ranges: tuple[float, float], fua: bool = False) -> None:
        """Write random bytes to ranges, (first, count) in chunks, all sent at once."""
        flags = c.CMD_FLAG_FUA if fua else 0
        self._do(volume, [(c.CMD_WRITE, flags, write) for write in self._writes(volume, ranges)])

    def trim(self, volume: str, *ranges: tuple[float, float]) -> None:
        """Trim ranges."""
        self._do(volume, [(c.CMD_TRIM, 0, write) for write in self._writes(volume, ranges, zeros=True)])

    def zero(self, volume: str, *ranges: tuple[float, float], hole: bool) -> None:
        """Write zeroes to ranges; with ``hole`` they may be unmapped."""
        flags = 0 if hole else c.CMD_FLAG_NO_HOLE
        self._do(volume, [(c.CMD_WRITE_ZEROES, flags, write) for write in self._writes(volume, ranges, zeros=True)])

    def flush(self, volume: str) -> None:
        """Flush."""
        session = self.session(volume)
        if not all(session.answers([session.start(c.CMD_FLUSH)])):
            raise Died("a flush was not answered")
        self.answers += 1

    def _writes(self, volume: str, ranges: tuple[tuple[float, float], ...], *, zeros: bool = False) -> list[Write]:
        size_bytes = len(self.world.volumes[volume].content)
        found = []
        for first, count in ranges:
            offset = round(first * CHUNK_BYTES)
            length = min(round(count * CHUNK_BYTES), size_bytes - offset)
            found.append(Write(volume, offset, bytes(length) if zeros else self._dice.randbytes(length)))
        return found

    def _do(self, volume: str, wanted: list[tuple[int, int, Write]]) -> None:
        session = self.session(volume)
        requests = []
        for command, flags, write in wanted:
            payload = write.data if command == c.CMD_WRITE else b""
            requests.append(session.start(command, write.offset, len(write.data), payload, flags))
        answered = session.answers(requests)
        for is_there, (_, _, write) in zip(answered, wanted, strict=True):
            if is_there:
                for world in (self.expected.answered, self.expected.instead):
                    if world is not None:
                        world.volumes[volume].apply(write)
                self.answers += 1
            else:
                self.expected.writes.append(write)
        if not all(answered):
            raise Died("writes were not answered")

    def disconnect(self, *volumes: str) -> None:
        """End sessions: the last one closes its volume, with a checkpoint."""
        for volume in volumes:
            self._sessions.pop(volume).disconnect()

    def open_volumes(self) -> list[str]:
        """Return the exports with sessions."""
        return list(self._sessions)

    def alone(self, *volumes: str) -> None:
        """End sessions, and wait until the daemon knows."""
        self.disconnect(*volumes)
        is_open = True
        while is_open:
            time.sleep(LOOK_S)  # mostly one look is enough: each is a call of the daemon's more, and those are counted
            is_open = bool(self.daemon.api.call("GET", "/v1/sessions")["sessions"])

    # --- HTTP --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[World]:
        """Something that happens as a whole: gives the world to change into what it is then."""
        after = self.world.copy()
        yield after
        self.expected.instead = after

    def _answered(self) -> None:
        assert self.expected.instead is not None
        self.expected.answered, self.expected.instead = self.expected.instead, None
        self.answers += 1

    def create(self, volume: str, chunks: int, *devices: str) -> None:
        """Create a volume, on some devices only if they are named."""
        with self._change() as after:
            after.volumes[volume] = Volume(bytearray(chunks * CHUNK_BYTES))
        body = {"name": volume, "size": chunks * CHUNK_BYTES, "placement": {"devices": list(devices)}}
        self.daemon.api.call("POST", "/v1/volumes", body)
        self._answered()

    def rename(self, volume: str, name: str) -> None:
        """Give a volume another name."""
        with self._change() as after:
            after.volumes[name] = after.volumes.pop(volume)
        self.daemon.api.call("PATCH", f"/v1/volumes/{volume}", {"name": name})
        self._answered()

    def throw_away(self, volume: str) -> None:
        """Put a volume into the trash."""
        with self._change() as after:
            self._trash[volume] = after.volumes.pop(volume)
        self.daemon.api.call("DELETE", f"/v1/volumes/{volume}")
        self._answered()

    def restore(self, volume: str) -> None:
        """Take a volume out of the trash."""
        with self._change() as after:
            after.volumes[volume] = self._trash.pop(volume)
        self.daemon.api.call("POST", f"/v1/trash/{volume}/restore", {})
        self._answered()

    def snapshot(self, volume: str, name: str) -> None:
        """Take a snapshot."""
        with self._change() as after:
            after.volumes[volume].snapshots[name] = Snapshot(bytes(after.volumes[volume].content))
        self.daemon.api.call("POST", "/v1/snapshots", {"volume": volume, "name": name})
        self._answered()

    def snapshot_under(
        self, volume: str, name: str, *batches: tuple[tuple[float, float], ...], hold: bool = False
    ) -> None:
        """Take a snapshot while batches of writes are sent, one after the other.

        With ``hold`` they come, where calls are watched, when it is frozen and about to be committed: so they must not
        need a new backing file.
        """
        before = bytes(self.world.volumes[volume].content)
        self.session(volume)
        with self._change() as after:
            after.volumes[volume].snapshots[name] = Snapshot(before)
        watch = self.daemon.watch if hold else None
        if watch is not None:
            watch.hold(METADATA)
            self._stack.callback(watch.release)
        request = self.daemon.api.begin("POST", "/v1/snapshots", {"volume": volume, "name": name})
        self._stack.callback(request.close)
        while watch is not None and not watch.is_holding.wait(LOOK_S):
            if self.daemon.is_gone():
                raise Died("a snapshot was not answered")
        shot = after.volumes[volume].snapshots[name]
        for ranges in batches:
            writes = self._writes(volume, ranges)
            shot.loose = (*shot.loose, *writes)
            self._do(volume, [(c.CMD_WRITE, 0, write) for write in writes])
        if watch is not None:
            watch.release()
        self.daemon.api.end(request, "taking a snapshot")
        self._answered()
        content = self._read(f"{volume}@{name}")
        probe = World({volume: Volume(bytearray(), {name: shot})})
        found = World({volume: Volume(bytearray(), {name: Snapshot(content)})})
        if broken := differences(probe, found):
            raise AssertionError(f"a snapshot beside writes: {'; '.join(broken)}")
        shot.content, shot.loose = content, ()

    def group(self, name: str, *volumes: str) -> None:
        """Take a snapshot of several volumes."""
        with self._change() as after:
            for volume in volumes:
                after.volumes[volume].snapshots[name] = Snapshot(bytes(after.volumes[volume].content))
        self.daemon.api.call("POST", "/v1/snapshots/group", {"volumes": list(volumes), "name": name})
        self._answered()

    def clone(self, volume: str, snapshot: str, name: str) -> None:
        """Make a volume from a snapshot."""
        with self._change() as after:
            after.volumes[name] = Volume(bytearray(after.volumes[volume].snapshots[snapshot].content))
        self.daemon.api.call("POST", f"/v1/snapshots/{volume}@{snapshot}/clone", {"name": name})
        self._answered()

    def revert(self, volume: str, snapshot: str, safety: str) -> None:
        """Take a volume back; ``safety`` is the name of the snapshot of what it held, or empty."""
        with self._change() as after:
            changed = after.volumes[volume]
            if safety:
                changed.snapshots[safety] = Snapshot(bytes(changed.content))
            changed.content = bytearray(changed.snapshots[snapshot].content)
        body = {"safety_name": safety} if safety else {"safety": False}
        self.daemon.api.call("POST", f"/v1/snapshots/{volume}@{snapshot}/revert", body)
        self._answered()

    def grow(self, volume: str, chunks: int) -> None:
        """Grow a volume by so many chunks; a session would see its old size, and is ended."""
        with self._change() as after:
            after.volumes[volume].content += bytes(chunks * CHUNK_BYTES)
        size_bytes = len(self.world.volumes[volume].content) + chunks * CHUNK_BYTES
        self.daemon.api.call("PATCH", f"/v1/volumes/{volume}", {"size": size_bytes})
        self._answered()
        if volume in self._sessions:
            self.disconnect(volume)

    def delete(self, volume: str) -> None:
        """Delete a volume for good, and wait for the end of that."""
        with self._change() as after:
            del after.volumes[volume]
        answer = self.daemon.api.call("DELETE", f"/v1/volumes/{volume}?purge=true")
        self._answered()
        self.wait(answer["job_id"])

    def delete_snapshots(self, *names: str) -> None:
        """Delete snapshots, 'VOLUME@NAME', all in one; and wait for what that gives back."""
        with self._change() as after:
            for each in names:
                volume, _, name = each.partition("@")
                del after.volumes[volume].snapshots[name]
        answer = self.daemon.api.call("POST", "/v1/snapshots/delete", {"snapshots": list(names)})
        self._answered()
        for job_id in answer["job_ids"]:
            self.wait(job_id)

    def add_device(self, name: str, folder: str, **bounds: int) -> None:
        """Take a folder of the pool's in as a device; ``bounds`` are its limit and its reserve, in bytes."""
        with self._change() as after:
            after.devices.add(name)
        self.daemon.api.call("POST", "/v1/devices", {"path": f"{self.root}/{folder}", "name": name} | bounds)
        self._answered()

    def remove_device(self, name: str) -> None:
        """Take a device out."""
        with self._change() as after:
            after.devices.remove(name)
        self.daemon.api.call("DELETE", f"/v1/devices/{name}")
        self._answered()

    def take_in(self, volume: str, stream: str, change: Callable[[World], None]) -> None:
        """Import a stream; ``change`` says what that makes of the world."""
        with self._change() as after:
            change(after)
        self.daemon.api.call("POST", f"/v1/volumes/{volume}/import", self.streams[stream])
        self._answered()

    def flatten(self, volume: str) -> None:
        """Give a clone copies of its own, and wait for the end of that; nothing where it has them."""
        self.expected.may_leak = True
        try:
            job = self.daemon.api.call("POST", f"/v1/volumes/{volume}/flatten")
        except Refused as error:
            if "is no clone" not in str(error):
                raise
        else:
            self.wait(job["id"])
        self.answers += 1

    def wait(self, job_id: str) -> None:
        """Wait until a job is done; raises AssertionError where it fails."""
        job = self.daemon.api.call("GET", f"/v1/jobs/{job_id}?wait_s={JOB_WAIT_S}")
        if job["state"] != "done":
            raise AssertionError(f"the job {job['kind']} of {job['subject']} is {job['state']}: {job.get('error')}")

    def wait_for_all(self) -> None:
        """Wait until no job is left over; raises AssertionError where one fails."""
        for state in ("running", "queued", "failed"):
            jobs: list[dict[str, Any]] = self.daemon.api.call("GET", f"/v1/jobs?state={state}")["jobs"]
            for job in jobs:
                self.wait(job["id"])

    def forget_cached(self) -> None:
        """Have the kernel drop what it has cached of the volumes: what is copied next is read by a thread."""
        for path in self.root.glob("disk*/files/*"):
            fd = os.open(path, os.O_RDWR)
            try:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    # --- looking -----------------------------------------------------------------------------------------------------

    def look(self) -> World:
        """Return what the pool holds; raises Died, Refused."""
        found = World()
        found.devices = {device["name"] for device in self.daemon.api.call("GET", "/v1/devices")["devices"]}
        for volume in self.daemon.api.call("GET", "/v1/volumes")["volumes"]:
            found.volumes[volume["name"]] = Volume(bytearray(self._read(volume["name"])))
        for snapshot in self.daemon.api.call("GET", "/v1/snapshots")["snapshots"]:
            content = self._read(f"{snapshot['volume']}@{snapshot['name']}")
            found.volumes[snapshot["volume"]].snapshots[snapshot["name"]] = Snapshot(content)
        return found

    def _read(self, export: str) -> bytes:
        if export in self._sessions:
            return self._sessions[export].read()
        session = self.daemon.session(export)
        try:
            content = session.read()
            session.disconnect()
        finally:
            session.close()
        return content

    def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._stack.close()
