"""Names and ids: what a name may look like, and how the two are told apart."""

import re
import uuid

from blockvirt.errors import InvalidName

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.ASCII)


def new_id() -> str:
    """Return a fresh random id (UUID version 4, lower case, with hyphens). Never reused."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """Tell whether ``text`` has the shape of an id, with or without hyphens."""
    return _UUID.fullmatch(text) is not None


def canonical_id(text: str) -> str:
    """Return an id, which ``is_id`` has recognised, as it is stored: with hyphens."""
    return str(uuid.UUID(text))


def check_name(name: str, *, what: str) -> str:
    """Return ``name`` if a volume, host or device may be called so; raises InvalidName otherwise.

    Names are ``[a-z0-9][a-z0-9._-]{0,62}`` and never shaped like a UUID, so that "id or name" is never ambiguous.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidName(
            f"{name[:80]!r} cannot be the name of a {what}",
            correction="use 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit",
        )
    if is_id(name):
        raise InvalidName(
            f"{name!r} cannot be the name of a {what}: it looks like an id",
            correction="choose a name that is not a UUID",
        )
    return name
