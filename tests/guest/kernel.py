"""Debian's kernel for the guest: downloaded as a package, unpacked, never installed, and kept for the next run."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.real.clients import run

# What the guest loads. ext4 finds crc32c by name at mount time, which modprobe cannot know.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4", "nbd")


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


def debian_kernel() -> Kernel:
    """The kernel that linux-image-amd64 depends on, from the cache or from Debian; skips the test without either."""
    kept = sorted(cache_directory().glob("linux-image-*"))
    return _load(kept[-1] if kept else _fetch(cache_directory()))


def _load(directory: Path) -> Kernel:
    names = (directory / "order").read_text().split()
    return Kernel(directory / "vmlinuz", tuple(directory / name for name in names))


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
        final = cache / package
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
    """Copy the image and the modules out of the unpacked package: 400 MB become 10."""
    (version,) = (path.name for path in (tree / "lib" / "modules").iterdir())
    run("depmod", "-b", tree, version)
    built.mkdir()
    shutil.copyfile(tree / "boot" / f"vmlinuz-{version}", built / "vmlinuz")
    order: list[str] = []
    for module in MODULES:
        for line in run("modprobe", "-S", version, "-d", tree, "--show-depends", module).splitlines():
            verb, path = line.split()[:2]
            name = Path(path).name
            if verb == "insmod" and name not in order:
                shutil.copyfile(path, built / name)
                order.append(name)
    (built / "order").write_text("\n".join(order))
