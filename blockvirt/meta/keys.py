"""Keys of the metadata store: one table each, big-endian numbers so that LMDB's order is numeric order. Pure."""

import struct
from enum import Enum

_U64 = struct.Struct(">Q")
_U64X2 = struct.Struct(">QQ")
_F64 = struct.Struct("<d")
_LEAF = struct.Struct(">QIQ")
_BORN = struct.Struct(">QQI")


class Table(Enum):
    """The named databases of the environment."""

    POOL = b"pool"
    DEVICES = b"devices"  # device id -> DeviceRecord
    VOLUMES = b"volumes"  # volume id -> VolumeRecord
    VOLUME_NAMES = b"volume-names"  # name -> volume id
    BRANCHES = b"branches"  # branch number -> BranchRecord
    FILES = b"files"  # file number -> FileRecord
    BRANCH_FILES = b"branch-files"  # (branch, file number) -> nothing
    LEAVES = b"leaves"  # (branch, leaf number, birth epoch) -> entries
    BORN = b"born"  # (branch, birth epoch, leaf number) -> nothing
    PUNCH = b"punch"  # (file number, first chunk) -> count
    HOSTS = b"hosts"  # host id -> HostRecord
    HOST_NAMES = b"host-names"  # name -> host id
    UNITS = b"units"  # (host id, number) -> UnitRecord
    VOLUME_UNITS = b"volume-units"  # (volume id, host id, number) -> nothing
    IDEMPOTENCY = b"idempotency"  # key -> IdempotencyRecord
    VOLUME_BRANCHES = b"volume-branches"  # (volume id, branch number) -> nothing
    SNAPSHOTS = b"snapshots"  # snapshot id -> SnapshotRecord
    SNAPSHOT_NAMES = b"snapshot-names"  # volume id/name -> snapshot id
    POINTS = b"points"  # (branch, epoch, who) -> nothing: what a branch must keep readable, beside its head
    RECLAIM = b"reclaim"  # (branch, epoch) -> nothing, or a mark: a point that went, what it alone saw is to be freed
    SEALS = b"seals"  # (branch, epoch) -> nothing, or a mark: a snapshot whose chunks have no checksums yet
    CHECKSUMS = b"checksums"  # (file number, chunk number / 512) -> CRC-32C of sealed chunks
    JOBS = b"jobs"  # job id -> JobRecord
    SCHEDULES = b"schedules"  # schedule id -> ScheduleRecord
    SCHEDULE_NAMES = b"schedule-names"  # name -> schedule id
    SCRUBS = b"scrubs"  # job id -> ScrubRecord
    TRASH = b"trash"  # volume id -> when it is purged


MARKED = (Table.RECLAIM, Table.SEALS)
"""Tables whose rows are empty, or hold a mark (``Writer.mark``)."""
MARK_BYTES = 8
VALUELESS = (Table.BRANCH_FILES, Table.BORN, Table.VOLUME_UNITS, Table.VOLUME_BRANCHES, Table.POINTS, *MARKED)
"""Tables whose rows say everything by their keys."""

POOL_KEY = b"pool"


def deadline(time_s: float) -> bytes:
    """Value of a row of the trash: Unix time."""
    return _F64.pack(time_s)


def split_deadline(stored: bytes) -> float | None:
    """Undo ``deadline``; None for a row without one, which another version has written."""
    return float(_F64.unpack(stored)[0]) if len(stored) == _F64.size else None


def shown(key: bytes) -> str:
    """Return a key for people: text where it is text, else hex."""
    as_text = key.decode("latin-1")
    return as_text if as_text.isascii() and as_text.isprintable() else key.hex()


def number_key(number: int) -> bytes:
    """Key of a branch or a file."""
    return _U64.pack(number)


def pair_key(first: int, second: int) -> bytes:
    """Key of (branch, file) and (file, chunk) rows."""
    return _U64X2.pack(first, second)


def split_pair(key: bytes) -> tuple[int, int]:
    """Undo ``pair_key``."""
    first, second = _U64X2.unpack(key)
    return first, second


def leaf_key(branch: int, leaf: int, birth: int) -> bytes:
    """Key of one version of a leaf."""
    return _LEAF.pack(branch, leaf, birth)


def leaf_prefix(branch: int, leaf: int) -> bytes:
    """What the keys of all versions of a leaf begin with."""
    return leaf_key(branch, leaf, 0)[:12]


def split_leaf(key: bytes) -> tuple[int, int, int]:
    """Undo ``leaf_key``: (branch, leaf number, birth epoch)."""
    branch, leaf, birth = _LEAF.unpack(key)
    return branch, leaf, birth


def born_key(branch: int, birth: int, leaf: int) -> bytes:
    """Key that lists a leaf under the epoch it got a version in."""
    return _BORN.pack(branch, birth, leaf)


def unit_key(host_id: str, number: int) -> bytes:
    """Key of a logical unit."""
    return f"{host_id}/{number:08d}".encode()


def volume_unit_key(volume_id: str, host_id: str, number: int) -> bytes:
    """Key that lists a logical unit under its volume."""
    return f"{volume_id}/{host_id}/{number:08d}".encode()


def volume_branch_key(volume_id: str, branch: int) -> bytes:
    """Key that lists a branch under its volume."""
    return f"{volume_id}/{branch:016x}".encode()


def split_volume_branch(key: bytes) -> tuple[str, int]:
    """Undo ``volume_branch_key``."""
    volume_id, _, branch = key.decode().partition("/")
    return volume_id, int(branch, 16)


def snapshot_name_key(volume_id: str, name: str) -> bytes:
    """Key of a snapshot's name: unique within its volume."""
    return f"{volume_id}/{name}".encode()


def snapshot_point_key(branch: int, epoch: int, snapshot_id: str) -> bytes:
    """Key of the point that a snapshot keeps readable."""
    return pair_key(branch, epoch) + b"s" + snapshot_id.encode()


def child_point_key(branch: int, epoch: int, child: int) -> bytes:
    """Key of the point that a branch with its origin there keeps readable."""
    return pair_key(branch, epoch) + b"c" + number_key(child)


def split_point(key: bytes) -> tuple[int, int, str | int]:
    """Undo both: (branch, epoch, id of the snapshot or number of the child branch)."""
    branch, epoch = split_pair(key[:16])
    who = key[17:]
    return branch, epoch, who.decode() if key[16:17] == b"s" else int.from_bytes(who, "big")


def split_born(key: bytes) -> tuple[int, int, int]:
    """Undo ``born_key``: (branch, birth epoch, leaf number)."""
    branch, birth, leaf = _BORN.unpack(key)
    return branch, birth, leaf
