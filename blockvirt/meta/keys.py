"""Keys of the metadata store: one table each, big-endian numbers so that LMDB's order is numeric order. Pure."""

import struct
from enum import Enum

_U64 = struct.Struct(">Q")
_U64X2 = struct.Struct(">QQ")
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


POOL_KEY = b"pool"


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
