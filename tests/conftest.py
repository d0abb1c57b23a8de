"""What every test may rely on: tools that are declared, skips that are named, random runs that can be replayed.

``@pytest.mark.requires("qemu-nbd", "root")`` on a test, a class or a module (``pytestmark``) says what it needs. What
is missing skips the test with its reason; with CI=true it fails it, because a skipped test looks like a passed one.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
DEBIAN_PACKAGES = Path("/usr/lib/python3/dist-packages")
CI = os.environ.get("CI", "").lower() in ("true", "1", "yes")

# Debian keeps mkfs and losetup out of the search path of ordinary users.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# A shell has what runs in its background ignore Ctrl-C, and children of children too; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _packages_of_programs() -> dict[str, str]:
    """Which Debian package brings which program, from the list that the installer reads."""
    packages: dict[str, str] = {}
    for line in (ROOT / "tools" / "test-tools.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, *programs = line.split()
            packages |= dict.fromkeys(programs, package)
    return packages


def _import_debian_libnbd() -> str:
    """Import Debian's binding for its own Python version only; return why it is not there, or nothing.

    The path is taken away again: Debian's other packages must not stand in for what the project should declare.
    """
    if sys.version_info[:2] != (3, 11):
        return "Debian 12 builds python3-libnbd for Python 3.11"
    sys.path.append(str(DEBIAN_PACKAGES))
    try:
        import nbd  # noqa: F401
    except ImportError as error:
        return f"Debian package python3-libnbd: {error}"
    finally:
        sys.path.remove(str(DEBIAN_PACKAGES))
    return ""


LIBNBD_MISSING = _import_debian_libnbd()
LEFT_OUT = pytest.StashKey[int]()


def _root_missing() -> str:
    return "" if os.geteuid() == 0 else "needs root"


def _loop_missing() -> str:
    return _root_missing() or ("" if Path("/dev/loop-control").exists() else "no loop devices here")


def _fuse_missing() -> str:
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "no /dev/fuse here"


# What is not a program: name -> why it is missing, or nothing.
CAPABILITIES: dict[str, Callable[[], str]] = {
    "root": _root_missing,
    "loop": _loop_missing,
    "fuse": _fuse_missing,
    "libnbd": lambda: LIBNBD_MISSING,
}


def why_missing(requirement: str) -> str:
    """Return why ``requirement`` (a program or a capability) cannot be had here; nothing if it can."""
    if requirement in CAPABILITIES:
        return CAPABILITIES[requirement]()
    if shutil.which(requirement) is not None:
        return ""
    package = _packages_of_programs().get(requirement)
    return f"{requirement} is missing" + (f" (Debian package {package})" if package else "")


def _register_hypothesis_profiles() -> None:
    """One run like the other by default; HYPOTHESIS_PROFILE=deep searches anew each time, and prints how to replay."""
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True, database=None)
    hypothesis.settings.register_profile("deep", max_examples=5_000, deadline=None, print_blob=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


_register_hypothesis_profiles()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "requires(name...): programs or capabilities (root, loop, fuse, libnbd) needed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no worker is left alone with them; leave out what no install can bring."""
    items.sort(key=lambda item: "guest" not in item.path.parts)  # stable: all else keeps its order
    if sys.version_info[:2] == (3, 11):
        return
    impossible = [item for item in items if any("libnbd" in mark.args for mark in item.iter_markers("requires"))]
    if impossible:
        items[:] = [item for item in items if item not in impossible]
        config.hook.pytest_deselected(items=impossible)
        config.stash[LEFT_OUT] = len(impossible)
        if hasattr(config, "workeroutput"):  # pytest-xdist: only the workers collect, only their parent reports
            config.workeroutput["left_out"] = len(impossible)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist left out; every worker collects the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail in CI, a test whose requirements are not met."""
    wanted = [name for mark in item.iter_markers("requires") for name in mark.args]
    reasons = sorted({reason for name in wanted if (reason := why_missing(name))})
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true every skip is a failure, whoever asked for it."""
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI=true allows no skip: {_skip_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself while it is imported."""
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI=true allows no skip: {_skip_reason(report)}"
    return report


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line for each reason what did not run."""
    reasons = Counter(_skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"NOT RUN: {count} tests: {reason}", yellow=True)
    if left_out := terminalreporter.config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"NOT RUN: {left_out} tests: {LIBNBD_MISSING}", yellow=True)


@pytest.fixture
def short_tmp_path() -> Generator[Path]:
    """A directory of one's own whose path leaves room for a unix socket's name (107 bytes in all)."""
    with tempfile.TemporaryDirectory(prefix="bv-") as name:
        yield Path(name)
