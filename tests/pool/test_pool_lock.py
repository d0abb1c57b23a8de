"""Locks: one process per pool, held exactly as long as it lives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault, MetadataFault, PoolLocked
from blockvirt.pool.lock import lock_device, lock_pool

HOLD = """
import sys, time
from pathlib import Path
from blockvirt.pool.lock import lock_device, lock_pool
locks = lock_pool(Path(sys.argv[1])), lock_device(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_is_refused_and_told_the_holder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PoolLocked, match=f"in use by process {holder.pid}") as caught:
            lock_pool(tmp_path)
        assert caught.value.details["pid"] == holder.pid
        with pytest.raises(PoolLocked, match=f"in use by process {holder.pid}"):
            lock_device(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    pool, device = lock_pool(tmp_path), lock_device(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    pool.release()
    device.release()
    pool.release()
    lock_pool(tmp_path).release()


def test_a_child_does_not_keep_a_dead_parents_lock(tmp_path: Path) -> None:
    """As if the holder had died: the lock must go with its descriptor, though a child lives on."""
    lock = lock_pool(tmp_path)
    ready = [sys.executable, "-c", "print(1, flush=True); input()"]
    with subprocess.Popen(ready, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        os.close(lock._fd)
        lock_pool(tmp_path).release()
        child.communicate(b"\n")


def test_where_no_lock_can_be(tmp_path: Path) -> None:
    with pytest.raises(MetadataFault, match="cannot open the lock"):
        lock_pool(tmp_path / "gone")
    with pytest.raises(DeviceFault, match="cannot lock the device"):
        lock_device(tmp_path / "gone")
