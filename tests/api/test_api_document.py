"""docs/api.md names everything that the API has, and nothing else."""

import re
from pathlib import Path

from blockvirt import errors
from blockvirt.api.app import OPERATIONS
from blockvirt.api.streams import ROUTES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def test_every_operation_is_documented() -> None:
    documented = set(re.findall(r"^\| `((?:GET|POST|PATCH|DELETE) /v1/[^`]+)`", DOCUMENT, re.MULTILINE))
    streams = {f"{method} {path}" for method, path in ROUTES}
    assert documented == {f"{operation.method} {operation.path}" for operation in OPERATIONS} | streams


def test_every_error_is_documented() -> None:
    documented = dict(re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", DOCUMENT, re.MULTILINE))
    tree = {
        kind.code: str(kind.http_status)
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.BlockvirtError)
    }
    assert documented == tree


def test_every_query_parameter_is_documented() -> None:
    for operation in OPERATIONS:
        row = next(line for line in DOCUMENT.splitlines() if f"`{operation.method} {operation.path}`" in line)
        for model in (operation.query, operation.body):
            for name in model.model_fields if model is not None else ():
                assert re.search(rf"`{name}[`=]", row), (row, name)
