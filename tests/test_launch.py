"""The launch scripts: what they would do, what they refuse, and that they survive a linter and a fake cluster."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {"local.sh": 2, "slurm.sh": 2, "tpu_vm.sh": 4, "gke_xpk.sh": 4}  # and how many arguments each needs
CONFIG = ("configs/unified_grpo.py:tiny", "--config.seed=3", "--config.model.folder=/weights/a b")


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments], capture_output=True, text=True, env=kept | environment, timeout=60)


def commands(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The words of each command of a dry run."""
    done = launch(script, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage:") and "--dry-run" in done.stdout
    text = (ROOT / "launch" / script).read_text()
    valued, plain = text.split('read_options "')[1].split('" "')[0], text.split('read_options "')[1].split('"')[2]
    for name in (valued + " " + plain).split():
        assert f"--{name}" in done.stdout
    assert launch(script, "-h").stdout == done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments, message", [
    (("--fast", "a", "b", "c", "d"), "unknown option --fast"), (("-x", "a", "b", "c", "d"), "unknown option -x"),
    (("--dry-run=yes", "a", "b", "c", "d"), "unknown option --dry-run=yes"), (("a",), "arguments and got 1"), ((), "arguments and got 0"),
    (("a", "b", "c", "d", "e"), "unexpected argument")])
def test_wrong_calls_end_with_code_2_and_one_line(script, arguments, message):
    done = launch(script, *arguments)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and "--help" in done.stderr and done.stderr.count("\n") == 1


def test_an_option_without_its_value_is_named():
    done = launch("local.sh", "--processes")
    assert done.returncode == 2 and "--processes needs a value" in done.stderr
    assert "positive number" in launch("local.sh", "--processes=0", "a", "b").stderr
    assert "choose gpu or node" in launch("slurm.sh", "--task-per", "rack", "a", "b").stderr
    assert "one of --tpu-type and --device-type" in launch("gke_xpk.sh", "a", "b", "c", "d").stderr
    assert "need --create" in launch("tpu_vm.sh", "--spot", "a", "b", "c", "d").stderr


def test_one_host_runs_main_with_the_arguments_as_they_are():
    *_, main = commands("local.sh", "--python", "python3", CONFIG[0], "runs/a b", *CONFIG[1:])
    assert main == ["python3", "-m", "uae_jax.main", f"--config={CONFIG[0]}", "--workdir=runs/a b", *CONFIG[1:]]


def test_several_processes_share_a_coordinator():
    found = commands("local.sh", "--python=python3", "--processes", "3", "--port=4000", CONFIG[0], "runs/a")
    assert len(found) == 3
    for index, words in enumerate(found):
        assert words[-3:] == ["--coordinator=localhost:4000", "--processes=3", f"--process_id={index}"]


def test_slurm_gives_a_task_its_gpus():
    words, = commands("slurm.sh", CONFIG[0], "/shared/run", *CONFIG[1:], SLURM_SUBMIT_DIR=str(ROOT))
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"] and words[2] == ".venv/bin/python" and words[-2:] == list(CONFIG[1:])
    words, = commands("slurm.sh", "--task-per=node", CONFIG[0], "/shared/run", SLURM_GPUS_ON_NODE="4", SLURM_NNODES="2")
    assert words[1:6] == ["--kill-on-bad-exit=1", "--ntasks-per-node=1", "--ntasks=2", "env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"]


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho {name} \"$@\" >> {folder}/calls\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("code, restarts, expected", [(0, 0, 0), (143, 0, 0), (1, 0, 1), (143, 100, 143)])
def test_slurm_queues_itself_again_after_a_preemption_only(tmp_path, code, restarts, expected):
    fake(tmp_path / "bin", "srun", f"exit {code}")
    fake(tmp_path / "bin", "scontrol", "")
    done = launch(
        "slurm.sh", CONFIG[0], "/shared/run", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="77", SLURM_RESTART_COUNT=str(restarts),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == expected
    requeued = "scontrol requeue 77" in (tmp_path / "bin" / "calls").read_text()
    assert requeued == (code == 143 and restarts < 100)


def test_a_slice_is_asked_for_installed_and_started_on_all_hosts():
    found = commands(
        "tpu_vm.sh", "--create", "v6e-64", "--spot", "--project=p", "slice", "us-east5-b", CONFIG[0], "gs://bucket/runs/a",
        "--config.model.folder=gs://weights/UAE")
    assert found[0][:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "slice"]
    assert {"v6e-64", "v2-alpha-tpuv6e", "--spot", "us-east5-b", "p"} <= set(found[0])
    remote = [words[-1] for words in found if "ssh" in words]
    assert all("--worker=all" in words for words in found if "ssh" in words or "scp" in words)
    assert any("gcsfuse" in text and "/mnt/weights" in text for text in remote) and any("/mnt/bucket" in text for text in remote)
    assert remote[-1] == (
        "cd uae_jax && mkdir -p /mnt/bucket/runs && .venv/bin/python -m uae_jax.main "
        f"--config={CONFIG[0]} --workdir=/mnt/bucket/runs/a --config.model.folder=/mnt/weights/UAE")
    assert not any("queued-resources" in words for words in commands("tpu_vm.sh", "slice", "z", CONFIG[0], "/nfs/run"))


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(tmp_path):
    fake(tmp_path / "bin", "gcloud", f"""
case "$*" in
  *describe*) cat {tmp_path}/state 2>/dev/null ;;
  *delete*) rm {tmp_path}/state ;;
  *create*) echo ACTIVE > {tmp_path}/state ;;
  *uae_jax.main*) if [ -e {tmp_path}/once ]; then exit 0; fi; touch {tmp_path}/once; echo SUSPENDED > {tmp_path}/state; exit 1 ;;
esac""")
    done = launch("tpu_vm.sh", "--create", "v5p-128", "slice", "z", CONFIG[0], "/nfs/run", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    calls = (tmp_path / "bin" / "calls").read_text()
    assert done.returncode == 0, done.stderr
    assert calls.count("queued-resources create") == 2 and calls.count("queued-resources delete") == 1
    assert calls.count("uae_jax.main") == 2 and "asked for again (1)" in done.stderr


def test_gke_starts_main_in_every_pod_and_again_after_failures():
    words, = commands(
        "gke_xpk.sh", "--tpu-type=v6e-64", "--slices=2", "--storage=bucket,more", "--zone", "z", "cluster", "name", CONFIG[0],
        "gs://bucket/run", *CONFIG[1:])
    assert words[:5] == ["xpk", "workload", "create", "--cluster=cluster", "--workload=name"]
    assert {"--tpu-type=v6e-64", "--num-slices=2", "--storage=bucket", "--storage=more", "--zone=z", "--max-restarts=100",
            "--restart-on-user-code-failure"} <= set(words)
    command = shlex.split(words[-1].removeprefix("--command="))
    assert command[:4] == ["pip", "install", "-q", ".[tpu]"]
    assert command[-5:] == ["uae_jax.main", f"--config={CONFIG[0]}", "--workdir=/mnt/bucket/run", *CONFIG[1:]]
    words, = commands("gke_xpk.sh", "--device-type=h200-141gb-8", "--nodes=2", "c", "w", CONFIG[0], "/nfs/run")
    assert "--device-type=h200-141gb-8" in words and "--num-nodes=2" in words and ".[cuda]" in words[-1]


def test_local_reports_a_process_that_died_and_stops_on_a_signal(tmp_path):
    (tmp_path / "python").write_text("""#!/bin/sh
case "$*" in *--process_id=1*) exit 9 ;; *) sleep 2; exit 1 ;; esac
""")
    (tmp_path / "python").chmod(0o755)
    done = launch("local.sh", f"--python={tmp_path / 'python'}", "--processes=2", CONFIG[0], "runs/a")
    assert done.returncode == 9 and "ended with code 9" in done.stderr and "the same command continues" in done.stderr


def test_local_passes_a_signal_on_and_does_not_start_again(tmp_path):
    (tmp_path / "python").write_text(f"""#!{sys.executable}
import pathlib, signal, sys, time
def stop(*_):
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with open("{tmp_path}/started", "a") as file:
    file.write("x")
time.sleep(30)
""")
    (tmp_path / "python").chmod(0o755)
    for processes in ("1", "2"):
        (tmp_path / "started").unlink(missing_ok=True)
        script = subprocess.Popen(["bash", ROOT / "launch" / "local.sh", f"--python={tmp_path / 'python'}", "--processes", processes, CONFIG[0], "r"])
        while not (tmp_path / "started").exists() or len((tmp_path / "started").read_text()) < int(processes):
            assert script.poll() is None
            time.sleep(0.05)
        script.terminate()
        assert script.wait(20) == 143
        assert (tmp_path / "started").read_text() == "x" * int(processes)


def test_the_scripts_are_clean_for_shellcheck():
    linter = pathlib.Path(sys.executable).parent / "shellcheck"
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    done = subprocess.run([linter, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(scripts) == 5, done.stdout
