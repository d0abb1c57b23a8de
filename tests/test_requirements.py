"""The suite's own manners: what a missing tool does to a test, here and in CI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NEEDS_WHAT_NOBODY_HAS = """
import pytest

@pytest.mark.requires("no-such-program")
def test_that_needs_a_tool():
    pass

def test_that_needs_nothing():
    pass
"""

SKIPS_ITSELF = """
import pytest
pytest.importorskip("no_such_module")
"""

FAILS_BY_HYPOTHESIS = """
from hypothesis import given, strategies as st

@given(st.integers())
def test_that_finds_a_counterexample(number):
    assert number < 1000
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A project with our conftest and our list of tools, and no tests of its own yet."""
    for part in ("tests/conftest.py", "tools/test-tools.txt"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib --strict-markers\n")
    return tmp_path


def run_suite(suite: Path, test: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one test module there in a process of its own."""
    (suite / "tests" / "test_it.py").write_text(test)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "PYTEST", "HYPOTHESIS"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
    return subprocess.run(command, cwd=suite, env=env | environment, capture_output=True, text=True, check=False)


def test_a_missing_tool_skips_and_is_named(suite: Path) -> None:
    """On one's own machine the rest of the suite runs, and the last lines say what did not."""
    result = run_suite(suite, NEEDS_WHAT_NOBODY_HAS)
    assert result.returncode == 0, result.stdout
    assert "NOT RUN: 1 tests: no-such-program is missing" in result.stdout
    assert "1 passed, 1 skipped" in result.stdout


def test_a_missing_tool_fails_in_ci(suite: Path) -> None:
    """With CI=true nothing may look tested that was not."""
    result = run_suite(suite, NEEDS_WHAT_NOBODY_HAS, CI="true")
    assert result.returncode == 1
    assert "1 passed, 1 error" in result.stdout
    assert "CI=true allows no skip: no-such-program is missing" in result.stdout


def test_a_module_that_skips_itself_fails_in_ci(suite: Path) -> None:
    """The rule cannot be got round by skipping at import."""
    assert run_suite(suite, SKIPS_ITSELF).returncode == 5  # pytest: nothing was collected
    result = run_suite(suite, SKIPS_ITSELF, CI="true")
    assert result.returncode == 2, result.stdout
    assert "CI=true allows no skip" in result.stdout


def test_the_default_profile_finds_the_same_twice(suite: Path) -> None:
    """A red run in CI is red on every machine."""
    first, second = (run_suite(suite, FAILS_BY_HYPOTHESIS).stdout for _ in range(2))
    example = "test_that_finds_a_counterexample(\n"
    assert example in first
    assert first.split(example)[1].split("\n")[:2] == second.split(example)[1].split("\n")[:2]


def test_the_deep_profile_says_how_to_replay(suite: Path) -> None:
    """A search that is new each time must hand over what it found."""
    result = run_suite(suite, FAILS_BY_HYPOTHESIS, HYPOTHESIS_PROFILE="deep")
    assert "@reproduce_failure(" in result.stdout or "--hypothesis-seed" in result.stdout
