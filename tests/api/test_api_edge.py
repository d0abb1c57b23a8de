"""The edge: what is refused before a handler runs, what every error looks like, where the server listens."""

import asyncio
import gzip
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openapi_spec_validator import validate

from blockvirt.api import app, guards
from blockvirt.api.app import OPERATIONS
from blockvirt.api.guards import json_depth
from blockvirt.api.openapi import document
from blockvirt.api.server import ApiServer
from blockvirt.errors import InUse, InvalidRequest
from blockvirt.limits import API_MAX_BODY_BYTES, API_MAX_JSON_DEPTH
from tests.api.conftest import Api

JSON = {"Content-Type": "application/json"}


def check_problem(answer: Any) -> None:
    """Every error is a whole problem document."""
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    problem = answer.json
    assert problem["status"] == answer.status
    assert problem["type"] == f"urn:blockvirt:problem:{problem['code']}"
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert {"title", "detail", "instance", "retryable"} <= problem.keys()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"null", 422),
        (b"\xff\xfe", 422),
        (b'{"size": 1, "colour": "red"}', 422),
        (b'{"size": 1, "name": 5}', 422),
        (b'{"size": 1, "labels": {"a": 1}}', 422),
        (b'{"size": 1, "labels": []}', 422),
        (b'{"size": 1, "name": "\\ud800"}', 422),
        (b'{"size": ' + b"9" * 5000 + b"}", 422),
        (b'{"size": 1, "labels": ' + b"[" * 5000 + b"]" * 5000 + b"}", 422),
        (b"[" * 60000, 422),
        (b'{"size": 1, "name": "' + b"x" * API_MAX_BODY_BYTES + b'"}', 413),
    ],
)
async def test_bodies_that_are_refused(api: Api, data: bytes, status: int) -> None:
    refused = await api.call("POST", "/v1/volumes", data=data, headers=JSON)
    assert refused.status == status
    check_problem(refused)
    assert (await api.call("GET", "/v1/volumes")).json == {"volumes": []}


async def test_depth_is_refused_before_anything_parses_it(api: Api) -> None:
    for depth, refused in ((API_MAX_JSON_DEPTH - 1, False), (API_MAX_JSON_DEPTH, True)):
        data = b'{"size": 1, "labels": ' + b"[" * depth + b"]" * depth + b"}"
        answer = await api.call("POST", "/v1/volumes", data=data, headers=JSON)
        assert ("nests deeper" in answer.json["detail"]) == refused


async def test_wrong_fields_are_pointed_at(api: Api) -> None:
    refused = await api.call("POST", "/v1/volumes", {"size": 1, "labels": {"a/b": 1}, "colour": "red"})
    assert {error["pointer"] for error in refused.json["errors"]} == {"/labels/a~1b", "/colour"}


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
async def test_only_json_is_taken(api: Api, kind: str | None, tcp: bool) -> None:
    headers = {"Content-Type": kind} if kind else {}
    refused = await api.call("POST", "/v1/volumes", data=b'{"size": 512}', headers=headers, tcp=tcp)
    assert (refused.status, refused.json["code"]) == (415, "unsupported-media-type")
    check_problem(refused)


@pytest.mark.parametrize("charset", ["utf-16", "utf-16le", "utf-32", "iso-8859-1", "us-ascii", "unheard-of"])
async def test_json_in_another_charset_is_not_taken(api: Api, charset: str) -> None:
    data = '{"size": 512}'.encode(charset if charset.startswith("utf") else "ascii")
    headers = {"Content-Type": f"application/json; charset={charset}"}
    refused = await api.call("POST", "/v1/volumes", data=data, headers=headers)
    assert (refused.status, refused.json["code"]) == (415, "unsupported-media-type")
    check_problem(refused)
    assert "UTF-8" in refused.json["correction"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf-8"', "utf8"])
async def test_utf_8_may_be_named(api: Api, charset: str) -> None:
    headers = {"Content-Type": f"application/json; charset={charset}"}
    made = await api.call("POST", "/v1/volumes", data='{"size":512,"labels":{"ä":"ü"}}'.encode(), headers=headers)
    assert (made.status, made.json["labels"]) == (201, {"ä": "ü"})


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (b'{"size": 512, "size": 1024}', "size"),
        (b'{"size": 512, "s\\u0069ze": 512}', "size"),
        (b'{"size": ' + b"9" * 5000 + b', "size": 512}', "size"),
        (b'{"size": NaN, "size": 512}', "size"),
        (b'{"size": 512, "labels": {"a": "1", "a": "1"}}', "a"),
        (b'{"size": 512, "placement": {"devices": [], "labels": {"x": "1", "x": "2"}}}', "x"),
    ],
)
async def test_a_key_that_is_there_twice_is_refused(api: Api, data: bytes, key: str) -> None:
    refused = await api.call("POST", "/v1/volumes", data=data, headers=JSON)
    assert (refused.status, refused.json["code"]) == (400, "malformed-request")
    assert repr(key) in refused.json["detail"]
    check_problem(refused)
    assert (await api.call("GET", "/v1/volumes")).json == {"volumes": []}


async def test_a_key_may_come_again_in_another_object(api: Api) -> None:
    body = {"size": 512, "labels": {"labels": "size"}, "placement": {"devices": [], "labels": {}}}
    assert (await api.call("POST", "/v1/volumes", body)).status == 201


@pytest.mark.parametrize("bad", ["\0", "a\nb", "\x1b[31m", "\x7f", "\x85"])
@pytest.mark.parametrize("where", ["key", "value"])
async def test_labels_hold_no_control_characters(api: Api, bad: str, where: str) -> None:
    labels = {bad: "x"} if where == "key" else {"x": bad}
    volume = (await api.call("POST", "/v1/volumes", {"size": 512})).json
    for method, path, body in (
        ("POST", "/v1/volumes", {"size": 512}),
        ("PATCH", f"/v1/volumes/{volume['id']}", {}),
        ("POST", "/v1/hosts", {"name": "h"}),
        ("POST", "/v1/devices", {"path": "/x"}),
    ):
        refused = await api.call(method, path, body | {"labels": labels})
        assert (refused.status, refused.json["code"]) == (422, "invalid-argument"), path
        assert "control character" in refused.json["cause"]
    refused = await api.call("POST", "/v1/volumes", {"size": 512, "placement": {"labels": labels}})
    assert refused.status == 422
    assert "control character" in refused.json["cause"]


@pytest.mark.parametrize("data", [gzip.compress(b'{"size": 512}', mtime=0), b"\x1f\x8b no gzip", b'{"size": 512}'])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "unheard-of"])
async def test_compressed_bodies_are_not_taken(api: Api, data: bytes, coding: str) -> None:
    refused = await api.call("POST", "/v1/volumes", data=data, headers=JSON | {"Content-Encoding": coding})
    assert (refused.status, refused.json["code"]) == (415, "unsupported-media-type")
    check_problem(refused)
    assert "Content-Encoding" in refused.json["correction"]


@pytest.mark.parametrize("ending", [b"Content-Length: 9\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel"])
async def test_a_body_that_never_ends_is_not_waited_for(
    api: Api, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    monkeypatch.setattr(guards, "API_BODY_S", 0.05)
    reader, writer = await asyncio.open_unix_connection(str(api.unix_path))
    writer.write(b"POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + ending)
    answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert b"did not arrive" in answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8470"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.0.1"},
        {"Host": "[::2]"},
        {"Host": "127.0.0.1:80:80"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
    ],
)
async def test_foreign_sites_are_refused_on_tcp(api: Api, headers: dict[str, str]) -> None:
    refused = await api.call("GET", "/v1/volumes", headers=headers, tcp=True)
    assert (refused.status, refused.json["code"]) == (403, "foreign-origin")
    check_problem(refused)
    assert (await api.call("POST", "/v1/volumes", {"size": 512}, headers=headers, tcp=True)).status == 403
    assert (await api.call("GET", "/v1/volumes", headers=headers)).status == 200, "the unix socket knows no browser"


async def test_our_own_names_are_served_on_tcp(api: Api) -> None:
    port = api.server.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert (await api.call("GET", "/v1/volumes", headers={"Host": host}, tcp=True)).status == 200
        own = {"Host": host, "Origin": f"http://{host}"}
        assert (await api.call("GET", "/v1/volumes", headers=own, tcp=True)).status == 200


async def test_what_is_not_there(api: Api) -> None:
    missing = await api.call("GET", "/v2/x")
    assert (missing.status, missing.json["code"]) == (404, "not-found")
    check_problem(missing)
    wrong = await api.call("PUT", "/v1/volumes")
    assert (wrong.status, wrong.json["code"]) == (405, "method-not-allowed")
    assert "POST" in wrong.headers["Allow"]
    check_problem(wrong)
    assert (await api.call("GET", "/v1/pool?x=1")).status == 422
    assert (await api.call("GET", "/v1/volumes?limit=1&limit=2")).status == 422
    assert (await api.call("GET", "/v1/pool", data=b"{}", headers=JSON)).status == 422
    for name in ("%2e%2e", "a%2Fb", "%00", "%ff", "x" * 3000, "9d9c0b2c-73a5-4f5d-9d0c-3f2b7d0e4a11"):
        answer = await api.call("GET", f"/v1/volumes/{name}")
        assert answer.status == 404, name
        check_problem(answer)


async def test_too_many_at_once_are_sent_away(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "API_MAX_REQUESTS", 1)
    held = asyncio.Event()
    entered = asyncio.Event()

    async def slow(path: str, *rest: object) -> None:
        entered.set()
        await held.wait()
        raise InUse("done")

    monkeypatch.setattr(api.services.devices, "add", slow)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(api.call("POST", "/v1/devices", {"path": "/x"}))
        await entered.wait()
        refused = await api.call("GET", "/v1/volumes")
        held.set()
    assert (refused.status, refused.json["code"], refused.headers["Retry-After"]) == (503, "overloaded", "1")
    assert first.result().status == 409
    assert (await api.call("GET", "/v1/volumes")).status == 200


async def test_our_mistakes_are_problems_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api.services.space, "status", broken)
    failed = await api.call("GET", "/v1/pool")
    assert (failed.status, failed.json["code"]) == (500, "internal")
    assert "Zero" not in failed.raw.decode()
    check_problem(failed)


async def test_health_and_metrics(api: Api) -> None:
    assert (await api.call("GET", "/healthz")).json == {"status": "ok"}
    assert (await api.call("GET", "/readyz")).status == 200
    api.not_ready.append("starting: 3 volumes to recover")
    waiting = await api.call("GET", "/readyz")
    assert (waiting.status, waiting.json["status"]) == (503, "starting")
    api.not_ready[0] = "stopping"
    assert (await api.call("GET", "/readyz")).json["status"] == "stopping"
    api.not_ready[0] = "metadata: the store has failed"
    assert (await api.call("GET", "/readyz")).json == {"status": "failed", "reason": api.not_ready[0]}
    metrics = await api.call("GET", "/metrics")
    assert metrics.raw == b"blockvirt_up 1\n"
    assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")


def test_depth_counts_brackets_outside_strings() -> None:
    assert json_depth(b'{"a": [1, {"b": "[[[[\\"[["}]}') == 3
    assert json_depth(b"[" * 100) == 100
    assert json_depth(b'"' + b"[" * 100) == 100, "an open string is no string: better too deep than too trusting"
    assert json_depth(b"[]" * 100) == 1
    assert API_MAX_JSON_DEPTH >= 3, "the deepest legal request"


# --- the document ----------------------------------------------------------------------------------------------------


async def test_the_openapi_document_describes_what_is_served(api: Api) -> None:
    served = (await api.call("GET", "/v1/openapi.json")).json
    assert served["openapi"].startswith("3.1")
    assert served == json.loads(json.dumps(document(OPERATIONS, served["info"]["version"])))
    described = {(method.upper(), path) for path, item in served["paths"].items() for method in item}
    routes = {
        (route.method, route.resource.canonical)
        for route in api.server.application.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert described == {(method, path) for method, path in routes if path.startswith("/v1/")} - {
        ("GET", "/v1/openapi.json")
    }


def test_the_openapi_document_is_valid() -> None:
    validate(document(OPERATIONS, "1"))


def test_every_reference_of_the_document_leads_somewhere() -> None:
    whole = document(OPERATIONS, "1")
    schemas = whole["components"]["schemas"]
    references: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            references.extend(value for key, value in node.items() if key == "$ref")
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(whole)
    assert references
    names = {reference.removeprefix("#/components/schemas/") for reference in references}
    assert names == set(schemas)
    identifiers = [operation["operationId"] for item in whole["paths"].values() for operation in item.values()]
    assert len(identifiers) == len(set(identifiers))
    for path, item in whole["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            placeholders = {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert {p["name"] for p in operation["parameters"] if p["in"] == "path"} == placeholders


# --- listening -------------------------------------------------------------------------------------------------------


async def test_the_unix_socket_is_its_owners_alone(api: Api) -> None:
    status = os.stat(api.unix_path)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600


async def test_the_socket_file_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    first = ApiServer(web.Application(), str(path))
    await first.start()
    second = ApiServer(web.Application(), str(path))
    with pytest.raises(InUse, match="another process"):
        await second.start()
    assert path.exists(), "the one that failed to start leaves the other's socket"
    await first.stop()
    assert not path.exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org", "", "127.0.0.1.example.org"])
def test_other_addresses_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidRequest, match="refused to listen") as caught:
        ApiServer(web.Application(), str(tmp_path / "s"), host, 0)
    assert "later release" in caught.value.correction


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = ApiServer(web.Application(), str(tmp_path / "s"), "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(InUse, match="cannot listen on"):
            await server.start()
    assert not (tmp_path / "s").exists()
