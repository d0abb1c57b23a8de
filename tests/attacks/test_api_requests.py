"""Where the requests of the attack "api" may reach, and what becomes of them."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.attacks.api_requests import aim


def aimed(seed: int = 0, **parts: Any) -> Any:
    case = SimpleNamespace(**({"path_parameters": None, "query": None, "body": None} | parts))
    aim(cast("Any", case), random.Random(seed), ["job"], Path("/attack"))
    return case


@pytest.mark.parametrize("path", ["/", "/etc", "/../../etc", "relative", "/a/../..", "..", "/\0", "/" * 5000, ""])
def test_a_device_is_a_directory_of_the_attack(path: str) -> None:
    for seed in range(10):
        found = Path(aimed(seed, body={"path": path}).body["path"])
        assert found.parent == Path("/attack")
        assert found.name not in ("", ".", "..")


def test_nobody_waits_long_for_a_job() -> None:
    assert float(aimed(query={"wait_s": 59.5}).query["wait_s"]) < 1
    assert aimed(query={"wait_s": "x"}).query["wait_s"] == "x"


def test_most_requests_name_what_is_there_and_some_do_not() -> None:
    found = {aimed(seed, path_parameters={"volume": "?"}).path_parameters["volume"] for seed in range(40)}
    assert {"v0", "v1", "?"} <= found
    assert {aimed(seed, path_parameters={"job": "?"}).path_parameters["job"] for seed in range(40)} == {"job", "?"}
