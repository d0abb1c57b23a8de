"""Snapshot, clone and group commands against a daemon with a script: what they ask, what they print."""

import sys
from pathlib import Path
from typing import Any

from tests.cli.conftest import Command
from tests.cli.scripted import JOB, Script, rows, volume
from tests.cli.terminal import run_on_terminal


def snapshot(name: str, volume: str = "v", **fields: Any) -> dict[str, Any]:
    """A snapshot as the API shows it."""
    plain = {"id": f"id-{name}", "volume": volume, "volume_id": f"id-{volume}", "name": name, "size_bytes": 4096}
    plain |= {"created_at": "2026-11-22T02:00:00.123456Z", "mapped_bytes": 2048, "exclusive_bytes": 1024}
    return plain | {"labels": {}, "holds": [], "clones": [], "sessions": 0, "revision": 1, "nbd_uris": []} | fields


# --- taking and listing ----------------------------------------------------------------------------------------------


async def test_one_snapshot_and_a_group_of_them(command: Command, script: Script) -> None:
    script.on("POST", "/v1/snapshots", snapshot("monday"), status=201)
    group = {"group_id": "g", "snapshots": [snapshot("a"), snapshot("a", "w")]}
    script.on("POST", "/v1/snapshots/group", group, status=201)
    made = await command("snapshot", "create", "v@monday", "--label", "a=b")
    assert made.code == 0
    assert "snapshot   v@monday\n" in made.out
    assert (await command("snapshot", "create", "v", "-o", "json")).json == snapshot("monday")
    both = await command("snapshot", "create", "v@a", "w@a", "-o", "csv")
    assert [row["snapshot"] for row in rows(both.out)] == ["v@a", "w@a"]
    assert (await command("snapshot", "create", "v", "w", "-o", "json")).json == group
    assert (await command("group", "snapshot", "a", "v", "w", "--label", "k=l", "-o", "json")).json == group
    assert script.asked == [
        ("POST", "/v1/snapshots", {"volume": "v", "labels": {"a": "b"}, "name": "monday"}),
        ("POST", "/v1/snapshots", {"volume": "v", "labels": {}}),
        ("POST", "/v1/snapshots/group", {"volumes": ["v", "w"], "labels": {}, "name": "a"}),
        ("POST", "/v1/snapshots/group", {"volumes": ["v", "w"], "labels": {}}),
        ("POST", "/v1/snapshots/group", {"volumes": ["v", "w"], "labels": {"k": "l"}, "name": "a"}),
    ]


async def test_snapshots_of_one_instant_share_their_name(command: Command, script: Script) -> None:
    refused = await command("snapshot", "create", "v@a", "w@b")
    assert (refused.code, script.asked) == (1, [])
    assert "share their name" in refused.err
    assert (await command("snapshot", "create")).code == 2


async def test_a_name_that_is_none_is_for_the_daemon_to_refuse(command: Command, script: Script) -> None:
    """'v@' asks for an empty name, 'v@a@b' for one with '@': neither is made into something else."""
    for words in ("v@", "v@a@b", "v@/"):
        await command("snapshot", "create", words)
    assert [body["name"] for _, _, body in script.asked] == ["", "a@b", "/"]


async def test_a_listing_is_a_tree_and_flat_for_programs(command: Command, script: Script) -> None:
    found = [
        snapshot("z", "w"),
        snapshot("a"),
        snapshot("b", parent_id="id-a", holds=["legal", "x"], clones=["c"], labels={"k": "l"}),
        snapshot("kept", parent_id="id-a"),
    ]
    script.on("GET", "/v1/snapshots?limit=1000", {"snapshots": found[:2], "next_page_token": "t"})
    script.on("GET", "/v1/snapshots?limit=1000&page_token=t", {"snapshots": found[2:]})
    script.on("GET", "/v1/snapshots?volume=id-v&limit=1", {"snapshots": found[1:2], "head_parent_id": "id-b"})
    script.on("GET", "/v1/snapshots?volume=id-w&limit=1", {"snapshots": found[:1], "head_parent_id": "id-z"})
    table = (await command("snapshot", "list")).out.splitlines()
    assert [line[:13].rstrip() for line in table] == [
        *("NAME", "v", "|-- a", "|   `-- kept", "|-- b", "`-- (head)"),
        *("w", "|-- z", "`-- (head)"),
    ]
    assert table[4].split()[2:] == ["2026-11-22T02:00:00.123456Z", "4096", "2048", "1024", "legal", "x", "c"]
    assert (await command("snapshot", "list", "-o", "json")).json == found
    flat = rows((await command("snapshot", "list", "-o", "csv")).out)
    assert [(row["volume"], row["name"]) for row in flat] == [("w", "z"), ("v", "a"), ("v", "b"), ("v", "kept")]
    assert (flat[2]["holds"], flat[2]["labels"], flat[2]["parent_id"]) == ("legal x", "k=l", "id-a")


async def test_a_listing_of_one_volume_and_of_labels(command: Command, script: Script) -> None:
    script.on("GET", "/v1/snapshots?limit=1000&label=a%3Db&volume=v", {"snapshots": []})
    listed = await command("snapshot", "list", "v", "--label", "a=b")
    assert (listed.code, len(listed.out.splitlines())) == (0, 1)
    assert (await command("snapshot", "list", "--label", "a")).code == 1
    page = {"snapshots": [snapshot("a"), snapshot("b", parent_id="id-a")], "head_parent_id": "id-a"}
    script.on("GET", "/v1/snapshots?limit=1000&volume=v", page)
    listed = await command("snapshot", "list", "v")
    assert [line.split("  2026")[0].rstrip() for line in listed.out.splitlines()[1:]] == [
        *("v", "|-- a", "|   `-- b", "`-- (head)")
    ]
    assert len(script.asked) == 2, "the head is told with the list"


async def test_damaged_ones_are_named_beside_the_list(command: Command, script: Script) -> None:
    damaged = [f"v@d{number}" for number in range(7)]
    page = {"snapshots": [snapshot("a")], "head_parent_id": "id-a", "damaged": damaged}
    script.on("GET", "/v1/snapshots?limit=1000&volume=v", page)
    listed = await command("snapshot", "list", "v")
    assert listed.code == 0
    assert "|-- a" in listed.out
    assert "damaged" not in listed.out
    assert "v@d0, v@d1, v@d2, v@d3, v@d4 and 2 more" in listed.err
    flat = await command("snapshot", "list", "v", "-o", "json")
    assert flat.json == [snapshot("a")]
    assert "v@d0" in flat.err


async def test_a_tree_is_not_folded_on_a_narrow_terminal(command: Command, script: Script, tmp_path: Path) -> None:
    """A name on a line of its own, away from its branch, would be no tree any more."""
    found = [snapshot("a"), snapshot("before-revert-20261122t053238-330z", parent_id="id-a")]
    script.on("GET", "/v1/snapshots?limit=1000&volume=v", {"snapshots": found, "head_parent_id": "id-a"})
    words = (sys.executable, "-m", "blockvirt", "-s", str(tmp_path), "snapshot", "list", "v")
    code, seen, _ = await run_on_terminal(*words, stream="stdout", width=60)
    assert code == 0
    assert "\n|   `-- before-revert-20261122t053238-330z  2026-11-22T02:00:00Z" in seen


# --- holding, deleting, going back, cloning ---------------------------------------------------------------------------


async def test_holds(command: Command, script: Script) -> None:
    for verb in ("hold", "release"):
        script.on("POST", f"/v1/snapshots/v%40a/{verb}", snapshot("a", holds=["legal"]))
        assert (await command("snapshot", verb, "v@a", "--tag", "legal", "-o", "json")).json["holds"] == ["legal"]
        assert (await command("snapshot", verb, "v@a")).code == 0
    assert [body for _, _, body in script.asked] == [{"tag": "legal"}, {"tag": "manual"}] * 2


async def test_a_deletion_says_what_it_frees(command: Command, script: Script) -> None:
    gone: dict[str, Any] = {"deleted": False, "snapshots": [snapshot("a"), snapshot("b", holds=["x"])]}
    gone |= {"freed_bytes": 9000, "obstacles": ["v@b is held: x"], "job_ids": []}
    script.on("POST", "/v1/snapshots/delete", gone)
    dry = await command("snapshot", "delete", "v@a", "v@b", "--dry-run")
    assert script.asked[-1][2] == {"snapshots": ["v@a", "v@b"], "force": False, "dry_run": True}
    lines = dry.out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["v@a", "no", "1024"], ["v@b", "no", "1024"]]
    assert lines[3:] == ["together they would free 9000 bytes", "in the way: v@b is held: x"]
    flat = rows((await command("snapshot", "delete", "v@a", "v@b", "--dry-run", "-o", "csv")).out)
    assert [(row["snapshot"], row["exclusive_bytes"], row["freed_bytes"]) for row in flat] == [
        ("v@a", "1024", "9000"),
        ("v@b", "1024", "9000"),
    ]
    assert (await command("snapshot", "delete", "v@a", "--dry-run", "-o", "json")).json == gone


async def test_a_deletion_waits_for_all_its_jobs(command: Command, script: Script) -> None:
    gone = {"deleted": True, "snapshots": [snapshot("a")], "freed_bytes": 1, "obstacles": [], "job_ids": ["j1", "j2"]}
    script.on("POST", "/v1/snapshots/delete", gone)
    script.on("GET", "/v1/jobs/j1?wait_s=60", JOB | {"state": "running"}, JOB | {"state": "done"})
    script.on("GET", "/v1/jobs/j2?wait_s=60", JOB | {"id": "j2", "state": "done"})
    waited = await command("snapshot", "delete", "v@a", "--force", "--wait")
    assert waited.code == 0
    assert script.asked[0][2] == {"snapshots": ["v@a"], "force": True, "dry_run": False}
    assert [path for _, path, _ in script.asked[1:]] == ["/v1/jobs/j1?wait_s=60"] * 2 + ["/v1/jobs/j2?wait_s=60"]
    assert waited.out.endswith("together they free 1 bytes\n")


async def test_a_revert_says_what_to_do_next(command: Command, script: Script) -> None:
    done: dict[str, Any] = {"volume": volume("v"), "snapshot": snapshot("a"), "safety": snapshot("before")}
    script.on(
        "POST",
        "/v1/snapshots/v%40a/revert",
        done | {"reverted": True, "obstacles": [], "needs_reopen": False},
        done | {"reverted": True, "obstacles": [], "needs_reopen": True},
        {**done, "safety": None} | {"reverted": False, "obstacles": ["1 sessions have it open"], "needs_reopen": True},
        {**done, "safety": None} | {"reverted": False, "obstacles": [], "needs_reopen": True},
    )
    idle = await command("snapshot", "revert", "v@a")
    assert "kept as       v@before\n" in idle.out
    assert "'blockvirt snapshot revert v@before' undoes this" in idle.err
    assert "reopen" not in idle.err
    forced = await command("snapshot", "revert", "v@a", "--force", "--safety-name", "before", "-o", "json")
    assert forced.json["needs_reopen"] is True
    assert "'blockvirt volume reopen v'" in forced.err
    dry = await command("snapshot", "revert", "v@a", "--no-safety", "--dry-run")
    assert "in the way    1 sessions have it open\n" in dry.out
    assert "--force" in dry.err
    waiting = await command("snapshot", "revert", "v@a", "--dry-run")
    assert "--force" not in waiting.err
    assert "goes on waiting for 'blockvirt volume reopen v'" in waiting.err
    assert [body for _, _, body in script.asked] == [
        {"force": False, "safety": True, "dry_run": False},
        {"force": True, "safety": True, "dry_run": False, "safety_name": "before"},
        {"force": False, "safety": False, "dry_run": True},
        {"force": False, "safety": True, "dry_run": True},
    ]


async def test_clones(command: Command, script: Script) -> None:
    made = volume("c", origin="v@a", requested_size_bytes=4095, snapshots=0)
    script.on("POST", "/v1/snapshots/v%40a/clone", made, status=201)
    clone = await command("snapshot", "clone", "v@a", "c", "--size", "4095", "--label", "a=b", "--device", "d1")
    assert "origin     v@a\n" in clone.out
    assert "rounded up" in clone.err
    assert (await command("snapshot", "clone", "v@a", "--device-label", "x=y")).code == 0
    assert [body for _, _, body in script.asked] == [
        {"labels": {"a": "b"}, "name": "c", "size": 4095, "placement": {"devices": ["d1"], "labels": {}}},
        {"labels": {}, "placement": {"devices": [], "labels": {"x": "y"}}},
    ]


async def test_a_flatten_is_a_job(command: Command, script: Script) -> None:
    script.on("POST", "/v1/volumes/c/flatten", JOB | {"state": "queued"}, status=202)
    script.on("GET", "/v1/jobs/j1?wait_s=60", JOB | {"state": "done"})
    assert (await command("clone", "flatten", "c", "-o", "json")).json["state"] == "queued"
    assert (await command("clone", "flatten", "c", "--wait", "-o", "json")).json["state"] == "done"


# --- comparing --------------------------------------------------------------------------------------------------------


def page(*changes: tuple[int, int, bool], onward: int | None = None) -> dict[str, Any]:
    """A page of changed blocks of a volume of 1 MiB."""
    ranges = [{"offset_bytes": offset, "length_bytes": length, "zero": zero} for offset, length, zero in changes]
    answer: dict[str, Any] = {"changes": ranges, "size_bytes": 1 << 20, "chunk_bytes": 65536}
    return answer if onward is None else answer | {"next_offset_bytes": onward}


async def test_a_diff_goes_through_all_pages(command: Command, script: Script) -> None:
    path = "/v1/snapshots/v%40b/changes?since=v%40a&limit=10000"
    script.on("GET", f"{path}&offset=0", page((0, 65536, False), (131072, 65536, True), onward=196608))
    script.on("GET", f"{path}&offset=196608", page(onward=262144))  # a page may be empty and not the last
    script.on("GET", f"{path}&offset=262144", page((262144, 131072, False)))
    table = (await command("snapshot", "diff", "v@a", "v@b")).out.splitlines()
    assert [line.split() for line in table[:-1]] == [
        ["OFFSET", "LENGTH", "KIND"],
        ["0", "65536", "data"],
        ["131072", "65536", "zero"],
        ["262144", "131072", "data"],
    ]
    assert table[-1] == "196608 bytes of data and 65536 bytes of zeros, of 1048576 bytes"
    as_csv = (await command("snapshot", "diff", "v@a", "v@b", "-o", "csv")).out.splitlines()
    assert as_csv == ["offset_bytes,length_bytes,kind", "0,65536,data", "131072,65536,zero", "262144,131072,data"]
    whole = (await command("snapshot", "diff", "v@a", "v@b", "-o", "json")).json
    assert [each["offset_bytes"] for each in whole["changes"]] == [0, 131072, 262144]
    assert (whole["data_bytes"], whole["zero_bytes"], whole["size_bytes"]) == (196608, 65536, 1 << 20)


async def test_a_diff_is_with_a_snapshot_or_with_a_volume(command: Command, script: Script) -> None:
    for path in ("/v1/volumes/v/changes?since=v%40a&limit=10000", "/v1/volumes/c/changes?since=v%40a&limit=10000"):
        script.on("GET", f"{path}&offset=0", page())
    script.on("GET", "/v1/snapshots/id-a", snapshot("a"))
    script.on("GET", "/v1/volumes/id-v/changes?since=id-a&limit=10000&offset=0", page())
    for words in (("v@a",), ("v@a", "c"), ("id-a",)):
        same = await command("snapshot", "diff", *words, "-o", "json")
        assert (same.code, same.json["changes"], same.json["data_bytes"]) == (0, [], 0), words


async def test_a_refused_diff_prints_nothing(command: Command, script: Script) -> None:
    for output in ("table", "json", "csv"):
        refused = await command("snapshot", "diff", "v@a", "v@none", "-o", output)
        assert (refused.code, refused.out) == (4, "")
