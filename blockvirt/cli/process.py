"""``blockvirt serve``, ``check`` and ``status``: the commands about the daemon itself."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blockvirt.cli.client import EXIT_FAILED
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.output import Column, output_option, show_one, show_rows, size_for_people
from blockvirt.cli.scrub import damage_in_words

if TYPE_CHECKING:
    from blockvirt.volumes.ports import Endpoints

FINDINGS = (
    Column("SEVERITY", "severity"),
    Column("CODE", "code"),
    Column("WHAT", "what"),
    Column("MESSAGE", "message"),
)
STATUS = (
    Column("DAEMON", "daemon"),
    Column("LEVEL", "level"),
    Column("CAPACITY", "capacity_bytes", "size"),
    Column("USED", "used_bytes", "size"),
    Column("FREE", "free_bytes", "size"),
    Column("PROMISED", "promised_bytes", "size"),
    Column("VOLUMES", "volumes", "number"),
    Column("SESSIONS", "sessions", "number"),
    Column("PROBLEMS", "problems"),
)

_DAMAGE_TOLD = 5  # pieces of it in a status: one disk that fails may bring thousands


@click.command("serve")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="A TOML file; see --print-config.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A directory for the pool; may be repeated. Without any: 'pool' in the state directory.",
)
@click.option("--http", help="HOST:PORT of the HTTP API on loopback, or 'none'; default 127.0.0.1:8470, :0 picks one.")
@click.option(
    "--nbd", help="HOST:PORT of the NBD server on loopback, or 'none'; default 127.0.0.1:10809, :0 picks one."
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Default: info.")
@click.option("--print-config", is_flag=True, help="Print every setting with its default, and exit.")
@click.pass_context
def serve(
    click_context: click.Context,
    config: Path | None,
    devices: tuple[Path, ...],
    http: str | None,
    nbd: str | None,
    log_level: str | None,
    print_config: bool,
) -> None:
    """Run the daemon in the foreground: the pool, the HTTP API and the NBD server.

    SIGTERM and SIGINT stop it: what clients have in flight is answered, volumes are checkpointed. Guests with a
    reconnect-delay wait for the next start.
    """
    # pydantic and aiohttp take 300 ms; client commands do without.
    from blockvirt.cli.greeting import greeting, program_name
    from blockvirt.config import load, reference

    if print_config:
        click.echo(reference(), nl=False)
        return
    context: Context = click_context.obj
    # The group's default must not hide what the file says.
    source = click_context.parent.get_parameter_source("state_dir") if click_context.parent else None
    state_dir = Path(context.state_dir)
    settings = load(
        config,
        default_state_dir=state_dir,
        state_dir=None if source is click.core.ParameterSource.DEFAULT else state_dir,
        devices=devices or None,
        http=_with_host(http),
        nbd=_with_host(nbd),
        log_level=log_level,
    )
    program = program_name(sys.argv[0])

    def announce(endpoints: "Endpoints") -> None:
        print(greeting(endpoints, str(settings.state_dir), program), flush=True)

    from blockvirt import daemon

    daemon.serve(settings, announce)


def _with_host(address: str | None) -> str | None:
    """':0' means loopback, any free port."""
    return f"127.0.0.1{address}" if address is not None and address.startswith(":") else address


@click.command("check")
@click.option("--repair", is_flag=True, help="Remove leaks: space and rows that nothing refers to.")
@click.option(
    "--restore-metadata",
    is_flag=True,
    help="Bring back the newest intact copy of the metadata that a device holds; the damaged one is kept aside.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to look for copies, if the metadata is too damaged to name its devices; may be repeated.",
)
@click.option("--data", is_flag=True, help="Also read all chunks that a snapshot has sealed, and compare checksums.")
@output_option
@pass_context
def check(
    context: Context, repair: bool, restore_metadata: bool, devices: Sequence[Path], data: bool, output: str
) -> int:
    """Prove the pool's invariants over metadata and files, offline: the daemon must not run.

    \b
    Exit codes:
      0  clean
      1  the check could not run, or not look at everything (a device is missing ...)
      2  corrupt: something that must hold does not
      3  leaks only: space that nothing refers to; --repair removes them
    """
    from blockvirt.check import run

    report = run(
        Path(context.state_dir),
        repair=repair,
        restore_metadata=restore_metadata,
        devices=tuple(devices),
        data=data,
        progress=_show_reading if sys.stderr.isatty() else lambda done_bytes, total_bytes: None,
    )
    findings = [
        {"severity": each.severity.value, "code": each.code, "what": each.what, "message": each.message}
        for each in report.findings
    ]
    if output == "json":
        show_one({"summary": report.summary, "exit_code": report.exit_code, "findings": findings}, (), output)
    elif findings or output == "csv":
        show_rows(findings, FINDINGS, output)
    click.echo(report.summary, err=output != "table")
    return int(report.exit_code)


def _show_reading(done_bytes: int, total_bytes: int) -> None:
    end = "\n" if done_bytes == total_bytes else ""
    click.echo(f"\rread {size_for_people(done_bytes)} of {size_for_people(total_bytes)}{end}", nl=False, err=True)


@click.command("status")
@output_option
@pass_context
def status(context: Context, output: str) -> int:
    """Say how the daemon and the pool are; exit code 1 unless all is well."""
    ready = context.client.call("GET", "/readyz")
    if ready["status"] != "ok":
        show_one({"daemon": f"{ready['status']}: {ready.get('reason', '')}", "ready": ready}, STATUS[:1], output)
        return EXIT_FAILED
    pool: dict[str, Any] = context.client.call("GET", "/v1/pool")
    problems = [f"device {device['name']}: {device['problem']}" for device in pool["devices"] if "problem" in device]
    problems += [
        f"volume {volume['name']} is {volume['state']}: {volume['damage']}"
        for volume in context.client.pages("/v1/volumes", "volumes")
        if volume["state"] in ("stopped", "damaged")
    ]
    standing = context.client.call("GET", "/v1/scrubs")["standing"]
    problems += [f"damaged: {damage_in_words(each)}" for each in standing[:_DAMAGE_TOLD]]
    if len(standing) > _DAMAGE_TOLD:
        problems.append(f"{len(standing) - _DAMAGE_TOLD} more pieces of damage: 'blockvirt scrub status' names them")
    if pool["level"] != "ok":
        problems.append(f"the pool is at level '{pool['level']}': add a device, delete or trim volumes")
    pool |= {
        "daemon": "ready",
        "sessions": len(context.client.call("GET", "/v1/sessions")["sessions"]),
        "problems": "; ".join(problems) or "none",
    }
    show_one(pool, STATUS, output)
    return EXIT_FAILED if problems else 0
