"""/v1/scrubs: reading everything on the disks and comparing it with its checksums."""

from typing import Any, cast

from blockvirt.api import answers
from blockvirt.api import scrub_models as models
from blockvirt.api.job_models import Job
from blockvirt.api.operations import Call, Operations, Reply
from blockvirt.api.wire import timestamp
from blockvirt.errors import NotFound
from blockvirt.lun.address import chunk_of
from blockvirt.meta.records import ScrubFinding, ScrubRecord

operations = Operations("scrubs")


@operations.add("POST", "/v1/scrubs", {202: Job}, errors=(404, 409))
async def start_scrub(call: Call, body: models.ScrubCreate) -> Reply:
    """Read everything, or some volumes, and compare with the checksums, as a job; the same again joins it."""
    job_id = await call.services.scrubbing.start(body.volumes, body.rate or 0)
    return Reply(answers.job(call.services.jobs.get(job_id)), 202, {"Location": f"/v1/jobs/{job_id}"})


@operations.add("GET", "/v1/scrubs", {200: models.ScrubList})
async def list_scrubs(call: Call) -> Reply:
    """List the last scrubs with what they found, the newest first, and which damage still stands."""
    found = call.services.scrubbing.results()
    scrubs = [_scrub(call, record) for record in found.scrubs]
    return Reply(models.ScrubList(scrubs=scrubs, standing=[_finding(each) for each in found.standing]))


def _scrub(call: Call, record: ScrubRecord) -> models.Scrub:
    return models.Scrub(
        id=record.id,
        state=cast("Any", _state(call, record)),
        volumes=list(record.names),
        scheduled=bool(record.scheduled_for_s),
        rate_bytes_per_s=record.rate_bytes or None,
        created_at=timestamp(record.created_s),
        begun_at=timestamp(record.begun_s) if record.begun_s else None,
        ended_at=timestamp(record.ended_s) if record.ended_s else None,
        read_bytes=record.read_bytes,
        records=record.records,
        chunks=record.chunks,
        unread_chunks=record.unread_chunks,
        damaged=record.damaged,
        findings=[_finding(each) for each in record.findings],
    )


def _state(call: Call, record: ScrubRecord) -> str:
    """Return the state of a scrub's job; where that is forgotten, what it must have come to."""
    try:
        return call.services.jobs.get(record.id).state
    except NotFound:
        return "done" if record.ended_s else "cancelled"


def _finding(finding: ScrubFinding) -> models.ScrubFinding:
    is_chunk = finding.kind == "chunk"
    return models.ScrubFinding(
        kind=cast("Any", finding.kind),
        problem=finding.problem,
        concerns=list(finding.concerns),
        path=finding.path or None,
        offset_bytes=finding.offset_bytes if finding.length_bytes else None,
        length_bytes=finding.length_bytes or None,
        volume_offset_bytes=finding.volume_offset_bytes if is_chunk else None,
        chunk=chunk_of(finding.address) if is_chunk else None,
    )
