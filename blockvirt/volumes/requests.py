"""What may be asked of the catalogue: the requests, and the checks of their form that need no transaction."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from blockvirt.errors import InvalidRequest, InvalidSize, LimitReached, NotFound
from blockvirt.limits import MAX_LABEL_CHARS, MAX_LABELS, MAX_VOLUME_BYTES, SECTOR_BYTES
from blockvirt.meta.keys import Table
from blockvirt.meta.records import DeviceRecord
from blockvirt.meta.store import Reader
from blockvirt.units import format_size

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc


@dataclass(frozen=True, slots=True)
class NewVolume:
    """A volume to create; a size is enough."""

    size_bytes: int
    name: str | None = None
    """None: a name is made up, ``vol-`` and 8 hexadecimal digits."""
    labels: Mapping[str, str] = field(default_factory=dict)
    placement_devices: tuple[str, ...] = ()
    placement_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VolumeChange:
    """What to change of a volume; None leaves a thing as it is. Labels are replaced as a whole."""

    name: str | None = None
    size_bytes: int | None = None
    labels: Mapping[str, str] | None = None


def max_volume_bytes(chunk_bytes: int) -> int:
    """Return how large a volume may be in a pool of such chunks: their numbers have 32 bits in the journal."""
    return min(MAX_VOLUME_BYTES, chunk_bytes << 32)


def round_size(size_bytes: int, chunk_bytes: int) -> int:
    """Return ``size_bytes`` rounded up to whole sectors; raises InvalidSize for 0 and for more than is possible."""
    most_bytes = max_volume_bytes(chunk_bytes)
    if size_bytes <= 0:
        raise InvalidSize(
            f"a volume cannot have {size_bytes} bytes", correction=f"ask for {SECTOR_BYTES} bytes or more"
        )
    if size_bytes > most_bytes:
        raise InvalidSize(
            f"a volume cannot have {size_bytes} bytes",
            cause=f"a volume has at most {most_bytes} bytes ({format_size(most_bytes)})",
            correction="ask for less, or for several volumes",
            would_fit_bytes=most_bytes,
        )
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


def check_labels(labels: Mapping[str, str]) -> None:
    """Return if ``labels`` are few, short and printable enough; raises LimitReached or InvalidRequest."""
    if len(labels) > MAX_LABELS:
        raise LimitReached(f"{len(labels)} labels are too many", correction=f"give at most {MAX_LABELS}")
    for key, value in labels.items():
        if not key or len(key) > MAX_LABEL_CHARS or len(value) > MAX_LABEL_CHARS:
            raise InvalidRequest(
                f"the label {key[:40]!r} cannot be kept",
                correction=f"keys have 1 to {MAX_LABEL_CHARS} characters, values at most {MAX_LABEL_CHARS}",
            )
        if _CONTROL.search(key) or _CONTROL.search(value):
            raise InvalidRequest(
                f"the label {key[:40]!r} cannot be kept",
                cause="a control character in it would cut or forge the lines that show it",
                correction="leave out U+0000 to U+001F and U+007F to U+009F",
            )


def check_placement(reader: Reader, devices: tuple[str, ...], labels: Mapping[str, str]) -> None:
    """Return if some device of the pool satisfies the placement; raises NotFound or InvalidRequest."""
    if not devices and not labels:
        return
    check_labels(labels)
    known = {}
    for key, _ in reader.scan(Table.DEVICES):
        record = reader.record(DeviceRecord, Table.DEVICES, key)
        if record is not None:
            known[record.name] = record
    for name in devices:
        if name not in known:
            raise NotFound(
                f"the pool has no device {name!r}", correction=f"its devices are: {', '.join(sorted(known))}"
            )
    candidates = [known[name] for name in devices] if devices else list(known.values())
    if not any(labels.items() <= record.labels.items() for record in candidates):
        raise InvalidRequest(
            f"no device carries the labels {dict(labels)}",
            correction="see the labels of the devices with 'blockvirt device list -o json'",
        )
