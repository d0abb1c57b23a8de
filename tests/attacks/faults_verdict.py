"""What a pool holds after faults, seen through a fresh engine on a disk that works, against the model."""

import asyncio
from dataclasses import dataclass, field

from blockvirt import check
from blockvirt.device import read_one
from blockvirt.errors import BlockvirtError, NotFound, VolumeStopped
from blockvirt.meta.copies import newest_intact, remembered_folders
from blockvirt.volumes.job_states import FINISHED
from tests.attacks.faults_attempts import SIZE_BYTES, read_all
from tests.attacks.faults_model import Expected, differences, values
from tests.attacks.faults_pool import AttackedPool


@dataclass(slots=True)
class Verdict:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    blocks: int = 0
    """That were compared."""
    leaks: bool = False
    """Leaks, and nothing worse, were found before they were deleted with their volumes."""


async def judge(pool: AttackedPool, expected: Expected, *, power_was_cut: bool, may_not_leak: bool = False) -> Verdict:
    """Start the pool, compare it, prove it, delete everything, and prove that all space came back."""
    verdict = Verdict()
    try:
        await asyncio.wait_for(_judge(pool, expected, verdict, power_was_cut, may_not_leak), 30)
    except (BlockvirtError, OSError, TimeoutError) as error:
        verdict.problems.append(f"the pool cannot be worked with although its disk works again: {error!r}")
    return verdict


async def _judge(
    pool: AttackedPool, expected: Expected, verdict: Verdict, power_was_cut: bool, may_not_leak: bool
) -> None:
    if expected.volumes:  # else there may be no pool at all
        report = check.run(pool.state_dir, repair=False, restore_metadata=False)
    if expected.volumes and report.exit_code == check.CORRUPT:
        verdict.problems.append(f"check before recovery: {report.summary}: {report.findings[0]}")
    await pool.start()
    for name in expected.volumes:
        await _volume(pool, expected, verdict, name, power_was_cut)
    for path in expected.snapshots:
        await _snapshot(pool, expected, verdict, path)
    await pool.close()
    report = check.run(pool.state_dir, repair=False, restore_metadata=False, data=True)
    verdict.leaks = report.exit_code == check.LEAKS
    if report.exit_code not in (check.CLEAN, check.LEAKS):
        verdict.problems.append(f"check: {report.summary}: {report.findings[0]}")
    verdict.problems += _copies(pool, expected)
    if verdict.leaks and may_not_leak:
        verdict.problems.append(f"leaks though nothing crashed: {report.findings[0]}")
    await pool.start()
    await _empty(pool, verdict)
    await pool.close()
    report = check.run(pool.state_dir, repair=False, restore_metadata=False)
    if report.exit_code != check.CLEAN:
        verdict.problems.append(f"check of the emptied pool: {report.summary}: {report.findings[0]}")


async def _volume(pool: AttackedPool, expected: Expected, verdict: Verdict, name: str, power_was_cut: bool) -> None:
    try:
        volume = pool.catalogue.get(name)
    except NotFound:
        if name not in expected.uncertain:
            verdict.problems.append(f"volume {name} is gone")
        return
    may_be_cut = power_was_cut or name in expected.stopped or volume.state == "stopped"
    if volume.state == "stopped":
        await pool.catalogue.reopen(name)
    try:
        handle = await pool.open(volume.id)
    except VolumeStopped:  # only the note in its journal says so
        may_be_cut = True
        await pool.catalogue.reopen(name)
        handle = await pool.open(volume.id)
    blocks = expected.volumes[name]
    found = await read_all(handle)
    await handle.close()
    verdict.blocks += len(found)
    wrong = differences(found, blocks.allowed_after_cut() if may_be_cut else blocks.allowed())
    if wrong:
        kept = "what was flushed" if may_be_cut else "what was answered"
        verdict.problems.append(f"{name} must hold {kept}: {wrong}")


async def _snapshot(pool: AttackedPool, expected: Expected, verdict: Verdict, path: str) -> None:
    try:
        record = pool.snapshots.find(path)
    except NotFound:
        if path not in expected.uncertain:
            verdict.problems.append(f"snapshot {path} is gone")
        return
    handle = pool.readers.open(record, f"judge of {path}")
    try:
        buffer = bytearray(SIZE_BYTES)
        await read_one(handle, 0, memoryview(buffer))
    finally:
        await handle.close()
    found = values(buffer)
    verdict.blocks += len(found)
    if wrong := differences(found, expected.snapshots[path]):
        verdict.problems.append(f"snapshot {path} must hold what was answered before it: {wrong}")


def _copies(pool: AttackedPool, expected: Expected) -> list[str]:
    """Of the metadata: the newest that was answered must be there and intact, whatever came of later ones."""
    problems = []
    for folder, created_ms in expected.copies.items():
        newest = newest_intact([folder])
        if newest is None or newest.created_ms < created_ms:
            problems.append(f"no copy of the metadata in {folder} is intact and as new as the last that was made")
    if missing := set(expected.copy_folders) - set(remembered_folders(pool.state_dir)):
        problems.append(f"that copies of the metadata lie in {missing} was noted, and is not there")
    return problems


async def _empty(pool: AttackedPool, verdict: Verdict) -> None:
    for job in pool.engine.jobs.list(state="failed"):  # they are tried again by themselves, but not so soon
        if (job := await pool.engine.jobs.finished((await pool.engine.jobs.resume(job.id)).id)).state != "done":
            verdict.problems.append(f"the {job.kind} goes on failing though the disk works: {job.error}")
    for job in pool.engine.jobs.list():  # what was interrupted goes on
        await pool.engine.jobs.finished(job.id)
    for volume in (await pool.catalogue.list()).volumes:
        deletion = await pool.catalogue.delete(volume.name, force=True, purge=True)
        job = await pool.engine.jobs.finished(deletion.job_id)
        if job.state != "done":
            verdict.problems.append(f"the purge of {volume.name} ended as {job.state}: {job.error}")
    while left := [job for job in pool.engine.jobs.list() if job.state not in FINISHED]:  # what a purge has queued
        await pool.engine.jobs.finished(left[0].id)
    await pool.punch()
    if used_bytes := pool.engine.storage.status().used_bytes:
        verdict.problems.append(f"{used_bytes} bytes are in use where nothing is left")
