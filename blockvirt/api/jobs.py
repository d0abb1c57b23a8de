"""/v1/jobs: what takes time, and goes on after a restart."""

import asyncio
from urllib.parse import quote

from blockvirt.api import answers
from blockvirt.api import job_models as models
from blockvirt.api.operations import Call, Operations, Reply
from blockvirt.api.paging import page_after, page_of
from blockvirt.errors import NotFound
from blockvirt.ids import is_id
from blockvirt.volumes.job_states import FINISHED
from blockvirt.volumes.jobs import Job

operations = Operations("jobs")


@operations.add("GET", "/v1/jobs", {200: models.JobList}, errors=(404,))
async def list_jobs(call: Call, query: models.JobListQuery) -> Reply:
    """List jobs in order of creation, a page at a time. Of those that are over only the newest are kept."""
    volume_id = None if query.volume is None else _volume_id(call, query.volume)
    filters = (query.state, query.kind, volume_id)
    listing = "jobs" + "".join(f"&{quote(each or '')}" for each in filters)
    jobs = call.services.jobs.list(query.state, query.kind, volume_id)
    after = page_after(query.page_token, listing)
    page, token = page_of(listing, jobs, _place, after, query.limit)
    return Reply(models.JobList(jobs=[answers.job(each) for each in page], next_page_token=token))


def _place(job: Job) -> tuple[float, str]:
    return job.created_s, job.id


def _volume_id(call: Call, name_or_id: str) -> str:
    try:
        return call.services.catalogue.get(name_or_id).id
    except NotFound:
        if not is_id(name_or_id):
            raise
        return name_or_id  # a deleted one: its purge is listed under its id


@operations.add("GET", "/v1/jobs/{job}", {200: models.Job}, errors=(404,))
async def show_job(call: Call, job: str, query: models.JobQuery) -> Reply:
    """Show a job, when it is over if one waits for that."""
    found = call.services.jobs.get(job)
    if query.wait_s and found.state not in FINISHED:
        found = await _over(call, job, query.wait_s)
    return Reply(answers.job(found))


async def _over(call: Call, job_id: str, wait_s: float) -> Job:
    """Return a job when it is over, after ``wait_s``, or when the API stops."""
    jobs = call.services.jobs
    try:
        async with asyncio.timeout(wait_s) as limit:

            def end_now(_: asyncio.Future[None]) -> None:
                limit.reschedule(asyncio.get_running_loop().time())

            call.stopping.add_done_callback(end_now)
            try:
                return await jobs.finished(job_id)
            finally:
                call.stopping.remove_done_callback(end_now)
    except TimeoutError:
        return jobs.get(job_id)


@operations.add("POST", "/v1/jobs/{job}/cancel", {200: models.Job}, errors=(404, 409))
async def cancel_job(call: Call, job: str) -> Reply:
    """Give a job up for good. Only what can be given up half-way: a flatten, not a deletion."""
    return Reply(answers.job(await call.services.jobs.cancel(job)))


@operations.add("POST", "/v1/jobs/{job}/pause", {200: models.Job}, errors=(404, 409))
async def pause_job(call: Call, job: str) -> Reply:
    """Stop a job until it is resumed."""
    return Reply(answers.job(await call.services.jobs.pause(job)))


@operations.add("POST", "/v1/jobs/{job}/resume", {200: models.Job}, errors=(404, 409))
async def resume_job(call: Call, job: str) -> Reply:
    """Let a paused job go on, or a failed one try again."""
    return Reply(answers.job(await call.services.jobs.resume(job)))
