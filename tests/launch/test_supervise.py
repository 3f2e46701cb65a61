"""The one policy of all launchers: when a run is started again, how often, and after which wait."""

import pathlib
import shlex
import subprocess

import pytest
from launchers import ROOT, environment_of, script

GONE = "F1129 client.h:88] Terminating process because the JAX distributed service detected fatal errors. This most"
OTHER = "error: another process of this run is gone (Gloo: connection closed); see what it said last."


def policy(program: str, **environment: str) -> subprocess.CompletedProcess:
    """A program of shell with the policy's functions."""
    head = f"set -euo pipefail; cd {shlex.quote(str(ROOT))}; . launch/supervise.sh; "
    return subprocess.run(
        ["bash", "-c", head + program, "policy"],
        capture_output=True,
        text=True,
        env=environment_of(environment),
        timeout=60,
    )


@pytest.mark.parametrize(
    "code, said, expected",
    [
        (0, "", "done"),
        (75, OTHER, "again"),
        (143, "stopped at pretrain step 7; the same command continues", "again"),
        (130, "", "again"),
        (137, "", "again"),
        (139, "Fatal Python error: Segmentation fault", "again"),
        (1, "error: --workdir is not given", "stop"),
        (1, "Traceback (most recent call last):", "stop"),
        (1, "", "stop"),
        (1, GONE, "again"),
        (1, f"{OTHER}\n{GONE}", "again"),
        (1, f"error: /data/a.jpg is damaged\n{GONE}", "stop"),
        (1, f"3: error: /data/a.jpg is damaged\n{GONE}", "stop"),
        (1, f"KeyError: 'a'\nthe other processes end too. The same command continues.\n{GONE}", "stop"),
        (1, "srun: error: Node failure on node7", "again"),
        (1, "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE TO NODE FAILURE ***", "again"),
        (2, "on_cards.sh on node7: nvidia-smi finds no driver", "stop"),
        (127, "python: command not found", "stop"),
        (255, "", "stop"),
        (69, "", "stop"),
    ],
)
def test_infrastructure_is_told_from_the_users_errors(tmp_path, code, said, expected):
    (tmp_path / "said").write_text(said + "\n")
    assert policy(f"verdict {code} {tmp_path}/said").stdout == f"{expected}\n"
    if code != 1:
        assert policy(f"verdict {code}").stdout == f"{expected}\n"


def run_of(tmp_path: pathlib.Path, body: str) -> str:
    """A run whose starts are counted in `starts`; `$n` is the number of this one, `$w` its work folder."""
    return script(
        tmp_path / "run",
        f"#!/bin/bash\nw={tmp_path}/work; mkdir -p $w; echo x >> {tmp_path}/starts\n"
        f"n=$(wc -l < {tmp_path}/starts)\n{body}\n",
    )


def starts(tmp_path: pathlib.Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


def supervised(
    tmp_path: pathlib.Path, body: str, counts: str = '""', **environment: str
) -> subprocess.CompletedProcess:
    return policy(
        f'catch_signals; supervise {tmp_path}/work {counts} "" run_one {run_of(tmp_path, body)}', **environment
    )


def test_a_run_goes_on_until_it_is_done(tmp_path):
    done = supervised(tmp_path, "case $n in 1) exit 75 ;; 2) kill -KILL $$ ;; 3) exit 143 ;; esac; exit 0")
    assert done.returncode == 0 and starts(tmp_path) == 4
    assert done.stderr.count("it is started again in 0 s") == 3
    for words in ("code 75, machines or network", "code 137, killed", "code 143, stopped by a signal"):
        assert words in done.stderr


@pytest.mark.parametrize("code", [1, 2, 127])
def test_an_error_of_the_user_never_loops(tmp_path, code):
    done = supervised(tmp_path, f"exit {code}")
    assert (done.returncode, starts(tmp_path), done.stderr) == (code, 1, "")


def test_starts_without_progress_are_bounded(tmp_path):
    done = supervised(tmp_path, "exit 137", UAE_RETRIES="3")
    assert done.returncode == 69 and starts(tmp_path) == 4
    last = done.stderr.splitlines()[-1]
    assert "without a new line of metrics or a new checkpoint" in last and f"{tmp_path}/work" in last


@pytest.mark.parametrize(
    "work",
    ["echo '{}' >> $w/metrics.jsonl", "mkdir -p $w/checkpoints/pretrain/$n; rm -rf $w/checkpoints/pretrain/$((n - 2))"],
)
def test_starts_with_progress_are_not_bounded(tmp_path, work):
    done = supervised(tmp_path, f"{work}; if [ $n -lt 8 ]; then exit 75; fi", UAE_RETRIES="1")
    assert done.returncode == 0 and starts(tmp_path) == 8


@pytest.mark.parametrize(
    "work",
    [
        "seq 7 > $w/metrics.jsonl",  # the same lines again, after the same checkpoint
        "if [ -e $w/metrics.jsonl ]; then seq 6 > $w/metrics.jsonl; else seq 7 > $w/metrics.jsonl; fi",
        "mkdir -p $w/checkpoints/pretrain/50",
        "mkdir -p $w/checkpoints/pretrain/$n.orbax-checkpoint-tmp-1",  # a save that did not end
    ],
)
def test_the_same_lines_and_checkpoints_again_are_no_progress(tmp_path, work):
    done = supervised(tmp_path, f"{work}; exit 75", UAE_RETRIES="2")
    assert done.returncode == 69 and starts(tmp_path) <= 4  # the first start made progress, where there was some


def test_what_a_continued_run_has_already_is_no_progress(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "metrics.jsonl").write_text("{}\n" * 9)
    assert supervised(tmp_path, "exit 75", UAE_RETRIES="1").returncode == 69
    assert starts(tmp_path) == 2


def test_the_wait_doubles_up_to_a_bound_and_begins_anew_after_progress():
    program = "for fruitless in 0 1 2 3 4 5 6 7 8; do wait_before; done"
    assert policy(program, UAE_WAIT="15").stdout.split() == ["15", "15", "30", "60", "120", "240", "480", "600", "600"]


def test_counts_are_kept_over_starts_of_the_launcher(tmp_path):
    """A pod or a job is a new process for each start."""
    (tmp_path / "work").mkdir()
    program = f"begin {tmp_path}/work {tmp_path}/counts; may_start_again {tmp_path}/work {tmp_path}/counts"
    codes = [policy(program, UAE_RETRIES="2").returncode for _ in range(3)]
    assert codes == [0, 0, 1] and not (tmp_path / "counts").exists()  # a person may start it anew
    assert policy(program, UAE_RETRIES="2").returncode == 0
    (tmp_path / "work" / "metrics.jsonl").write_text("{}\n")
    assert [policy(program, UAE_RETRIES="2").returncode for _ in range(4)] == [0, 0, 0, 1]
    (tmp_path / "counts").write_text("many of them")
    assert policy(program, UAE_RETRIES="2").returncode == 0


def test_a_signal_reaches_the_run_and_ends_the_starts(tmp_path):
    body = f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM; kill -TERM $PPID; while true; do sleep .02; done"
    done = supervised(tmp_path, body)
    assert done.returncode == 143 and (tmp_path / "saved").exists() and starts(tmp_path) == 1


def test_the_code_of_a_run_that_ends_as_a_signal_arrives_is_known(tmp_path):
    """Bash answers -1 then, one time in ten."""
    run = script(tmp_path / "run", "#!/bin/bash\ntrap 'sleep .01; exit 143' TERM; for ((;;)); do sleep .01; done\n")
    program = f"""catch_signals; forward=false
for turn in {{1..15}}; do
  {run} & child=$!
  (sleep .1; kill -TERM $child; sleep .012; kill -TERM $$) &
  code=0; wait_for $child || code=$?; echo $code; wait $! 2>/dev/null || true
done"""
    assert set(policy(program).stdout.split()) == {"143"}


def test_a_signal_in_the_wait_ends_it(tmp_path):
    body = "p=$PPID; (sleep .2; kill -TERM $p) >/dev/null 2>&1 & exit 75"
    done = supervised(tmp_path, body, UAE_WAIT="50")
    assert done.returncode == 75 and starts(tmp_path) == 1


def test_where_the_sender_reaches_the_run_too_it_gets_one_signal(tmp_path):
    """A second one would end a run that is saving."""
    body = f"trap 'echo x >> {tmp_path}/signals' TERM; p=$PPID; kill -TERM $p; sleep .2; exit 143"
    done = policy(f'forward=false; catch_signals; supervise {tmp_path}/work "" "" run_one {run_of(tmp_path, body)}')
    assert done.returncode == 143 and starts(tmp_path) == 1 and not (tmp_path / "signals").exists()


def test_what_a_run_says_is_kept_and_shown(tmp_path):
    command = script(
        tmp_path / "run", "#!/bin/bash\necho out; echo 'error: one' >&2; sleep 60 >/dev/null & echo $! >&2; exit 1\n"
    )
    done = policy(f"run_logged {tmp_path}/said {command}")  # a grandchild that lives on does not hold it
    assert done.returncode == 1 and done.stdout == "out\n"
    assert done.stderr == (tmp_path / "said").read_text() and done.stderr.startswith("error: one\n")
    subprocess.run(["kill", done.stderr.split()[-1]])
