"""Who may import what: libraries that belong to one room, the NBD room's narrow view, and the pure modules.

The order of the rooms themselves is in ``.importlinter`` (``make lint``). These rules read the real import graph, so
a module that is added is covered without being named here.
"""

from functools import cache

import grimp
import pytest

# A library that only one room may import, because swapping or upgrading it must stay that room's business.
OWNERS = {
    "lmdb": ("blockvirt.meta",),
    "aiohttp": ("blockvirt.api",),
    "prometheus_client": ("blockvirt.metrics",),
    "pydantic": ("blockvirt.config", "blockvirt.api"),
    "pydantic_settings": ("blockvirt.config",),
    "click": ("blockvirt.cli",),
    "rich": ("blockvirt.cli",),
    "google_crc32c": ("blockvirt.checksum",),
    "crcmod": ("blockvirt.checksum",),
    "backports": ("blockvirt.snapshots",),
    "compression": ("blockvirt.snapshots",),
    "uvloop": ("blockvirt.daemon",),
    "cronsim": ("blockvirt.snapshots",),
}

# Modules whose state space is large: they decide, others do. They are tested without a clock, a loop or a disk.
PURE = {
    "blockvirt.nbd.constants",
    "blockvirt.nbd.messages",
    "blockvirt.nbd.handshake",
    "blockvirt.nbd.transmission",
    "blockvirt.lun.leaf",
    "blockvirt.lun.leaf_diff",
    "blockvirt.lun.versions",
    "blockvirt.snapshots.diff",
    "blockvirt.lun.address",
    "blockvirt.lun.plan",
    "blockvirt.meta.records",
    "blockvirt.meta.keys",
    "blockvirt.pool.placement",
    "blockvirt.pool.space",
    "blockvirt.snapshots.stream_format",
    "blockvirt.snapshots.stream_header",
    "blockvirt.snapshots.stream_reader",
    "blockvirt.snapshots.cron",
    "blockvirt.snapshots.retention",
    "blockvirt.volumes.job_states",
    "blockvirt.volumes.job_views",
    "blockvirt.volumes.journal_frames",
}
IMPURE_LIBRARIES = {"asyncio", "os", "time", "random", "secrets", "socket", "threading", "subprocess", "lmdb"}

VOCABULARY = {
    f"blockvirt.{name}"
    for name in (
        *("checksum", "clock", "device", "errors", "ids", "limits", "notify", "syscalls", "tasks", "units"),
        "unix_listener",
    )
}
# Parts of the vocabulary that touch the world: not for pure modules. device.py names asyncio.Future as a type only.
IMPURE_VOCABULARY = {f"blockvirt.{name}" for name in ("clock", "notify", "syscalls", "tasks", "unix_listener")}


@cache
def graph(*, with_types: bool = True) -> grimp.ImportGraph:
    """The package's import graph, libraries as single nodes; ``with_types``: imports for type checkers count too."""
    return grimp.build_graph(
        "blockvirt", include_external_packages=True, exclude_type_checking_imports=not with_types, cache_dir=None
    )


def room_of(module: str) -> str:
    """The room (or top-level module) that ``module`` lies in: 'blockvirt.nbd' for 'blockvirt.nbd.session'."""
    return ".".join(module.split(".")[:2])


def own_modules() -> set[str]:
    """All modules of the package, without the packages that only hold a docstring."""
    return {module for module in graph().modules if module.split(".")[0] == "blockvirt"}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_room_only(library: str) -> None:
    """Importing it elsewhere, even inside a function, breaks the room's promise."""
    if library not in graph().modules:
        return  # nobody imports it (yet), so nobody imports it wrongly
    importers = graph().find_modules_that_directly_import(library)
    strangers = {module for module in importers if room_of(module) not in OWNERS[library]}
    assert not strangers, f"{library} belongs to {OWNERS[library]}"


def test_nbd_sees_only_the_seam_and_the_vocabulary() -> None:
    """The protocol knows volumes through device.py alone, so that any engine can stand behind it."""
    allowed = VOCABULARY | {"blockvirt"}
    for module in sorted(own_modules()):
        if room_of(module) != "blockvirt.nbd":
            continue
        for imported in graph().find_modules_directly_imported_by(module):
            if imported.startswith("blockvirt") and room_of(imported) != "blockvirt.nbd":
                assert imported in allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_a_pure_module_imports_nothing_that_touches_the_world(module: str) -> None:
    """No loop, clock, chance, file or socket, neither directly nor through another of our modules."""
    if module not in own_modules():
        pytest.fail(f"{module} is not there: was it renamed? Then name it here anew, so that it stays pure")
    imported = graph().find_modules_directly_imported_by(module)
    assert not imported & IMPURE_LIBRARIES
    allowed = PURE | (VOCABULARY - IMPURE_VOCABULARY) | {"blockvirt"}
    ours = {name for name in imported if name.split(".")[0] == "blockvirt"}
    assert ours <= allowed, f"{module} leans on modules that are not pure: {sorted(ours - allowed)}"


def test_nothing_but_tests_imports_the_test_doubles() -> None:
    """blockvirt.testing ships for others' tests; the product itself must not lean on it."""
    for module in own_modules():
        if room_of(module) == "blockvirt.testing":
            importers = graph().find_modules_that_directly_import(module)
            assert {room_of(importer) for importer in importers} <= {"blockvirt.testing"}, module


@pytest.mark.parametrize("module", sorted(own_modules()))
def test_imports_form_no_cycle(module: str) -> None:
    """A module that reaches itself cannot be understood, or loaded, alone. Names for type checkers may."""
    loaded = graph(with_types=False)
    for imported in loaded.find_modules_directly_imported_by(module):
        assert module not in loaded.find_upstream_modules(imported), f"by way of {imported}"
