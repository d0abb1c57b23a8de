"""LMDB's errors in our words: what happened to the metadata store, and what to do."""

import errno
from pathlib import Path

from blockvirt.errors import BlockvirtError, MetadataFault, PoolFull

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
CUT_SHORT = (*NO_SPACE, errno.EIO)  # what a commit says on a full filesystem


def errno_of(error: BaseException) -> int | None:
    """Return the system's error number in an LMDB error; None for LMDB's own codes, which are negative."""
    code = getattr(error, "code", None)
    return code if isinstance(code, int) and code > 0 else None


def no_room(path: Path, cause: str) -> PoolFull:
    """Return what a change gets that finds no space, while the store as such is well."""
    return PoolFull(
        f"the metadata store {path} has no room for the change",
        cause=cause,
        correction="free space on the filesystem of the state directory; deleting volumes helps too",
        path=str(path),
    )


def cannot_open(path: Path, error: BaseException) -> BlockvirtError:
    """Return why the environment in directory ``path`` cannot be opened."""
    code = error.errno if isinstance(error, OSError) else errno_of(error)
    if code in NO_SPACE:
        return no_room(path, str(error))
    return MetadataFault(
        f"the metadata store {path} cannot be opened",
        cause=str(error),
        correction="run 'blockvirt check'; 'blockvirt check --restore-metadata' brings back the newest intact copy",
        path=str(path),
    )


def unreadable(path: Path, error: BaseException) -> MetadataFault:
    """Return what a reader gets that met a page LMDB cannot make sense of."""
    return MetadataFault(
        f"the metadata store {path} cannot be read",
        cause=str(error),
        correction="stop the daemon and run 'blockvirt check'",
        path=str(path),
    )


def stopped(path: Path, cause: str) -> MetadataFault:
    """Return what everybody gets after the store has failed (I7)."""
    return MetadataFault(
        f"the metadata store {path} has failed and is stopped",
        cause=cause,
        correction="look at the disk's health, then restart the daemon: it recovers from what is on disk",
        path=str(path),
    )
