"""Making the journal of a volume, when its first map change needs one. A volume that is only read has none."""

import errno

from blockvirt.errors import DeviceFault, PoolFull
from blockvirt.limits import JOURNAL_FILE_BYTES, NBD_MAX_PAYLOAD_BYTES
from blockvirt.volumes.journal import Journal, JournalHeader, smallest_file_bytes
from blockvirt.volumes.volume import Volume


async def open_journal(volume: Volume) -> None:
    """Give the volume a journal, on the device of its first backing file if it has one; raises PoolFull, DeviceFault.

    In a full pool it is a small one, taken from the reserve of the device: trims need a journal too, and they are what
    makes room again (I10).
    """
    context = volume.context
    device_id = _device_for(volume)
    known = volume.files.device_ids | {device_id}
    identities = {each: context.storage.identity_of(each) for each in known}
    header = JournalHeader(context.pool_id, volume.map.branch, identities)
    folder = context.storage.path_of(device_id)
    try:
        context.storage.admit(device_id, 2 * JOURNAL_FILE_BYTES)
        file_bytes = JOURNAL_FILE_BYTES
    except PoolFull:
        # Large enough for the most scattered request: each of its chunks a change of its own.
        file_bytes = smallest_file_bytes(NBD_MAX_PAYLOAD_BYTES // volume.chunk_bytes + 2)
    try:
        journal = await context.threads.run(lambda: Journal.create(folder, header, volume.branch_record, file_bytes))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise DeviceFault(
                f"no journal of volume {volume.record.name} can be made on {folder}: {error.strerror}",
                correction="check the device's mount and its kernel messages",
            ) from error
        raise PoolFull(
            f"no room for the journal of volume {volume.record.name} on {folder}",
            cause=f"it needs {2 * file_bytes} bytes and the filesystem is full",
            correction="free space on that filesystem, or add a device",
        ) from error
    volume.journal = journal


def _device_for(volume: Volume) -> str:
    """Return where the journal goes. A clone that only drops chunks of its origin has no file of its own yet."""
    storage = volume.context.storage
    for _, record in sorted(volume.files.records.items()):
        return record.device_id
    try:
        return storage.place(volume.record, 2 * JOURNAL_FILE_BYTES)
    except PoolFull:
        for device_id in storage.paths():  # the small journal comes out of any device's reserve
            return device_id
        raise
