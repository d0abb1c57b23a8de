"""Schedule, trash and job commands against a daemon with a script: what they ask, what they print."""

from typing import Any

from tests.cli.conftest import Command
from tests.cli.scripted import JOB, Script, rows, volume

# --- schedules --------------------------------------------------------------------------------------------------------

SCHEDULE: dict[str, Any] = {
    **{"id": "s1", "name": "nightly", "cron": "0 2 * * *", "labels": {}, "volume_id": "id-v", "revision": 1},
    **{"volumes": [{"id": "id-v", "name": "v"}], "keep": {"last": 3}, "state": "active", "missed_runs": 2},
    **{"next_run_at": "2026-11-23T02:00:00Z", "created_at": "2026-11-22T02:00:00Z"},
}
DECISION = {"snapshot_id": "1", "created_at": "2026-11-22T02:00:00Z"}
FORESEEN = {
    "next_runs": ["2026-11-23T02:00:00Z", "2026-11-24T02:00:00Z"],
    "volumes": [
        {
            "volume_id": "id-v",
            "volume": "v",
            "decisions": [
                DECISION | {"name": "new", "keep": True, "reasons": ["last 1", "daily 2026-11-22"]},
                DECISION | {"name": "old", "keep": False, "reasons": ["no rule keeps it"]},
            ],
        }
    ],
}
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


async def test_schedules_from_start_to_end(command: Command, script: Script) -> None:
    script.on("POST", "/v1/schedules", SCHEDULE, status=201)
    script.on("GET", "/v1/schedules/nightly", SCHEDULE)
    script.on("PATCH", "/v1/schedules/nightly", SCHEDULE)
    script.on("DELETE", "/v1/schedules/nightly", {"deleted": True, "schedule": SCHEDULE})
    every_rule = [word for number, rule in enumerate(RULES) for word in (f"--keep-{rule}", str(number))]
    made = await command("schedule", "create", "nightly", "--cron", "0 2 * * *", "--volume", "v", *every_rule)
    assert made.code == 0
    assert (
        await command("schedule", "create", "n", "--cron", "@", "--label", "a=b", "--paused", "-o", "json")
    ).json == SCHEDULE
    shown = (await command("schedule", "show", "nightly")).out
    assert "for         v\n" in shown
    assert "keep        last=3\n" in shown
    assert (await command("schedule", "change", "nightly", "--cron", "@", "--keep-last", "0")).code == 0
    assert (await command("schedule", "pause", "nightly")).code == 0
    assert (await command("schedule", "resume", "nightly")).code == 0
    assert "schedule  nightly\ndeleted   yes\n" in (await command("schedule", "delete", "nightly")).out
    assert [body for _, _, body in script.asked if body is not None] == [
        {
            **{"name": "nightly", "cron": "0 2 * * *", "labels": {}, "volume": "v"},
            "keep": {rule: number for number, rule in enumerate(RULES)},
        },
        {"name": "n", "cron": "@", "labels": {"a": "b"}, "keep": {}, "paused": True},
        {"cron": "@", "keep": {"last": 0}},
        {"paused": True},
        {"paused": False},
    ]


async def test_a_change_of_nothing_is_refused(command: Command, script: Script) -> None:
    assert (await command("schedule", "change", "nightly")).code == 1
    assert (await command("schedule", "change", "nightly", "--keep-last", "-1")).code == 2
    assert (await command("schedule", "create", "nightly")).code == 2
    assert script.asked == []


async def test_schedules_are_listed_with_next_and_missed_runs(command: Command, script: Script) -> None:
    by_label = SCHEDULE | {"name": "web", "labels": {"a": "b", "c": "d"}, "volume_id": None, "state": "paused"}
    del by_label["next_run_at"]
    script.on("GET", "/v1/schedules?limit=1000", {"schedules": [SCHEDULE, by_label]})
    listed = rows((await command("schedule", "list", "-o", "csv")).out)
    assert [(row["name"], row["for"], row["next_run_at"], row["missed_runs"]) for row in listed] == [
        ("nightly", "v", "2026-11-23T02:00:00Z", "2"),
        ("web", "a=b c=d", "", "2"),
    ]
    assert (await command("schedule", "list", "-o", "json")).json == [SCHEDULE, by_label]


async def test_a_preview_says_what_would_be_pruned(command: Command, script: Script) -> None:
    script.on("POST", "/v1/schedules/preview", FORESEEN)
    script.on("PATCH", "/v1/schedules/nightly", FORESEEN)
    script.on("GET", "/v1/schedules/nightly", SCHEDULE)
    script.on("GET", "/v1/schedules/nightly/preview?runs=2", FORESEEN)
    new = (await command("schedule", "create", "n", "--cron", "0 2 * * *", "--volume", "v", "--dry-run")).out
    assert [line.split()[:4] for line in new.splitlines()[1:3]] == [
        ["v", "new", "2026-11-22T02:00:00Z", "keep"],
        ["v", "old", "2026-11-22T02:00:00Z", "prune"],
    ]
    assert "last 1; daily 2026-11-22\n" in new
    assert "runs next at 2026-11-24T02:00:00Z\n" in new
    assert new.endswith("snapshots that retention would prune now: 1 of 2\n")
    assert (await command("schedule", "change", "nightly", "--keep-last", "1", "--dry-run")).out == new
    assert script.asked[-1][2] == {"keep": {"last": 1}, "dry_run": True}
    there = await command("schedule", "preview", "nightly", "--runs", "2")
    assert "runs missed so far: 2\n" in there.out
    as_json = await command("schedule", "preview", "nightly", "--runs", "2", "-o", "json")
    assert as_json.json == FORESEEN | {"missed_runs": 2}


# --- the trash --------------------------------------------------------------------------------------------------------

TRASHED = {"id": "id-v", "name": "v", "size_bytes": 4096, "snapshots": 2}
TRASHED |= {"trashed_at": "2026-11-22T02:00:00Z", "purge_at": "2026-11-23T02:00:00Z"}


async def test_a_deleted_volume_says_where_it_went(command: Command, script: Script) -> None:
    gone = {"deleted": True, "volume": volume("v"), "obstacles": [], "freed_bytes": 7, "snapshots": 2}
    script.on("DELETE", "/v1/volumes/v", gone | {"purge_at": "2026-11-23T02:00:00Z"})
    script.on("DELETE", "/v1/volumes/v?purge=true", gone | {"job_id": "j1"})
    script.on("DELETE", "/v1/volumes/v?dry_run=true", gone | {"deleted": False, "purge_at": "2026-11-23T02:00:00Z"})
    script.on("GET", "/v1/jobs/j1?wait_s=60", JOB | {"state": "done"})
    trashed = await command("volume", "delete", "v", "--wait")
    assert trashed.code == 0
    assert "in the trash until 2026-11-23T02:00:00Z" in trashed.err
    assert "'blockvirt trash restore id-v'" in trashed.err
    assert (await command("volume", "delete", "v", "--dry-run")).err == ""
    assert "/v1/jobs/j1?wait_s=60" not in [path for _, path, _ in script.asked]
    purged = await command("volume", "delete", "v", "--purge", "--wait", "-o", "json")
    assert (purged.json, purged.err) == ([gone | {"job_id": "j1"}], "")
    assert script.asked[-1][1] == "/v1/jobs/j1?wait_s=60"


async def test_several_volumes_say_what_they_free_together(command: Command, script: Script) -> None:
    for name in ("v", "w"):
        gone = {"deleted": False, "volume": volume(name), "obstacles": [], "freed_bytes": 0, "snapshots": 1}
        script.on("DELETE", f"/v1/volumes/{name}?dry_run=true", gone)
    script.on("POST", "/v1/volumes/space", {"volumes": ["v", "w"], "freed_bytes": 7 << 20})
    assert "together they would free 7340032 bytes" in (await command("volume", "delete", "v", "w", "--dry-run")).out
    assert script.asked[-1][2] == {"volumes": ["id-v", "id-w"]}
    assert "together" not in (await command("volume", "delete", "v", "--dry-run")).out
    assert len((await command("volume", "delete", "v", "w", "--dry-run", "-o", "json")).json) == 2


async def test_the_trash(command: Command, script: Script) -> None:
    script.on("GET", "/v1/trash?limit=1000", {"volumes": [TRASHED]})
    script.on("POST", "/v1/trash/v/restore", volume("w"))
    script.on("DELETE", "/v1/trash/v", JOB | {"kind": "purge", "state": "queued"}, status=202)
    script.on("DELETE", "/v1/trash/v?dry_run=true", {"volume": TRASHED, "freed_bytes": 77})
    script.on("GET", "/v1/jobs/j1?wait_s=60", JOB | {"kind": "purge", "state": "done"})
    assert rows((await command("trash", "list", "-o", "csv")).out)[0]["purge_at"] == "2026-11-23T02:00:00Z"
    assert (await command("trash", "restore", "v", "--name", "w", "-o", "json")).json["name"] == "w"
    assert script.asked[-1][2] == {"name": "w"}
    assert (await command("trash", "restore", "v")).code == 0
    assert script.asked[-1][2] == {}
    assert "would free  77\n" in (await command("trash", "purge", "v", "--dry-run")).out
    assert (await command("trash", "purge", "v", "-o", "json")).json["state"] == "queued"
    assert (await command("trash", "purge", "v", "--wait", "-o", "json")).json["state"] == "done"


# --- jobs -------------------------------------------------------------------------------------------------------------


async def test_jobs_are_listed_and_commanded(command: Command, script: Script) -> None:
    running = JOB | {"state": "running", "percent": 12.345, "rate_per_s": 1.25, "eta_s": 70.0}
    script.on("GET", "/v1/jobs?limit=1000", {"jobs": [running]})
    script.on("GET", "/v1/jobs?limit=1000&state=failed&kind=purge&volume=v", {"jobs": []})
    assert rows((await command("job", "list", "-o", "csv")).out)[0]["rate_per_s"] == "1.25"
    assert "12.345  1.2/s  70.0" in (await command("job", "list")).out
    filtered = await command("job", "list", "--state", "failed", "--kind", "purge", "--volume", "v", "-o", "json")
    assert filtered.json == []
    assert (await command("job", "list", "--state", "nonsense")).code == 2
    script.on("GET", "/v1/jobs/j1", running)
    assert "units done  3\n" in (await command("job", "show", "j1")).out
    for verb, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        script.on("POST", f"/v1/jobs/j1/{verb}", JOB | {"state": state})
        assert (await command("job", verb, "j1", "-o", "json")).json["state"] == state
