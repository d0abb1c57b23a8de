"""Sizes as people write them and as the code keeps them (bytes, always an int).

A size is an integer of bytes, or a string with an unambiguous unit: ``KiB MiB GiB TiB PiB`` are powers of 1024,
``KB MB GB TB PB`` powers of 1000. A bare ``10G`` means 10^9 to some tools and 2^30 to others, so it is refused with
both spellings named.
"""

import re

from blockvirt.errors import InvalidSize

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_LETTERS = "KMGTP"
_BINARY = {f"{letter}iB": 1 << (10 * (power + 1)) for power, letter in enumerate(_LETTERS)}
_DECIMAL: dict[str, int] = {f"{letter}B": 1000 ** (power + 1) for power, letter in enumerate(_LETTERS)}
_UNITS = {"B": 1} | _BINARY | _DECIMAL
_PATTERN = re.compile(r"([0-9]{1,20}) ?([A-Za-z]*)", re.ASCII)


def parse_size(text: str | int) -> int:
    """Return the number of bytes that ``text`` means; raises InvalidSize for anything else than a size.

    Integers are bytes; strings need a unit. Negative numbers, fractions and unknown units are refused.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise InvalidSize(f"{text!r} is not a size", correction="give bytes as an integer, or a string such as '10GiB'")
    if isinstance(text, int):
        if text < 0:
            raise InvalidSize(f"a size cannot be negative: {text}", correction="give a number of bytes above zero")
        return text
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InvalidSize(
            f"{text!r} is not a size", correction="write a whole number and a unit: '512MiB', '10GiB', '2TB'"
        )
    number, unit = int(match[1]), match[2]
    if not unit:
        raise InvalidSize(f"{text!r} has no unit", correction=f"write {number}B for bytes, or a unit: '{number}GiB'")
    if unit in _UNITS:
        return number * _UNITS[unit]
    letter = unit[0].upper()
    if letter in _LETTERS and unit.upper() in (letter, f"{letter}B", f"{letter}IB"):
        raise InvalidSize(
            f"{text!r} could mean two sizes",
            correction=f"write {number}{letter}iB for powers of 1024 or {number}{letter}B for powers of 1000",
        )
    raise InvalidSize(f"unknown unit {unit!r} in {text!r}", correction="use KiB, MiB, GiB, TiB or KB, MB, GB, TB")


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` for people: the largest binary unit, two decimals at most ('1.5GiB', '17B')."""
    for unit, factor in reversed(_BINARY.items()):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f}".rstrip("0").rstrip(".") + unit
    return f"{size_bytes}B"
