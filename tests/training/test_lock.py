"""A workdir belongs to one run; what a dead run left is taken over."""

import json
import os
import socket
import subprocess
import sys

import pytest

from uae_jax.training.lock import NAME, workdir_lock


def write(folder, **owner):
    values = {"host": socket.gethostname(), "process": 1, "started": "2026-01-02 03:04:05"} | owner
    (folder / NAME).write_text(json.dumps(values))


def test_a_second_run_is_refused_and_the_lock_goes_with_the_first(tmp_path):
    with workdir_lock(tmp_path):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on {socket.gethostname()} since"):
            with workdir_lock(tmp_path):
                pass
        assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME).exists()


def test_another_process_of_this_host_holds_it(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom uae_jax.training.lock import workdir_lock\n"
        "with workdir_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid} .*stop that run, or delete"):
            with workdir_lock(tmp_path):
                pass
        other.kill()
        other.wait()
        with workdir_lock(tmp_path):  # killed: nothing has removed its lock
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("owner", [dict(process=2**22 + 1), dict(process=1, born="another start"), dict(process=None)])
def test_a_stale_lock_is_taken_over_and_told(tmp_path, capsys, owner):
    write(tmp_path, **owner)
    with workdir_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert "was left by a run that is gone" in capsys.readouterr().err


def test_a_lock_of_another_host_is_believed(tmp_path):
    write(tmp_path, host="elsewhere", process=7)
    with pytest.raises(ValueError, match="in use by process 7 on elsewhere since 2026-01-02 03:04:05; use another"):
        with workdir_lock(tmp_path):
            pass
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize("own, taken", [("slice-1", True), ("slice-2", False), (None, False)])
def test_a_lock_of_another_host_is_taken_over_by_the_same_run(tmp_path, monkeypatch, own, taken):
    """A launcher starts a preempted run again on other hosts."""
    write(tmp_path, host="elsewhere", process=7, run="slice-1" if own else None)
    monkeypatch.delenv("UAE_RUN", raising=False)
    if own:
        monkeypatch.setenv("UAE_RUN", own)
    if not taken:
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere"), workdir_lock(tmp_path):
            pass
        return
    with workdir_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["run"] == own


def test_a_damaged_lock_is_taken_over(tmp_path):
    (tmp_path / NAME).write_text('{"host": ')
    with workdir_lock(tmp_path):
        pass
    assert not (tmp_path / NAME).exists()
