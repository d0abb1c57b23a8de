"""Debian's kernel for the guest: downloaded as a package, unpacked, never installed, and kept for the next run."""

import os
import re
import shutil
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.real.clients import run

# What every guest loads. ext4 finds crc32c by name at mount time, which modprobe cannot know.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4", "nbd")
FURTHER_MODULES = ("xfs",)  # they cost a guest a second: for who asks for them
_PICKED = (*MODULES, *FURTHER_MODULES)
_KIND = f"{zlib.crc32(' '.join(_PICKED).encode()):08x}"  # a kernel that was kept with other modules is none for us


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image and the modules to load, in an order in which each finds what it needs."""

    image: Path
    modules: tuple[Path, ...]


def cache_directory() -> Path:
    """Where kernels are kept: BLOCKVIRT_TEST_CACHE, else below the user's cache directory."""
    chosen = os.environ.get("BLOCKVIRT_TEST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockvirt-tests"


def debian_kernel(*further: str) -> Kernel:
    """The kernel that linux-image-amd64 depends on, from the cache or from Debian; skips the test without either.

    `further` are those of FURTHER_MODULES that the guest is to load.
    """
    kept = sorted(cache_directory().glob(f"linux-image-*.{_KIND}"))
    return _load(kept[-1] if kept else _fetch(cache_directory()), {*MODULES, *further})


def _load(directory: Path, wanted: set[str]) -> Kernel:
    lines = [line.split() for line in (directory / "order").read_text().splitlines()]
    return Kernel(directory / "vmlinuz", tuple(directory / name for module, name in lines if module in wanted))


def _fetch(cache: Path) -> Path:
    package = _package_name()
    cache.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that a run that is interrupted leaves no half of a kernel behind.
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        work = Path(scratch)
        run("apt-get", "download", package, cwd=work)
        (archive,) = work.glob("*.deb")
        tree, built = work / "tree", work / "built"
        run("dpkg-deb", "-x", archive, tree)
        _pick(tree, built)
        final = cache / f"{package}.{_KIND}"
        try:
            built.rename(final)
        except OSError:
            if not final.exists():  # another run was first, and its kernel is as good as ours
                raise
        return final


def _package_name() -> str:
    shown = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, timeout=60)
    found = re.search(r"Depends: (linux-image-\S+)", shown.stdout)
    if found is None:
        pytest.skip("Debian's package lists do not know linux-image-amd64: run apt-get update")
    return found.group(1)


def _pick(tree: Path, built: Path) -> None:
    """Copy the image and the modules out of the unpacked package: 400 MB become 12."""
    (version,) = (path.name for path in (tree / "lib" / "modules").iterdir())
    run("depmod", "-b", tree, version)
    built.mkdir()
    shutil.copyfile(tree / "boot" / f"vmlinuz-{version}", built / "vmlinuz")
    order: dict[str, str] = {}  # file name -> the module for whose sake it is there
    for module in _PICKED:
        for line in run("modprobe", "-S", version, "-d", tree, "--show-depends", module).splitlines():
            verb, path = line.split()[:2]
            name = Path(path).name
            if verb == "insmod" and name not in order:
                shutil.copyfile(path, built / name)
                order[name] = module
    (built / "order").write_text("".join(f"{module} {name}\n" for name, module in order.items()))
