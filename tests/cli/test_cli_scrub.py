"""``blockvirt scrub`` and what ``status`` says of damage, against a daemon with a script."""

from typing import Any

from tests.cli.conftest import Command
from tests.cli.scripted import JOB, Script, rows

CHUNK: dict[str, Any] = {
    "kind": "chunk",
    "problem": "it does not hold what it was sealed with",
    "concerns": ["v", "v@a"],
    "path": "/d/files/1",
    "offset_bytes": 8192,
    "length_bytes": 4096,
    "volume_offset_bytes": 4096,
    "chunk": 2,
}
RECORD: dict[str, Any] = {"kind": "record", "problem": "table leaves: damaged", "concerns": ["v@a"], "path": "/m"}
SCRUB: dict[str, Any] = {
    "id": "j1",
    "state": "done",
    "volumes": [],
    "scheduled": False,
    "created_at": "2026-11-22T02:00:00Z",
    "begun_at": "2026-11-22T02:00:00Z",
    "ended_at": "2026-11-22T02:10:00Z",
    "read_bytes": 1 << 20,
    "records": 12,
    "chunks": 16,
    "unread_chunks": 0,
    "damaged": 0,
    "findings": [],
}
STARTED = JOB | {"id": "j1", "kind": "scrub", "subject": "everything", "state": "queued"}
IN_WORDS = "damaged: 4096 bytes at 4096 of v, v@a (at 8192 of /d/files/1): it does not hold what it was sealed with"


async def test_start(command: Command, script: Script) -> None:
    script.on("POST", "/v1/scrubs", STARTED, status=202)
    made = await command("scrub", "start")
    assert (made.code, "subject  everything" in made.out) == (0, True)
    assert (await command("scrub", "start", "v", "w", "--rate", "100MiB", "-o", "json")).json == STARTED
    assert [body for _, _, body in script.asked] == [{"volumes": []}, {"volumes": ["v", "w"], "rate": "100MiB"}]


async def test_who_waits_hears_of_damage_by_the_exit_code(command: Command, script: Script) -> None:
    script.on("POST", "/v1/scrubs", STARTED, status=202)
    script.on("GET", "/v1/jobs/j1?wait_s=60", STARTED | {"state": "done"})
    script.on("GET", "/v1/scrubs", {"scrubs": [SCRUB], "standing": []})
    well = await command("scrub", "start", "--wait")
    assert (well.code, well.err) == (0, "")
    assert "of       everything\n" in well.out
    damaged = SCRUB | {"damaged": 1, "findings": [CHUNK]}
    script.on("GET", "/v1/scrubs", {"scrubs": [SCRUB | {"id": "other"}, damaged], "standing": [CHUNK]})
    found = await command("scrub", "start", "--wait")
    assert (found.code, found.err) == (1, IN_WORDS + "\n")
    as_json = await command("scrub", "start", "--wait", "-o", "json")
    assert (as_json.code, as_json.err, as_json.json) == (1, "", damaged)


async def test_status_of_scrubs(command: Command, script: Script) -> None:
    listed = {"scrubs": [SCRUB | {"volumes": ["v", "w"]}, SCRUB], "standing": [CHUNK, RECORD]}
    script.on("GET", "/v1/scrubs", listed)
    shown = await command("scrub", "status")
    assert shown.code == 0
    assert shown.err.splitlines() == [IN_WORDS, "damaged: /m: table leaves: damaged; concerns v@a"]
    assert (await command("scrub", "status", "-o", "json")).json == listed
    as_csv = await command("scrub", "status", "-o", "csv")
    assert [(row["of"], row["chunks"]) for row in rows(as_csv.out)] == [("v w", "16"), ("everything", "16")]


async def test_damage_is_a_problem_of_the_pool(command: Command, script: Script) -> None:
    script.on("GET", "/readyz", {"status": "ok"})
    script.on("GET", "/v1/pool", {"level": "ok", "devices": []})
    script.on("GET", "/v1/volumes?limit=1000", {"volumes": []})
    script.on("GET", "/v1/sessions", {"sessions": []})
    script.on("GET", "/v1/scrubs", {"scrubs": [], "standing": [CHUNK] * 7})
    status = await command("status")
    assert status.code == 1
    assert IN_WORDS in status.out
    assert "2 more pieces of damage: 'blockvirt scrub status' names them" in status.out
    script.on("GET", "/v1/scrubs", {"scrubs": [], "standing": []})
    assert (await command("status")).code == 0
