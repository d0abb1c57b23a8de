"""The records of the pool's devices, as they come and go: what must hold of them is decided in the transaction."""

from blockvirt.errors import Exists, InUse, LimitReached, NotFound
from blockvirt.limits import MAX_DEVICES
from blockvirt.meta.keys import Table
from blockvirt.meta.records import DeviceRecord, FileRecord
from blockvirt.meta.store import Writer


def enter_device(writer: Writer, wanted: DeviceRecord) -> None:
    """Store the record of a new device; raises Exists for an id, a name or a path that one has, LimitReached."""
    for key, _ in writer.scan(Table.DEVICES):
        member = writer.record(DeviceRecord, Table.DEVICES, key)
        if member is None:
            continue
        if member.name == wanted.name:
            raise Exists(f"there is a device called {member.name} already", correction="choose another name")
        if wanted.id == member.id or wanted.path == member.path:
            raise Exists(f"{wanted.path} is device {member.name} already", correction="nothing is left to do")
    if (devices := writer.count(Table.DEVICES)) >= MAX_DEVICES:
        raise LimitReached(
            f"the pool has {devices} devices already, at most {MAX_DEVICES} are possible",
            correction="remove an empty device first",
        )
    writer.put_record(Table.DEVICES, wanted.id.encode(), wanted)


def leave_device(writer: Writer, device: DeviceRecord) -> None:
    """Delete the record of an empty device; raises NotFound, and InUse for the last one and one that holds files."""
    if writer.get(Table.DEVICES, device.id.encode()) is None:
        raise NotFound(f"device {device.name} is not in the pool any more", correction="see 'blockvirt device list'")
    if writer.count(Table.DEVICES) == 1:
        raise last_device(device)
    for key, _ in writer.scan(Table.FILES):
        file = writer.record(FileRecord, Table.FILES, key)
        if file is not None and file.device_id == device.id:
            raise InUse(
                f"device {device.name} still holds files of volumes",
                correction="delete the volumes on it first ('blockvirt volume show' says where their data lies)",
            )
    writer.delete(Table.DEVICES, device.id.encode())


def last_device(device: DeviceRecord) -> InUse:
    """Return the error of a pool whose only device is to go."""
    return InUse(f"device {device.name} is the last one of the pool", correction="add another device first")
