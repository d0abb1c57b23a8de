"""Settings in layers, their generated reference, the service unit and what is told to systemd."""

import configparser
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from blockvirt.cli.greeting import greeting, program_name
from blockvirt.config import Settings, load, reference, reference_document, split_address
from blockvirt.errors import InvalidRequest
from blockvirt.notify import notify
from blockvirt.units import GIB
from blockvirt.unix_listener import check_unix_path
from blockvirt.volumes.ports import Endpoints
from tests.cli.conftest import ROOT, run

UNIT = ROOT / "contrib" / "systemd" / "blockvirt.service"
SOCKET_UNIT = UNIT.with_suffix(".socket")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing from outside."""
    for name in [name for name in os.environ if name.startswith("BLOCKVIRT_") and name != "BLOCKVIRT_TEST_SERVER"]:
        monkeypatch.delenv(name)


def test_the_last_layer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "blockvirt.toml"
    file.write_text('http = "127.0.0.1:1"\nnbd = "127.0.0.1:1"\nleaf_cache = "2GiB"\ndevices = ["/a", "/b"]\n')
    monkeypatch.setenv("BLOCKVIRT_HTTP", "127.0.0.1:2")
    monkeypatch.setenv("BLOCKVIRT_NBD", "127.0.0.1:2")
    settings = load(file, default_state_dir=tmp_path, nbd="127.0.0.1:3", log_level=None)
    assert settings.leaf_cache == 2 * GIB
    assert settings.devices == (Path("/a"), Path("/b"))
    assert (settings.http_address, settings.nbd_address) == (("127.0.0.1", 2), ("127.0.0.1", 3))
    assert settings.log_level == "info"
    assert settings.state_dir == tmp_path
    assert load(default_state_dir=tmp_path, state_dir=Path("/x")).state_dir == Path("/x")
    monkeypatch.setenv("BLOCKVIRT_STATE_DIR", "/from-environment")
    assert load(default_state_dir=tmp_path).state_dir == Path("/from-environment")


def test_scrubs_are_monthly_or_never() -> None:
    assert load().scrub_schedule == "0 3 1 * *"
    assert load(scrub_schedule="").scrub_schedule == ""
    assert load(scrub_schedule=" 0  4 * * SUN ").scrub_schedule == "0 4 * * SUN"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().http = "none"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('htpp = "127.0.0.1:1"', "htpp"),
        ("devices = 5", "devices"),
        ('chunk_size = "64K"', "could mean two sizes"),
        ('scrub_schedule = "monthly"', "not a cron expression"),
        ('scrub_rate = "1KiB"', "scrub_rate"),
        ('leaf_cache = "1KiB"', "leaf_cache"),
        ('log_level = "loud"', "log_level"),
        ('http = "0.0.0.0:80"', "refused to listen"),
        ('nbd = "192.168.0.1:10809"', "refused to listen"),
        ('http = "8470"', "no address"),
        ('http = "::1:8470"', "no address"),
        ('http = "127.0.0.1:65536"', "no address"),
        ("http = ", "not TOML"),
        (f'state_dir = "/{"x" * 200}"', "107 is the most"),
        ("trash_s = 1e12", "trash_s: Input should be less than or equal to 315360000"),
        ("trash_s = inf", "trash_s: Input should be a finite number"),
        ("trash_s = nan", "trash_s: Input should be a finite number"),
        ("trash_s = -1", "trash_s: Input should be greater than or equal to 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "blockvirt.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=re.escape(complaint)):
        load(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.toml cannot be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="not TOML"):
        load(tmp_path / "binary.toml")


def test_addresses() -> None:
    assert split_address("localhost:0") == ("localhost", 0)
    assert split_address("[::1]:10809") == ("::1", 10809)
    assert load(http="none", nbd="[::1]:0").http_address is None


def test_the_reference_is_complete_and_loads(tmp_path: Path) -> None:
    """With its comment signs taken away every line of it is a setting with its default."""
    lines = [line.removeprefix("# ") for line in reference().splitlines() if re.match(r"# [a-z_]+ = ", line)]
    assert {line.split(" = ")[0] for line in lines} == set(Settings.model_fields)
    file = tmp_path / "blockvirt.toml"
    file.write_text("\n".join(lines))
    defaults = load().model_dump()
    assert load(file).model_dump() == defaults
    assert tomllib.loads(reference()) == {}, "as printed it changes nothing"


def test_the_document_is_generated() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == reference_document(), (
        "write docs/configuration.md anew with blockvirt.config.reference_document()"
    )


async def test_serve_prints_the_reference() -> None:
    assert (await run("serve", "--print-config")).out == reference()


async def test_serve_refuses_what_is_not_safe(tmp_path: Path) -> None:
    for option in ("--http", "--nbd"):
        refused = await run("-s", str(tmp_path / "var"), "serve", option, "0.0.0.0:0")
        assert refused.code == 1
        assert "refused to listen on '0.0.0.0'" in refused.err
        assert "later release" in refused.err
    long = await run("-s", f"{tmp_path}/{'x' * 100}", "serve")
    assert "107 is the most" in long.err
    assert list(tmp_path.iterdir()) == [], "nothing was touched"


# --- systemd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@blockvirt-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if abstract else address)
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1\nSTATUS=serving")
        assert listener.recv(100) == b"READY=1\nSTATUS=serving"


def test_nobody_to_tell_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")


@pytest.mark.requires("systemd-analyze")
def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/blockvirt", sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert scored.returncode == 0, scored.stdout
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    control = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit], capture_output=True, check=False
    )
    assert control.returncode != 0, "a unit without hardening must not pass"


def unit_file(path: Path) -> configparser.RawConfigParser:
    """A unit as systemd reads it: keys keep their case, and may come again."""
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


def test_the_socket_unit_is_not_in_the_way_of_the_daemon() -> None:
    """The service opens its own sockets; the unit's lies elsewhere, for the service of the same name."""
    service, unit = unit_file(UNIT), unit_file(SOCKET_UNIT)["Socket"]
    assert SOCKET_UNIT.stem == UNIT.stem
    assert "Service" not in unit
    settings = load(state_dir=Path(service["Service"]["ExecStart"].split()[2]))
    own = {str(settings.nbd_socket), str(settings.http_socket), settings.nbd, settings.http}
    assert "/var/lib/blockvirt/nbd.sock" in own
    assert unit["ListenStream"] not in own
    assert Path(unit["ListenStream"]).is_absolute()
    assert unit["ListenStream"] in (ROOT / "docs" / "operations.md").read_text()
    check_unix_path(unit["ListenStream"])
    assert int(unit["SocketMode"], 8) & 0o007 == 0, "without credentials it is not for everybody"
    assert unit.get("Accept", "no") == "no"
    assert unit["SocketUser"] == service["Service"]["User"]


@pytest.mark.requires("systemd-analyze")
def test_the_socket_unit_is_valid(tmp_path: Path) -> None:
    units = [tmp_path / UNIT.name, tmp_path / SOCKET_UNIT.name]
    units[0].write_text(UNIT.read_text().replace("/usr/bin/blockvirt", sys.executable))
    units[1].write_text(SOCKET_UNIT.read_text())
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    units[1].write_text(SOCKET_UNIT.read_text().replace("ListenStream=", "ListenSteam="))
    control = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert "ListenSteam" in control.stderr, "a misspelt unit must not pass"


# --- the greeting ----------------------------------------------------------------------------------------------------


def test_the_greeting_can_be_pasted() -> None:
    endpoints = Endpoints("/s d", "/s d/http.sock", "/s d/nbd.sock", "::1", 8470, "127.0.0.1", 10809)
    text = greeting(endpoints, "s d", ".venv/bin/blockvirt")
    assert "  .venv/bin/blockvirt -s 's d' volume create v --size 1GiB\n" in text
    assert "http://[::1]:8470" in text
    assert "nbdinfo 'nbd+unix:///v?socket=/s%20d/nbd.sock'" in text
    assert "http://" not in greeting(Endpoints("/s", "/s/http.sock", "/s/nbd.sock"), "s", "blockvirt")


def test_the_program_is_called_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "blockvirt"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    assert program_name(str(program)) == str(program)
    assert program_name(".venv/bin/blockvirt") == ".venv/bin/blockvirt"
    assert program_name("/x/blockvirt/__main__.py").endswith(" -m blockvirt")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program_name(str(program)) == "blockvirt"
