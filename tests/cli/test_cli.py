"""The commands, as processes: what they print, on which stream, and how they exit."""

import asyncio
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blockvirt.meta.keys import Table, number_key
from blockvirt.units import GIB
from blockvirt.volumes.requests import NewVolume
from tests.api.conftest import Api
from tests.cli.conftest import ROOT, Command, run
from tests.cli.terminal import run_on_terminal


async def test_a_volume_from_start_to_end(blockvirt: Command, served: Api) -> None:
    made = await blockvirt("volume", "create", "v", "--size", "10GiB", "--label", "team=web", "-o", "json")
    assert (made.code, made.err) == (0, "")
    assert (made.json["name"], made.json["size_bytes"], made.json["labels"]) == ("v", 10 * GIB, {"team": "web"})
    assert (await blockvirt("volume", "create", "v", "--size", "10GiB", "--label", "team=web")).code == 0
    shown = await blockvirt("volume", "show", "v")
    assert f"size          {10 * GIB}\n" in shown.out, "exact bytes: this is no terminal"
    assert "nbd+unix:///v?socket=" in shown.out
    assert (await blockvirt("volume", "rename", "v", "w")).code == 0
    grown = await blockvirt("volume", "resize", "w", "--size", "11GiB", "-o", "json")
    assert grown.json["size_bytes"] == 11 * GIB
    assert (await blockvirt("volume", "label", "w", "a=b", "-o", "json")).json["labels"] == {"a": "b"}
    dry = await blockvirt("volume", "delete", "w", "--dry-run", "-o", "csv")
    assert dry.out.splitlines()[1].startswith(f"w,no,{11 * GIB},0")
    assert (await blockvirt("volume", "delete", "w")).code == 0
    assert served.services.catalogue.count() == 0


async def test_listings_are_complete_and_exact(blockvirt: Command, served: Api) -> None:
    for number in range(3):
        await served.call("POST", "/v1/volumes", {"size": 512 * (number + 1), "name": f"v{number}"})
    table = (await blockvirt("volume", "list")).out.splitlines()
    assert [line.split()[:2] for line in table] == [["NAME", "SIZE"], ["v0", "512"], ["v1", "1024"], ["v2", "1536"]]
    rows = list(csv.DictReader(io.StringIO((await blockvirt("volume", "list", "-o", "csv")).out)))
    assert [(row["name"], row["size_bytes"]) for row in rows] == [("v0", "512"), ("v1", "1024"), ("v2", "1536")]
    listed = (await blockvirt("volume", "list", "--output=json")).json
    assert listed == (await served.call("GET", "/v1/volumes")).json["volumes"]


async def test_all_pages_are_fetched(blockvirt: Command, served: Api) -> None:
    for number in range(1001):
        await served.services.catalogue.create(NewVolume(512, f"v{number:04}"))
    listed = await blockvirt("volume", "list", "-o", "csv")
    assert len(listed.out.splitlines()) == 1002


async def test_rounding_is_said_beside_the_output(blockvirt: Command) -> None:
    made = await blockvirt("volume", "create", "--size", "1000", "-o", "json")
    assert made.json["size_bytes"] == 1024
    assert "rounded up" in made.err


async def test_hosts_and_units(blockvirt: Command, served: Api) -> None:
    await served.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})
    assert (await blockvirt("host", "create", "web1")).code == 0
    assert (await blockvirt("lun", "map", "web1", "v", "--lun", "3", "-o", "json")).json["export"] == "web1/lun3"
    assert (await blockvirt("lun", "list", "web1", "-o", "json")).json[0]["volume"] == "v"
    assert (await blockvirt("lun", "list")).out.splitlines()[1].split()[:2] == ["web1/lun3", "v"]
    assert (await blockvirt("host", "list", "-o", "csv")).out.splitlines()[1].startswith("web1,active,1,")
    assert "web1/lun3" in (await blockvirt("host", "show", "web1")).out
    info = (await blockvirt("lun", "attach-info", "web1/lun3")).out
    for part in ("nbd+unix:///web1/lun3?socket=", "-blockdev", "reconnect-delay", "<disk", "nbd-client", "nbdcopy"):
        assert part in info
    assert "nbd+unix:///v?" in (await blockvirt("lun", "attach-info", "v")).out
    assert (await blockvirt("host", "delete", "web1")).code == 5
    for wrong in ("web1", "web1/lun", "/lun3", "web1/lun03", "web1/lun+3", "web1/lun3 ", "web1/lun\u0663"):
        assert (await blockvirt("lun", "unmap", wrong)).code == 1, wrong
    assert (await blockvirt("lun", "attach-info", "web1/lun03")).code == 4
    assert (await blockvirt("lun", "unmap", "web1/lun3")).code == 0, "it was there all the time"
    assert (await blockvirt("host", "delete", "web1")).code == 0


async def test_devices_and_pool(blockvirt: Command, served: Api, tmp_path: Path) -> None:
    made = await blockvirt(
        "device", "add", f"{tmp_path}/fast", "--limit", "10GiB", "--label", "media=nvme", "-o", "json"
    )
    assert (made.json["path"], made.json["limit_bytes"]) == (f"{tmp_path}/fast", 10 * GIB)
    relative = os.path.relpath(tmp_path / "slow")
    assert (await blockvirt("device", "add", relative, "-o", "json")).json["path"] == f"{tmp_path}/slow"
    assert [line.split()[0] for line in (await blockvirt("device", "list")).out.splitlines()] == [
        "NAME",
        "fast",
        "slow",
    ]
    assert (await blockvirt("device", "remove", "fast")).code == 0
    shown = await blockvirt("pool", "set", "--overcommit", "2.5", "-o", "json")
    assert shown.json["overcommit_ratio"] == 2.5
    assert shown.json["size_info"]["largest_bytes"] == 250 * GIB
    assert "because" in (await blockvirt("pool", "show")).out
    assert (await blockvirt("pool", "set")).code == 1
    assert (await blockvirt("pool", "set", "--overcommit", "0")).code == 1


async def test_sessions(blockvirt: Command, served: Api) -> None:
    volume = (await served.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})).json
    for _ in range(4):
        served.sessions.add("v", volume["id"])
    assert len((await blockvirt("session", "list", "-o", "json")).json) == 4
    assert (await blockvirt("session", "drop", "s0", "-o", "json")).json == {"dropped": 1}
    assert (await blockvirt("session", "drop", "s0")).code == 4
    assert (await blockvirt("volume", "resize", "v", "--size", "2GiB", "--reconnect")).code == 0
    assert served.sessions.open == []
    served.sessions.add("v", volume["id"])
    assert (await blockvirt("session", "drop")).code == 1
    assert len(served.sessions.open) == 1
    assert (await blockvirt("session", "drop", "--all", "-o", "json")).json == {"dropped": 1}


async def test_status(blockvirt: Command, served: Api) -> None:
    well = await blockvirt("status")
    assert well.code == 0
    assert well.out.startswith("daemon    ready\nlevel     ok\n")
    await served.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})
    await served.store.commit(lambda writer: writer.put(Table.BRANCHES, number_key(1), b"damaged"))
    damaged = await blockvirt("status")
    assert damaged.code == 1
    assert "volume v is damaged" in damaged.out
    await served.store.commit(lambda writer: writer.delete(Table.VOLUME_NAMES, b"v"))
    served.space.level = "near"
    near = await blockvirt("status", "-o", "json")
    assert (near.code, near.json["level"]) == (1, "near")
    assert "add a device" in near.json["problems"]
    served.not_ready.append("starting: recovering")
    assert (await blockvirt("status")).code == 1


async def test_failures_say_what_why_and_what_to_do(blockvirt: Command, served: Api, tmp_path: Path) -> None:
    refused = await blockvirt("volume", "create", "v", "--size", "10G")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("blockvirt: '10G' could mean two sizes\n")
    assert "  do:  write 10GiB" in refused.err
    full = await blockvirt("volume", "create", "v", "--size", "1001GiB", "-o", "json")
    assert full.code == 6
    assert json.loads(full.err)["details"]["would_fit_bytes"] == 1000 * GIB
    assert (await blockvirt("volume", "show", "none")).code == 4
    assert (await blockvirt("volume", "show", "a/../../pool")).code == 4
    assert (await blockvirt("volume", "show", "\udcff")).code == 4
    assert (await blockvirt("volume", "list", "--label", "a=\udcff")).code == 0
    assert (await blockvirt("volume", "create", "\udcff", "--size", "1GiB")).code == 1
    await served.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})
    assert (await blockvirt("volume", "create", "v", "--size", "2GiB")).code == 5
    assert (await blockvirt("volume", "create", "--size")).code == 2
    assert (await blockvirt("nonsense")).code == 2
    assert (await blockvirt("check", "--nonsense")).code == 1, "2 would say that the pool is corrupt"
    nobody = await run("-s", str(tmp_path / "nowhere"), "volume", "list")
    assert nobody.code == 3
    assert "nowhere/http.sock" in nobody.err
    assert "serve" in nobody.err
    as_json = await run("-s", str(tmp_path / "nowhere"), "volume", "list", "-o", "json")
    assert json.loads(as_json.err)["code"] == "daemon-unreachable"


async def test_a_state_directory_that_no_socket_fits_into_is_explained(tmp_path: Path) -> None:
    """'serve' would refuse it too, so it is no use to say that one should start it."""
    too_long = await run("-s", f"{tmp_path}/{'x' * 100}", "volume", "list")
    assert too_long.code == 1
    assert "107 is the most" in too_long.err
    assert "a shorter path" in too_long.err
    assert "serve" not in too_long.err
    fits = tmp_path / ("x" * (107 - len(f"{tmp_path}//http.sock")))
    assert len(os.fsencode(fits / "http.sock")) == 107
    assert (await run("-s", str(fits), "volume", "list")).code == 3, "the longest that a socket can have"


async def test_the_daemon_is_found_by_url_too(served: Api, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{served.server.port}"
    for words, environment in ((("--url", url), {}), ((), {"BLOCKVIRT_URL": url})):
        assert (await run(*words, "volume", "list", "-o", "json", environment=environment)).json == []
    by_state = {"BLOCKVIRT_STATE_DIR": str(tmp_path)}
    assert (await run("volume", "list", "-o", "json", environment=by_state)).json == []
    for bad in ("127.0.0.1", "http://127.0.0.1/x", "http://127.0.0.1:65536", "http://a..b", "http://[::1", "http://"):
        refused = await run("--url", bad, "volume", "list")
        assert (refused.code, "is not the URL" in refused.err) == (1, True), bad
    encrypted = await run("--url", "https://127.0.0.1:1", "volume", "list")
    assert (encrypted.code, "no TLS" in encrypted.err) == (1, True)
    assert (await run("--url", "http://127.0.0.1:1", "volume", "list")).code == 3


async def on_terminal(tmp_path: Path, width: int) -> str:
    """What `volume list` shows on a terminal of that width."""
    command = (sys.executable, "-c", LOADED, "-s", str(tmp_path), "volume", "list")
    code, shown, err = await run_on_terminal(*command, stream="stdout", width=width, terminal="x")
    assert code == 0, err
    return shown + ("drawn by rich" if "rich" in loaded(err.encode()) else "")


async def test_a_terminal_gets_sizes_for_people(served: Api, tmp_path: Path) -> None:
    """rich is imported for what needs it: cells that are folded, and characters that may be two cells wide."""
    await served.call("POST", "/v1/volumes", {"size": 3 * GIB // 2, "name": "v"})
    wide = await on_terminal(tmp_path, 80)
    assert wide.startswith("\x1b[1mNAME    SIZE  MAPPED")
    assert "\nv     1.5GiB      0B  available" in wide
    assert "rich" not in wide
    narrow = await on_terminal(tmp_path, 50)
    assert narrow.endswith("drawn by rich")
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in narrow.splitlines()[:-1]) <= 50
    await served.call("PATCH", "/v1/volumes/v", {"labels": {"a": "界"}})
    assert (await on_terminal(tmp_path, 80)).endswith("drawn by rich")


# Runs the command line and says on stderr which modules that took.
LOADED = """
import sys
import blockvirt.cli.main as program
try:
    program.main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def loaded(err: bytes) -> set[str]:
    """The modules, and the packages they are in."""
    return {name for module in err.decode().splitlines()[-1].split() for name in (module, module.split(".")[0])}


# What the standard library has for the purpose, too, costs more than the rest of a listing: http.client brings ssl and
# email, pathlib brings urllib.
HEAVY = {"pydantic", "aiohttp", "prometheus_client", "rich", "lmdb", "asyncio", "uvloop"}
HEAVY |= {"http", "ssl", "email", "urllib", "pathlib", "ipaddress", "logging", "subprocess", "shutil", "tempfile"}


@pytest.mark.parametrize("output", ["table", "json", "csv"])
@pytest.mark.parametrize(
    "words",
    [
        *(("volume", "list"), ("volume", "create", "x", "--size", "1GiB"), ("host", "list"), ("device", "list")),
        *(("session", "list"), ("pool", "show"), ("lun", "list"), ("snapshot", "list"), ("job", "list")),
        *(("schedule", "list"), ("trash", "list")),
    ],
    ids=" ".join,
)
async def test_client_commands_import_nothing_heavy(
    served: Api, tmp_path: Path, words: tuple[str, ...], output: str
) -> None:
    """A listing takes less than 100 ms because of what it does not import; that is what can be held by a test."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOADED, "-s", str(tmp_path), *words, "-o", output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    modules = loaded(err)
    assert not modules & HEAVY
    assert ("csv" in modules) == (output == "csv")
    commands = {"volumes", "hosts", "pool", "sessions", "process", "snapshots", "jobs", "schedules", "trash"}
    groups = commands & {name.rpartition(".")[2] for name in modules}
    assert len(groups) == 1, "and none of the other commands"


@pytest.mark.parametrize("words", [("status",), ("--help",), ("serve", "--help"), ("check", "--help")], ids=" ".join)
async def test_other_commands_import_no_daemon(served: Api, tmp_path: Path, words: tuple[str, ...]) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOADED, "-s", str(tmp_path), *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert not loaded(err) & {"pydantic", "aiohttp", "prometheus_client", "rich", "lmdb", "asyncio", "http", "ssl"}


@pytest.mark.parametrize("output", ["table", "json", "csv"])
@pytest.mark.parametrize("words", [("volume", "list"), ("volume", "show", "v")])
async def test_an_output_that_could_not_be_written_is_no_success(
    served: Api, tmp_path: Path, words: tuple[str, ...], output: str
) -> None:
    await served.call("POST", "/v1/volumes", {"size": 512, "name": "v"})
    with open("/dev/full", "w") as full:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "blockvirt", "-s", str(tmp_path), *words, "-o", output),
            stdout=full,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"Error: the output is not complete: No space left on device\n")


@pytest.mark.parametrize("output", ["table", "json", "csv"])
async def test_a_reader_that_has_seen_enough_ends_a_command(served: Api, tmp_path: Path, output: str) -> None:
    """As 'blockvirt volume list | head' does: no word about it, and the exit code that a shell gives to SIGPIPE."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "blockvirt", "-s", str(tmp_path), "volume", "list", "-o", output),
        stdout=write_end,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(write_end)
    _, err = await process.communicate()
    assert (process.returncode, err) == (141, b"")
