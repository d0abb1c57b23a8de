"""The label of a device: which disk this is, and whose. One small JSON file in the device's directory.

``{"checksum": CRC-32C in hex, "device": UUID, "format": 1, "pool": UUID, "created_s": seconds}``; the checksum covers
the canonical JSON of the other fields, and nothing but canonical JSON is a label. Written once, atomically, after
everything else of the device is in place.
"""

import contextlib
import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockvirt.checksum import crc32c
from blockvirt.errors import DeviceFault
from blockvirt.ids import is_id

LABEL_FILE = "blockvirt-device.json"
DEVICE_FORMAT = 1
_MAX_LABEL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class DeviceLabel:
    """What a label says."""

    device: str
    """The device's id."""
    pool: str
    """The id of the pool it belongs to."""
    created_s: float
    format: int = DEVICE_FORMAT


def encode_label(label: DeviceLabel) -> bytes:
    """Return the label file's content."""
    fields = asdict(label)
    return _canonical(fields | {"checksum": f"{crc32c(_canonical(fields)):08x}"}) + b"\n"


def decode_label(content: bytes, path: Path) -> DeviceLabel:
    """Return the label in ``content``, which was read from ``path``; raises DeviceFault if it is damaged or newer."""
    try:
        fields: dict[str, Any] = json.loads(content)
        as_written = _canonical(fields)
        checksum = fields.pop("checksum")
        intact = checksum == f"{crc32c(_canonical(fields)):08x}"
        version = fields["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"it is no label: {error}") from error
    if not intact:
        raise _damaged(path, "its checksum does not match")
    if content.removesuffix(b"\n") != as_written:  # damage that leaves the same numbers: a last digit, white space
        raise _damaged(path, "its bytes are not those of a label that says this")
    if not isinstance(version, int) or version > DEVICE_FORMAT:
        raise DeviceFault(
            f"{path} has device format {version}, this blockvirt knows {DEVICE_FORMAT}",
            correction="use the blockvirt version that wrote it, or a newer one",
            reason="newer-format",
            path=str(path.parent),
        )
    try:
        label = DeviceLabel(**fields)
    except TypeError as error:
        raise _damaged(path, str(error)) from error
    if not is_id(str(label.device)) or not is_id(str(label.pool)):
        raise _damaged(path, "an id in it is no UUID")
    return label


def read_label(directory: Path) -> DeviceLabel | None:
    """Return the label of a directory, None if there is none; raises DeviceFault if it cannot be read or used."""
    path = directory / LABEL_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return decode_label(os.read(fd, _MAX_LABEL_BYTES), path)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(fd)


def write_label(directory: Path, label: DeviceLabel) -> None:
    """Put a label into a directory: all of it or nothing, durable when this returns. Raises OSError."""
    path, draft = directory / LABEL_FILE, directory / f"{LABEL_FILE}.new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            content = encode_label(label)
            if os.write(fd, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
        draft.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def _damaged(path: Path, cause: str) -> DeviceFault:
    return DeviceFault(
        f"the device label {path} is damaged",
        cause=cause,
        correction="check the disk; a copy of the label file from a backup of this device makes it usable again",
        reason="damaged-label",
        path=str(path.parent),
    )


def _unreadable(path: Path, error: OSError) -> DeviceFault:
    return DeviceFault(
        f"the device label {path} cannot be read: {error.strerror}",
        correction="check the disk and the permissions of the directory",
        reason="failed",
        path=str(path.parent),
    )
