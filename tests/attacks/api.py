"""Requests made from the OpenAPI document of a real daemon: each answer is one that the document has.

Schemathesis makes them, ten of one operation at a time, such as fit the document and others; then most are aimed
at volumes, snapshots, hosts, schedules and jobs that are there. No answer may be a mistake of the daemon's; status,
content type and body must be as documented, an error a problem document. Its log has no traceback, it serves in the
end, and its pool is sound.
"""

import asyncio
import json
import random
import re
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import requests
import schemathesis
from schemathesis import Case
from schemathesis.core.failures import FailureGroup
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from blockvirt.nbd.client import NbdClient, NbdClientError
from tests.attacks.api_requests import SNAPSHOTS, VOLUMES, aim, cases_of
from tests.attacks.attack import Attack, Budget, Level, Outcome
from tests.attacks.sessions_daemon import FuzzedDaemon
from tests.real.process import ServerFailed

PROBLEM = "application/problem+json"  # not the daemon's own constant: it may be what is wrong
AT_ONCE = 10
"""Requests of one operation that follow one another."""
_REFILL = 50
_ANSWER_S = 10.0
_JOBS_S = 30.0
_EXPECTED_5XX = (503, 507)  # not now, and no room: docs/api.md
_ENOUGH = 200
_WRITTEN_BYTES = 256 << 10
_CHECKS = (
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
)


class Target:
    """A daemon, and its document."""

    def __init__(self, budget: Budget, stack: ExitStack, first: int) -> None:
        """``first``: seed of the first request that it gets."""
        self.first = first
        self.daemon = stack.enter_context(FuzzedDaemon(budget.planted))
        self.daemon.start()
        for name in ("disk2", "disk3"):
            (self.daemon.root / name).mkdir()
        found = re.search(r"HTTP API +(http://127\.0\.0\.1:\d+)", self.daemon.log_of_this_start())
        assert found is not None
        schema = schemathesis.openapi.from_url(f"{found[1]}/v1/openapi.json")
        self._operations = sorted(map(_made, schema.get_all_operations()), key=lambda each: str(each.label))
        self._session = stack.enter_context(requests.Session())
        self._jobs: list[str] = []
        self._refills = 0

    def refill(self) -> None:
        """Have what requests name, where it is gone."""
        post = self.daemon.http
        self._refills += 1
        for volume in VOLUMES:
            post("POST", "/v1/volumes", {"name": volume, "size": 4 << 20, "labels": {"a": "b"}})
        for snapshot in SNAPSHOTS:
            asyncio.run(self._write())
            for volume in VOLUMES:
                post("POST", "/v1/snapshots", {"volume": volume, "name": snapshot})
        post("POST", "/v1/hosts", {"name": "h0"})
        post("POST", "/v1/hosts/h0/luns", {"volume": "v0", "number": 0})
        post("POST", "/v1/schedules", {"name": "c0", "cron": "0 3 * * *", "volume": "v1", "keep": {"last": 2}})
        status, content = post("GET", "/v1/jobs?limit=5")
        self._jobs = [job["id"] for job in json.loads(content)["jobs"]] if status == 200 else []

    def _has_no_jobs(self) -> bool:
        answers = [self.daemon.http("GET", f"/v1/jobs?state={state}")[1] for state in ("queued", "running")]
        return not any(json.loads(content)["jobs"] for content in answers)

    async def _write(self) -> None:
        """Have something in the volumes, new in each, so that what the API does concerns chunks."""
        for volume in VOLUMES:
            try:
                async with await NbdClient.connect_unix(str(self.daemon.socket)) as client:
                    await client.go(volume)
                    await client.write(0, bytes([1 + self._refills % 255]) * _WRITTEN_BYTES)
                    await client.disconnect()
            except NbdClientError:  # a request has stopped it, or its pool takes nothing more
                continue

    def ask(self, seeds: Sequence[int], outcome: Outcome) -> None:
        """Send some requests of one operation, and look at their answers."""
        dice = random.Random(seeds[0])
        operation = dice.choice(self._operations)
        for seed, case in zip(seeds, cases_of(operation, seeds[0], len(seeds)), strict=True):
            aim(case, dice, self._jobs, self.daemon.root)
            broken = self._asked(case, outcome)
            if broken:
                self.fail(seeds, f"{operation.label}, seed {seed}: {broken}", outcome)
        if faults := self.daemon.new_faults():
            self.fail(seeds, f"{operation.label}: the daemon logged a mistake of its own:\n{faults}", outcome)

    def fail(self, seeds: Sequence[int], what: str, outcome: Outcome) -> None:
        """Note what some requests broke, alone or with all that were before them."""
        outcome.fail(seeds[0], what, count=len(seeds), within=range(self.first, seeds[-1] + 1))

    def _asked(self, case: Case[Any], outcome: Outcome) -> str:
        try:
            response = case.call(session=self._session, timeout=_ANSWER_S)
        except requests.RequestException as error:
            return f"{error!r} came of {case.as_curl_command()}"
        outcome.add(f"{response.status_code // 100}xx")
        if wrong := _wrong(case, response):
            return f"{wrong}\n{response.content[:600]!r}\n  came of {case.as_curl_command()}"
        return ""

    def finish(self, outcome: Outcome) -> None:
        """See that it serves, delete snapshots, stop it in order, and prove its pool: what is freed was given back."""
        assert self.daemon.ready(), "it does not serve any more"
        self.refill()
        for volume in VOLUMES:
            for snapshot in SNAPSHOTS:
                status, _ = self.daemon.http("DELETE", f"/v1/snapshots/{volume}@{snapshot}?force=true")
                outcome.add("snapshots deleted in the end", status < 300)
        self.daemon.until(self._has_no_jobs, "jobs do not end", _JOBS_S)
        self.daemon.stop()
        self.daemon.check()


def _made(result: Any) -> Any:
    """Return an operation of the document; raises what is wrong with the document."""
    return result.ok()


def _wrong(case: Case[Any], response: Response) -> str:
    status, kinds = response.status_code, response.headers.get("content-type", [""])
    if status >= 500 and status not in _EXPECTED_5XX:
        return f"status {status} is a mistake of the daemon's"
    if status >= 400 and case.method != "HEAD" and not kinds[0].startswith(PROBLEM):
        return f"an error is a problem document, not {kinds[0]!r}"
    try:
        case.validate_response(response, checks=list(_CHECKS))
    except FailureGroup as group:
        return "; ".join(f"{failure.title}: {failure.message}" for failure in group.exceptions)
    return ""


def run(budget: Budget) -> Outcome:
    """Send requests; a daemon that ended is replaced."""
    outcome = Outcome()
    seeds = budget.seeds(outcome)
    target: Target | None = None
    last: Any = [budget.seed]
    with ExitStack() as stack:
        while batch := list(islice(seeds, AT_ONCE)):
            last = batch
            target = target or Target(budget, stack, batch[0])
            if not (batch[0] - target.first) % _REFILL:
                target.refill()
            target.ask(batch, outcome)
            if not target.daemon.running:
                target.fail(batch, f"the daemon has ended\n{target.daemon.log_tail()}", outcome)
                stack.close()
                target = None
            if not (outcome.tried + 1) % 1_000:
                budget.say(f"api: {outcome.tried + 1:,} of {budget.count:,}, {len(outcome.failures)} broken")
        if target is not None:
            try:
                target.finish(outcome)
            except (AssertionError, ServerFailed) as error:
                count = last[-1] + 1 - target.first
                outcome.fail(target.first, f"after these requests: {error}", count=count)
    if outcome.tried >= _ENOUGH and not outcome.failures:
        for figure in ("2xx", "4xx", "snapshots deleted in the end"):
            if not outcome.figures.get(figure):
                raise AssertionError(f"api: nothing was attacked: {figure!r} is 0")
    return outcome


ATTACK = Attack(
    name="api",
    unit="API requests",
    promises=("I6",),
    trials={Level.SAMPLE: 200, Level.PROVE: 5_000, Level.SOAK: 20_000},
    run=run,
)
