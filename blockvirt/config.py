"""The daemon's settings: a TOML file, BLOCKVIRT_* environment variables and the command line, the last one wins.

Frozen, and unknown keys are refused: a misspelt setting that is ignored is found out at the worst time. Only ``serve``
and the daemon import this (pydantic takes 150 ms).
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from blockvirt.api.server import check_listen_host
from blockvirt.errors import InvalidRequest
from blockvirt.limits import (
    DEFAULT_CHUNK_BYTES,
    LEAF_CACHE_BYTES,
    MAX_TRASH_S,
    METADATA_RESERVE_BYTES,
    SCRUB_MIN_RATE_BYTES,
    SCRUB_RATE_BYTES,
    TRASH_S,
)
from blockvirt.snapshots.cron import check_cron
from blockvirt.units import MIB, format_size, parse_size
from blockvirt.unix_listener import check_unix_path

Size = Annotated[int, BeforeValidator(parse_size)]
NOWHERE = "none"


class Settings(BaseSettings):
    """Everything that can be set. Sizes are bytes, or strings with a unit."""

    model_config = SettingsConfigDict(env_prefix="BLOCKVIRT_", extra="forbid", frozen=True, validate_default=True)

    state_dir: Path = Field(
        Path("/var/lib/blockvirt"), description="Metadata, lock and sockets of the pool. One daemon per directory."
    )
    devices: tuple[Path, ...] = Field(
        (),
        description="Directories that belong to the pool from now on; those that do already are left alone. "
        "At the first start without any, 'pool' in the state directory.",
    )
    http: str = Field(
        "127.0.0.1:8470",
        description="HOST:PORT of the HTTP API on loopback (port 0 picks one), or 'none'. "
        "The unix socket 'http.sock' in the state directory is there always.",
    )
    nbd: str = Field(
        "127.0.0.1:10809",
        description="HOST:PORT of the NBD server on loopback (port 0 picks one), or 'none'. "
        "The unix socket 'nbd.sock' in the state directory is there always.",
    )
    chunk_size: Size = Field(
        DEFAULT_CHUNK_BYTES,
        description="Unit of allocation and copy-on-write, a power of two from 4KiB to 1MiB. "
        "Only when the pool is created.",
    )
    leaf_cache: Size = Field(
        LEAF_CACHE_BYTES, ge=MIB, description="Memory for the maps of volumes; 128MiB hold the hot map of 220GiB."
    )
    metadata_reserve: Size = Field(
        METADATA_RESERVE_BYTES,
        ge=MIB,
        description="Space kept back for metadata, so that checkpoints and deletions work on a full disk.",
    )
    trash_s: float = Field(
        TRASH_S,
        ge=0,
        le=MAX_TRASH_S,
        allow_inf_nan=False,
        description="Seconds that a deleted volume can be had back, ten years at most; 0: it is gone for good at once.",
    )
    scrub_schedule: str = Field(
        "0 3 1 * *",
        description="When everything on the disks is read and compared with its checksums: five fields as in "
        "crontab(5), in UTC; empty: only when asked for. Once a month is what distributions do for RAID and ZFS.",
    )
    scrub_rate: Size = Field(
        SCRUB_RATE_BYTES, ge=SCRUB_MIN_RATE_BYTES, description="Bytes per second that a scrub reads at most."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged to stderr.")

    @field_validator("http", "nbd")
    @classmethod
    def _is_address(cls, text: str) -> str:
        if text != NOWHERE:
            check_listen_host(split_address(text)[0])
        return text

    @field_validator("scrub_schedule")
    @classmethod
    def _is_cron(cls, text: str) -> str:
        try:
            return check_cron(text) if text.strip() else ""
        except InvalidRequest as error:
            raise ValueError(f"{error.message}; {error.correction}") from error

    @property
    def http_address(self) -> tuple[str, int] | None:
        """Host and port of the HTTP API; None: only the unix socket."""
        return None if self.http == NOWHERE else split_address(self.http)

    @property
    def nbd_address(self) -> tuple[str, int] | None:
        """Host and port of the NBD server; None: only the unix socket."""
        return None if self.nbd == NOWHERE else split_address(self.nbd)

    @property
    def http_socket(self) -> Path:
        """The unix socket of the HTTP API, absolute."""
        return self.state_dir.absolute() / "http.sock"

    @property
    def nbd_socket(self) -> Path:
        """The unix socket of the NBD server, absolute: it stands in URIs."""
        return self.state_dir.absolute() / "nbd.sock"


def split_address(text: str) -> tuple[str, int]:
    """Return (host, port) of 'HOST:PORT' or '[IPv6]:PORT'; raises InvalidRequest."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(
            f"{text!r} is no address to listen on", correction="write HOST:PORT, [::1]:PORT, or 'none' for no TCP"
        )
    return bare, int(port)


def load(config_file: Path | None = None, *, default_state_dir: Path | None = None, **given: Any) -> Settings:
    """Return the settings: ``given`` (the command line, None means not given), environment, file, defaults.

    ``default_state_dir`` is the state directory where nothing else names one.

    Raises InvalidRequest that names the file and the key, or what is wrong with an address or a path.
    """
    from_file = {} if default_state_dir is None else {"state_dir": default_state_dir}
    from_file |= _read(config_file) if config_file is not None else {}
    where = f" in {config_file} or the environment" if config_file is not None else ""

    class Layered(Settings):
        """Settings with the file below the environment."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=dict(from_file))

    try:
        settings = Layered(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
        raise InvalidRequest(
            f"the settings{where} are not valid: {wrong}",
            correction="'blockvirt serve --print-config' shows every setting with its default",
        ) from None
    check_unix_path(str(settings.http_socket))
    check_unix_path(str(settings.nbd_socket))
    return settings


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest(f"the config file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"the config file {path} is not TOML: {error}",
            correction="'blockvirt serve --print-config' prints one that is",
        ) from error


def reference() -> str:
    """Return a TOML file with every setting, its default and what it means: the generated reference."""
    lines = ["# blockvirt's settings with their defaults. Each can also be set as BLOCKVIRT_<NAME>.", ""]
    for name, field in Settings.model_fields.items():
        lines += [*_wrapped(str(field.description)), f"# {name} = {_toml(field)}", ""]
    return "\n".join(lines)


def _toml(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{each}"' for each in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f'"{format_size(value)}"'
    return f'"{value}"'


def _wrapped(text: str) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + len(word) + 1 > 100:
            lines.append(line)
            line = "#"
        line += " " + word
    return [*lines, line]


def reference_document() -> str:
    """Return docs/configuration.md, which a test compares with this."""
    return (
        "# Configuration\n\n"
        "`blockvirt serve --config FILE` reads a TOML file. An environment variable `BLOCKVIRT_<NAME>` overrides the\n"
        "file, a command line option overrides both. Unknown keys are refused.\n\n"
        "This is what `blockvirt serve --print-config` prints, and the whole reference:\n\n"
        f"```toml\n{reference()}```\n"
    )
