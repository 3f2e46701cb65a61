"""GKE through xpk, and what runs in its pods."""

import shlex

import pytest
from launchers import CONFIG, before, calls, commands, fake, launch, script


def test_gke_starts_main_in_every_pod_and_again_after_failures():
    (words,) = commands(
        "gke_xpk.sh",
        "--tpu-type=v6e-64",
        "--slices=2",
        "--storage=bucket,more",
        "--zone",
        "z",
        "cluster",
        "name",
        CONFIG[0],
        "gs://bucket/run",
        *CONFIG[1:],
    )
    assert words[:5] == ["xpk", "workload", "create", "--cluster=cluster", "--workload=name"]
    assert {
        "--tpu-type=v6e-64",
        "--num-slices=2",
        "--storage=bucket",
        "--storage=more",
        "--zone=z",
        "--max-restarts=100",
        "--restart-on-exit-codes=75",
        "--base-docker-image=python:3.12.13-slim-bookworm",
        "--script-dir=.",
    } <= set(words)
    command = shlex.split(words[-1].removeprefix("--command="))
    command = shlex.split(words[-1].removeprefix("--command="))
    assert command[:4] == ["exec", "env", "UAE_RUN=xpk-name", "UAE_RETRIES=5"]
    assert command[4:10] == ["bash", "launch/in_pod.sh", "--install", "tpu", "/mnt/bucket/run", "python"]
    assert command[-5:] == ["uae_jax.main", f"--config={CONFIG[0]}", "--workdir=/mnt/bucket/run", *CONFIG[1:]]
    (words,) = commands("gke_xpk.sh", "--device-type=h200-141gb-8", "--nodes=2", "c", "w", CONFIG[0], "/nfs/run")
    assert "--device-type=h200-141gb-8" in words and "--num-nodes=2" in words
    assert "--install cuda /nfs/run bash launch/on_cards.sh python -m uae_jax.main" in words[-1]


def test_a_built_image_is_taken_as_it_is():
    (words,) = commands(
        "gke_xpk.sh", "--tpu-type=v6e-8", "--built=registry/uae:1", "--retries=2", "c", "w", CONFIG[0], "/nfs/run"
    )
    assert "--docker-image=registry/uae:1" in words and not any(
        word.startswith(("--base-docker-image", "--script-dir")) for word in words
    )
    assert "UAE_RETRIES=2 bash launch/in_pod.sh /nfs/run python -m" in words[-1]


def test_xpk_that_fails_is_told(tmp_path):
    fake(tmp_path, "xpk", "echo 'cluster c is not there' >&2; exit 4")
    done = launch("gke_xpk.sh", "--tpu-type=v6e-8", "c", "w", CONFIG[0], "/nfs/run", **before(tmp_path))
    assert done.returncode == 4 and "cluster c is not there" in done.stderr and calls(tmp_path, "xpk") == 1


GONE = "echo 'Terminating process because the JAX distributed service detected fatal errors' >&2; exit 1"


def pod(tmp_path, body: str, *options: str, **environment: str):
    (tmp_path / "run").mkdir(exist_ok=True)
    command = script(tmp_path / "main", f"#!/bin/bash\n{body}\n")
    return launch("in_pod.sh", *options, str(tmp_path / "run"), command, **environment)


@pytest.mark.parametrize(
    "body, code",
    [
        ("exit 0", 0),
        ("exit 1", 1),  # fails the JobSet at once
        ("exit 2", 2),
        ("exit 127", 1),  # no program: xpk would start again after 127
        ("exit 255", 1),
        ("exit 75", 75),
        ("exit 143", 143),  # evicted, everything saved
        ("kill -KILL $$", 137),
        (GONE, 75),
        (f"echo 'error: /data/a.jpg is damaged' >&2; {GONE}", 1),
    ],
)
def test_the_code_of_a_pod_says_whether_to_start_again(tmp_path, body, code):
    done = pod(tmp_path, body)
    assert done.returncode == code, done.stderr


def test_pods_that_start_without_progress_are_given_up(tmp_path):
    codes = [pod(tmp_path, "exit 75", UAE_RETRIES="2").returncode for _ in range(3)]
    assert codes == [75, 75, 69]
    line = f"echo '{{}}' >> {tmp_path}/run/metrics.jsonl; exit 75"
    assert {pod(tmp_path, line, UAE_RETRIES="1").returncode for _ in range(4)} == {75}


def test_one_pod_counts_for_all(tmp_path):
    for other in ({"JOB_COMPLETION_INDEX": "3"}, {"NODE_RANK": "1"}, {"MEGASCALE_SLICE_ID": "1"}):
        assert {pod(tmp_path, "exit 75", UAE_RETRIES="1", **other).returncode for _ in range(3)} == {75}
    assert not (tmp_path / "run" / ".restarts").exists()


def test_an_evicted_pod_passes_the_signal_on(tmp_path):
    body = f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM; kill -TERM $PPID; while true; do sleep .02; done"
    assert pod(tmp_path, body).returncode == 143 and (tmp_path / "saved").exists()


def test_a_pod_installs_the_pinned_versions(tmp_path):
    fake(tmp_path / "bin", "pip", f"[ $(wc -l < {tmp_path}/bin/calls) -ge 3 ]")  # the network comes back
    done = pod(tmp_path, "echo started", "--install", "tpu", **before(tmp_path / "bin"))
    assert done.returncode == 0 and done.stdout == "started\n"
    assert calls(tmp_path / "bin", "-r launch/requirements-tpu.txt") == 3
    assert calls(tmp_path / "bin", "--no-deps", "--no-build-isolation") == 1


def test_a_pod_that_cannot_install_ends(tmp_path):
    fake(tmp_path / "bin", "pip", "exit 1")
    done = pod(tmp_path, "echo started", "--install", "tpu", UAE_RETRIES="2", **before(tmp_path / "bin"))
    assert done.returncode == 1 and not done.stdout and "cannot be installed" in done.stderr
    assert calls(tmp_path / "bin", "pip") == 3
