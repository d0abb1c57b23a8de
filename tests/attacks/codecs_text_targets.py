"""Targets of the attack "codecs": what people and programs write to the API. See ``codecs_wire_targets``."""

import base64
import importlib
import json
import pkgutil
import typing

from pydantic import ValidationError

from blockvirt import api, ids, units
from blockvirt.api import guards, paging, wire
from blockvirt.errors import InvalidName, InvalidRequest, InvalidSize, MalformedRequest
from blockvirt.limits import API_MAX_JSON_DEPTH, MAX_CRON_CHARS
from blockvirt.snapshots import cron as crons

for _module in pkgutil.iter_modules(api.__path__):
    if _module.name.endswith("models"):
        importlib.import_module(f"blockvirt.api.{_module.name}")

_LISTING = "volumes?"


def _models(cls: type[wire.Request]) -> list[type[wire.Request]]:
    below = [model for child in cls.__subclasses__() for model in _models(child)]
    return ([cls] if cls.model_fields else []) + below


MODELS = sorted(_models(wire.Request), key=lambda model: model.__qualname__)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape" if data[:1] == b"\0" else "replace")


def body(data: bytes) -> None:
    """The first byte: which model the rest is read as, the way a request's body or query is."""
    if not data:
        return
    model, raw = MODELS[data[0] % len(MODELS)], data[1:]
    try:
        if guards.json_depth(raw) > API_MAX_JSON_DEPTH:
            return
        guards._check_keys(raw)
        found = _query(model, raw) if issubclass(model, wire.Query) else model.model_validate_json(raw)
        if isinstance(found, wire.LabelListQuery):
            found.labels()
    except (ValidationError, InvalidRequest, MalformedRequest):
        return
    assert model.model_validate(found.model_dump()) == found, "what was read is what it says"
    found.model_dump_json()


def _query(model: type[wire.Request], raw: bytes) -> wire.Request:
    values: dict[str, object] = {}
    for pair in raw.decode("utf-8", "replace").split("&"):
        name, _, value = pair.partition("=")
        field = model.model_fields.get(name)
        if field is not None and typing.get_origin(field.annotation) is list:
            values[name] = [value]
        else:
            values[name] = value
    return model.model_validate(values)


def body_examples() -> list[bytes]:
    """A body or a query with everything that its model has."""
    found = []
    known = {"size": "1GiB", "labels": {"a": "b"}, "keep": {"daily": 3}, "number": 1, "limit": "5", "volumes": ["v"]}
    for number, model in enumerate(MODELS):
        if issubclass(model, wire.Query):
            text = "&".join(f"{name}={known.get(name, 'true')}" for name in model.model_fields)
        else:
            text = json.dumps({name: known.get(name, "x") for name in model.model_fields})
        found.append(bytes([number]) + text.encode())
        found.append(bytes([number]) + b'{"size":1,"name":"v","volume":"v"}')
    return found


def token(data: bytes) -> None:
    """The first byte: whether the rest is a page token, or the place, in JSON, that one is made of."""
    if not data:
        return
    text = _text(data[1:])
    if data[0] & 1:
        parts = b'["%s",%s]' % (paging._digest(_LISTING).encode(), data[1:])
        text = base64.urlsafe_b64encode(parts).decode().rstrip("=")
    try:
        after = paging.page_after(text, _LISTING)
        after.encode()
        number, _ = paging.place_after(text, _LISTING) or (0.0, "")
        assert isinstance(number, float)
    except InvalidRequest:
        return
    assert paging.page_after(paging.page_token(_LISTING, after), _LISTING) == after, "a token goes on where it says"


def token_examples() -> list[bytes]:
    """Tokens of the list, and of another."""
    names = ("v", "1.5/v", "nan/é", "😀")
    tokens = [b"\0" + paging.page_token(listing, name).encode() for listing in (_LISTING, "jobs?") for name in names]
    return [*tokens, *(b"\1" + json.dumps(name).encode() for name in names)]


def size(data: bytes) -> None:
    """A size, and a name."""
    text = _text(data)
    try:
        size_bytes = units.parse_size(text)
        assert size_bytes >= 0
        assert units.parse_size(f"{size_bytes}B" if size_bytes < 10**20 else "0B") in (size_bytes, 0)
        units.format_size(size_bytes)
    except InvalidSize:
        pass
    try:
        assert ids.check_name(text, what="volume") == text
        assert len(text.encode()) <= 63
    except InvalidName:
        pass
    if ids.is_id(text):
        assert ids.is_id(ids.canonical_id(text))


def size_examples() -> list[bytes]:
    """Sizes, names and an id."""
    return [b"10GiB", b"512 MB", b"0B", b"web-1.disk_0", b"6f1a3e1c-7d1b-4a52-9d1e-0123456789ab"]


def cron(data: bytes) -> None:
    """A cron expression; what is one is due again and again."""
    text = _text(data[: 2 * MAX_CRON_CHARS])
    try:
        checked = crons.check_cron(text)
    except InvalidRequest:
        return
    assert crons.check_cron(checked) == checked
    after_s = 1_700_000_000.0
    due_s = crons.next_runs_s(checked, after_s, 2)
    assert len(due_s) == 2
    assert after_s < due_s[0] < due_s[1]
    assert crons.runs_between(checked, after_s, due_s[0], 5) == due_s[:1], "a run is due from both sides"


def cron_examples() -> list[bytes]:
    """Cron expressions."""
    return [b"30 2 * * MON-FRI", b"*/5 * * * *", b"0 0 L * *", b"0 0 29 2 *", b"1,2 3-4 1 JAN MON#1"]
