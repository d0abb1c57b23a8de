"""Linux calls that the standard library does not offer: fallocate with modes, the type of a filesystem.

Vocabulary: imports nothing of ours.
ctypes releases the GIL for the time of the call. Each raises OSError with the call's errno.
"""

import ctypes
import os

_KEEP_SIZE = 0x01  # <linux/falloc.h>
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_fstatfs.restype = ctypes.c_int

XFS = 0x58465342
"""``filesystem_type`` of XFS; <linux/magic.h>."""
EXT4 = 0xEF53
"""The same of ext2, ext3 and ext4."""
_STATFS_WORDS = 32  # 120 bytes on x86-64; statfs(2): the first word is f_type


def _call(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != 4:  # EINTR: a signal came, nothing was done
            raise OSError(code, os.strerror(code))


def allocate(fd: int, offset: int, length: int) -> None:
    """Allocate space for a range and extend the file's size over it; the new part reads as zeros."""
    _call(fd, 0, offset, length)


def allocate_keep_size(fd: int, offset: int, length: int) -> None:
    """Allocate space for a range, also behind the end of the file, and leave the size as it is."""
    _call(fd, _KEEP_SIZE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the space of a range back; it reads as zeros."""
    _call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a range read as zeros and keep its space allocated."""
    _call(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def filesystem_type(fd: int) -> int:
    """Return the magic number of the filesystem that an open file is on; statfs(2) lists them."""
    answer = (ctypes.c_long * _STATFS_WORDS)()
    if _fstatfs(fd, ctypes.byref(answer)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer[0]
