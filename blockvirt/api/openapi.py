"""The OpenAPI 3.1 document, generated from the operations and their models; streams describe themselves."""

import inspect
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from blockvirt.api.models import Problem
from blockvirt.api.operations import Operation
from blockvirt.api.problems import MEDIA_TYPE
from blockvirt.api.streams import describe

_REFERENCE = "#/components/schemas/{model}"
# What any request may meet: a foreign origin, a bad request, our own mistake, a daemon that starts or stops.
COMMON_ERRORS = (403, 422, 500, 503)


def document(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """Return the whole document."""
    schemas, components = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    describe(paths)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "blockvirt",
            "version": version,
            "summary": "Thin volumes for virtual machines: allocated here, served over NBD.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _schemas(operations: Sequence[Operation]) -> tuple[dict[tuple[type[BaseModel], str], Any], dict[str, Any]]:
    wanted: dict[tuple[type[BaseModel], str], None] = {(Problem, "serialization"): None}
    for operation in operations:
        wanted |= dict.fromkeys((model, "serialization") for model in operation.answers.values())
        wanted |= dict.fromkeys((model, "validation") for model in (operation.query, operation.body) if model)
    schemas, definitions = models_json_schema(list(wanted), ref_template=_REFERENCE)  # type: ignore[arg-type]
    components = definitions["$defs"]
    for operation in operations:
        if operation.query is not None:
            components.pop(operation.query.__name__, None)  # shown as parameters instead
    return schemas, components  # type: ignore[return-value]


def _operation(operation: Operation, schemas: dict[tuple[type[BaseModel], str], Any]) -> dict[str, Any]:
    summary, _, description = (inspect.getdoc(operation.handler) or "").partition("\n\n")
    described: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": " ".join(summary.split()).rstrip("."),
        "tags": [operation.tag],
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
    }
    if description:
        described["description"] = " ".join(description.split())
    if operation.body is not None:
        schema = schemas[(operation.body, "validation")]
        content = {"application/json": {"schema": schema}}
        described["requestBody"] = {"required": operation.needs_body, "content": content}
    return described


def _responses(operation: Operation, schemas: dict[tuple[type[BaseModel], str], Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, model in operation.answers.items():
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": schemas[(model, "serialization")]}},
        }
    errors = {*operation.errors, *COMMON_ERRORS}
    if operation.body is not None:
        errors |= {413, 415}
    if operation.idempotent:
        errors |= {409}
    problem = {MEDIA_TYPE: {"schema": schemas[(Problem, "serialization")]}}
    for status in sorted(errors):
        responses.setdefault(str(status), {"description": HTTPStatus(status).phrase, "content": problem})
    return responses


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name, kind in operation.path_parameters.items():
        schema = {"type": "integer", "minimum": 0} if kind is int else {"type": "string"}
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    if operation.query is not None:
        described = operation.query.model_json_schema()
        for name, schema in described["properties"].items():
            parameter = {"name": name, "in": "query", "required": name in described.get("required", ())}
            if text := schema.pop("description", None):
                parameter["description"] = text
            parameters.append(parameter | {"schema": schema})
    if operation.idempotent:
        parameters.append(
            _header("Idempotency-Key", "Makes a repeated request answer as the first one did, for 24 hours.")
        )
    if operation.conditional:
        parameters.append(_header("If-Match", "The ETag that the change is meant for; 412 if it is another by now."))
    return parameters


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}
