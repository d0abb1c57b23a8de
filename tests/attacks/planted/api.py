"""Bugs for the attack "api": answers that the document does not have, and chunks that no request gives back."""

from typing import Any

import pytest

from blockvirt.api import operations, problems, wire
from blockvirt.volumes import commit, reclaim
from tests.attacks.planted.bugs import Bug, replacing


def _without_revisions(self: operations.Reply) -> str:
    if isinstance(self.body, str):
        return self.body
    return self.body.model_dump_json(exclude_none=True, exclude={"revision"})


def _release_nothing(patch: pytest.MonkeyPatch) -> None:
    def release(*arguments: Any, **named: Any) -> None:
        return None

    for module in (commit, reclaim):
        patch.setattr(module, "release", release)


BUGS: tuple[Bug, ...] = (
    Bug(
        "errors-that-are-no-problems",
        "errors are sent as any JSON, not as problem documents",
        (),
        "api",
        replacing(problems, "MEDIA_TYPE", "application/json"),  # type: ignore[arg-type]
        count=10,
        seed=1,
    ),
    Bug(
        "answers-without-revisions",
        "what is shown lacks a field that the document requires",
        (),
        "api",
        replacing(operations.Reply, "json", _without_revisions),
        count=400,
        seed=1,
        is_quick=False,
    ),
    Bug(
        "a-filter-cut-at-the-equals-sign",
        "a filter by labels without an equals sign is a mistake of the daemon's",
        (),
        "api",
        replacing(wire.LabelListQuery, "labels", lambda query: dict(each.split("=", 1) for each in query.label)),
        count=400,
        seed=1,
        is_quick=False,
    ),
    Bug(
        "what-is-deleted-keeps-its-chunks",
        "chunks that nothing sees any more are not given back",
        ("I6",),
        "api",
        _release_nothing,
        count=400,
        seed=1,
        is_quick=False,
    ),
)
