"""The launch scripts: what they would do, what they refuse, and that they survive a linter and a fake cluster."""

import importlib.metadata
import json
import os
import pathlib
import re
import resource
import shlex
import subprocess
import sys
import time

import pytest
from packaging.requirements import Requirement

from uae_jax.planning.chips import USABLE

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {"local.sh": 2, "slurm.sh": 2, "tpu_vm.sh": 4, "gke_xpk.sh": 4}  # and how many arguments each needs
CONFIG = ("configs/unified_grpo.py:tiny", "--config.seed=3", "--config.model.folder=/weights/a b")


CARDS = ("CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
OTHERS = re.compile(
    rf"SLURM_|OMPI_|NCCL_|UAE_|NNODES$|{'|'.join(CARDS)}"
)  # what a cluster, or a host with cards, may have set


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not OTHERS.match(name)} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        env=kept | environment,
        timeout=60,
    )


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
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--fast", "a", "b", "c", "d"), "unknown option --fast"),
        (("-x", "a", "b", "c", "d"), "unknown option -x"),
        (("--dry-run=yes", "a", "b", "c", "d"), "unknown option --dry-run=yes"),
        (("a",), "arguments and got 1"),
        ((), "arguments and got 0"),
        (("a", "b", "c", "d", "e"), "unexpected argument"),
    ],
)
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
    (words,) = commands("slurm.sh", CONFIG[0], "/shared/run", *CONFIG[1:], SLURM_SUBMIT_DIR=str(ROOT))
    assert words[:5] == ["srun", "--kill-on-bad-exit=1", "bash", "launch/on_cards.sh", ".venv/bin/python"]
    assert words[-2:] == list(CONFIG[1:])
    (words,) = commands(
        "slurm.sh", "--task-per=node", CONFIG[0], "/shared/run", SLURM_GPUS_ON_NODE="4", SLURM_NNODES="2"
    )
    assert words[1:6] == [
        "--kill-on-bad-exit=1",
        "--ntasks-per-node=1",
        "--ntasks=2",
        "env",
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3",
    ]
    assert words[6:9] == ["bash", "launch/on_cards.sh", ".venv/bin/python"]
    (words,) = commands("slurm.sh", CONFIG[0], "/shared/run", SLURM_CPUS_PER_TASK="8")
    assert words[2] == "--cpus-per-task=8"  # srun does not take it from sbatch


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n{body}\n')
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("code, restarts, expected", [(0, 0, 0), (143, 0, 0), (1, 0, 1), (143, 100, 143)])
def test_slurm_queues_itself_again_after_a_preemption_only(tmp_path, code, restarts, expected):
    fake(tmp_path / "bin", "srun", f"exit {code}")
    fake(tmp_path / "bin", "scontrol", "")
    done = launch(
        "slurm.sh",
        CONFIG[0],
        "/shared/run",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="77",
        SLURM_RESTART_COUNT=str(restarts),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    assert done.returncode == expected
    requeued = "scontrol requeue 77" in (tmp_path / "bin" / "calls").read_text()
    assert requeued == (code == 143 and restarts < 100)


def test_a_slice_is_asked_for_installed_and_started_on_all_hosts():
    found = commands(
        "tpu_vm.sh",
        "--create",
        "v6e-64",
        "--spot",
        "--project=p",
        "slice",
        "us-east5-b",
        CONFIG[0],
        "gs://bucket/runs/a",
        "--config.model.folder=gs://weights/UAE",
    )
    assert found[0][:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "slice"]
    assert {"v6e-64", "v2-alpha-tpuv6e", "--spot", "us-east5-b", "p"} <= set(found[0])
    remote = [words[-1] for words in found if "ssh" in words]
    assert all("--worker=all" in words for words in found if "ssh" in words or "scp" in words)
    assert any("gcsfuse" in text and "/mnt/weights" in text for text in remote) and any(
        "/mnt/bucket" in text for text in remote
    )
    assert remote[-1] == (
        "cd uae_jax && mkdir -p /mnt/bucket/runs && .venv/bin/python -m uae_jax.main "
        f"--config={CONFIG[0]} --workdir=/mnt/bucket/runs/a --config.model.folder=/mnt/weights/UAE"
    )
    assert not any("queued-resources" in words for words in commands("tpu_vm.sh", "slice", "z", CONFIG[0], "/nfs/run"))


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(tmp_path):
    fake(
        tmp_path / "bin",
        "gcloud",
        f"""
case "$*" in
  *describe*) cat {tmp_path}/state 2>/dev/null ;;
  *delete*) rm {tmp_path}/state ;;
  *create*) echo ACTIVE > {tmp_path}/state ;;
  *uae_jax.main*) if [ -e {tmp_path}/once ]; then exit 0; fi; touch {tmp_path}/once
    echo SUSPENDED > {tmp_path}/state; exit 1 ;;
esac""",
    )
    done = launch(
        "tpu_vm.sh",
        "--create",
        "v5p-128",
        "slice",
        "z",
        CONFIG[0],
        "/nfs/run",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    calls = (tmp_path / "bin" / "calls").read_text()
    assert done.returncode == 0, done.stderr
    assert calls.count("queued-resources create") == 2 and calls.count("queued-resources delete") == 1
    assert calls.count("uae_jax.main") == 2 and "asked for again (1)" in done.stderr


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
        "--restart-on-user-code-failure",
    } <= set(words)
    command = shlex.split(words[-1].removeprefix("--command="))
    assert "on_cards" not in words[-1]
    assert command[:4] == ["pip", "install", "-q", ".[tpu]"]
    assert command[-5:] == ["uae_jax.main", f"--config={CONFIG[0]}", "--workdir=/mnt/bucket/run", *CONFIG[1:]]
    (words,) = commands("gke_xpk.sh", "--device-type=h200-141gb-8", "--nodes=2", "c", "w", CONFIG[0], "/nfs/run")
    assert "--device-type=h200-141gb-8" in words and "--num-nodes=2" in words and ".[cuda]" in words[-1]
    assert "exec bash launch/on_cards.sh python -m uae_jax.main" in words[-1]


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
        script = subprocess.Popen(
            [
                "bash",
                ROOT / "launch" / "local.sh",
                f"--python={tmp_path / 'python'}",
                "--processes",
                processes,
                CONFIG[0],
                "r",
            ],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
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
    assert done.returncode == 0 and len(scripts) == 7, done.stdout


H100 = "580.65.06, NVIDIA H100 80GB HBM3, 9.0"
# what a process on cards gets to see
SHOW = ("env", "-0")
THRESHOLDS = [
    f"--xla_gpu_{name}_combine_threshold_bytes=134217728" for name in ("all_gather", "reduce_scatter", "all_reduce")
]


@pytest.fixture
def host(tmp_path):
    """A host with two cards, by stubs of nvidia-smi and df; returns the environment that shows it to the scripts."""

    def make(*cards: str, free: int = 4096) -> dict[str, str]:
        (tmp_path / "cards").write_text("\n".join(cards))
        # as a driver before 510, it refuses a field that it does not know
        fake(
            tmp_path / "bin",
            "nvidia-smi",
            f"""
case "$*" in *compute_cap*)
    if grep -q '^[0-4]' {tmp_path}/cards; then echo 'Field "compute_cap" is not a valid field'; exit 2; fi ;; esac
cat {tmp_path}/cards""",
        )
        fake(
            tmp_path / "bin",
            "df",
            f"echo Filesystem 1024-blocks Used Available Capacity Mounted; echo shm 1 1 {free * 1024} 1% $2",
        )
        (tmp_path / "routes").write_text("Iface\tDestination\tGateway\neth0\t0000FEA9\t0\neth0\t00000000\t010011AC\n")
        (tmp_path / "infiniband").mkdir(exist_ok=True)
        return {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "JAX_PLATFORMS": "",
            "UAE_SHM": "/dev/shm",
            "XLA_FLAGS": "",
            "UAE_ROUTES": str(tmp_path / "routes"),
            "UAE_INFINIBAND": str(tmp_path / "infiniband"),
            "UAE_DRIVER_MOUNT": str(tmp_path / "mount"),
        }

    return make


def shown(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The environment that `SHOW` printed."""
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Code 2, nothing started, and one line with the thing and the remedy."""
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def test_on_cards_becomes_its_command_with_the_settings(host):
    environment = shown(launch("on_cards.sh", *SHOW, **host(H100, H100)))
    assert environment["XLA_FLAGS"].split() == [
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        *THRESHOLDS,
        "--xla_gpu_first_collective_call_terminate_timeout_seconds=600",
    ]
    assert float(environment["XLA_CLIENT_MEM_FRACTION"]) == USABLE and environment["NCCL_DEBUG"] == "WARN"
    done = launch("on_cards.sh", "bash", "-c", 'echo "$0|$1"; exit 7', "a b", "--c=$d", **host(H100))
    assert done.returncode == 7 and done.stdout == "a b|--c=$d\n" and not done.stderr


def test_what_the_environment_sets_stays(host):
    mine = (
        "--xla_gpu_all_gather_combine_threshold_bytes=5\n--xla_gpu_enable_latency_hiding_scheduler "
        "--xla_gpu_all_reduce_combine_threshold_bytes_=3"
    )
    environment = shown(
        launch(
            "on_cards.sh",
            *SHOW,
            **host(H100) | {"XLA_FLAGS": mine, "XLA_CLIENT_MEM_FRACTION": ".5", "NCCL_DEBUG": "INFO"},
        )
    )
    assert environment["XLA_FLAGS"].startswith(mine) and environment["XLA_FLAGS"].count("all_gather") == 1
    assert environment["XLA_FLAGS"].count("latency_hiding") == 1 and set(THRESHOLDS[1:]) <= set(
        environment["XLA_FLAGS"].split()
    )
    assert environment["XLA_CLIENT_MEM_FRACTION"] == ".5" and environment["NCCL_DEBUG"] == "INFO"
    environment = shown(
        launch("on_cards.sh", *SHOW, **host(H100) | {"XLA_FLAGS": "/my/flags", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"})
    )
    assert environment["XLA_FLAGS"] == "/my/flags"  # the name of a file
    assert "XLA_CLIENT_MEM_FRACTION" not in environment  # jaxlib refuses both names together


def test_this_jax_knows_every_flag(host):
    program = "JAX_PLATFORMS=cpu exec $0 -c 'import jax; print(jax.device_count())'"
    done = launch("on_cards.sh", "bash", "-c", program, sys.executable, **host(H100))
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr
    done = launch(
        "on_cards.sh",
        "bash",
        "-c",
        program,
        sys.executable,
        **host(H100) | {"XLA_FLAGS": "--xla_gpu_no_such_flag=true"},
    )
    assert done.returncode != 0 and "xla_gpu_no_such_flag" in done.stderr  # so that the first half proves something


def test_without_cards_wanted_nothing_is_checked_or_set(host):
    environment = shown(launch("on_cards.sh", *SHOW, **host("470.82.01, Tesla K80, 3.7") | {"JAX_PLATFORMS": "cpu"}))
    assert not environment["XLA_FLAGS"] and "NCCL_DEBUG" not in environment
    environment = shown(launch("on_cards.sh", *SHOW, **host("470.82.01, Tesla V100") | {"UAE_GPU_CHECKS": "off"}))
    assert environment["XLA_FLAGS"]


@pytest.mark.parametrize(
    "cards, environment, parts",
    [
        (["570.86.10, NVIDIA H100 80GB HBM3, 9.0"], {}, ("the driver is 570.86.10", "needs 580 or newer", "update it")),
        (["470.82.01, NVIDIA A100-SXM4-40GB"], {}, ("the driver is 470.82.01", "needs 580")),
        (
            ["580.65.06, Tesla V100-SXM2-16GB, 7.0"],
            {},
            ("Tesla V100-SXM2-16GB has compute capability 7.0", "7.5 or newer", "CUDA_VISIBLE_DEVICES"),
        ),
        ([H100, "580.65.06, Quadro P400, 6.1"], {}, ("Quadro P400 has compute capability 6.1", "leave it out")),
        (["No devices were found"], {}, ("lists no card", "--gpus all")),
        ([H100], {"CUDA_VISIBLE_DEVICES": ""}, ("CUDA_VISIBLE_DEVICES is ''", "hides every card", "unset it")),
        ([H100] * 2, {"CUDA_VISIBLE_DEVICES": "-1"}, ("hides every card",)),
        ([H100] * 2, {"CUDA_VISIBLE_DEVICES": "0,7"}, ("names card 7", "this host has 2")),
        ([H100] * 2, {"JAX_LOCAL_DEVICE_IDS": "first"}, ("JAX_LOCAL_DEVICE_IDS is 'first'", "give numbers")),
        (
            [H100] * 4,
            {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
            ("8 processes need a card each and CUDA sees 4", "--gpus-per-node"),
        ),
        (
            [H100] * 4,
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,2"},
            ("4 processes", "CUDA sees 2"),
        ),
        ([H100] * 4, {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3,4"}, ("JAX_LOCAL_DEVICE_IDS names card 4", "CUDA sees 4")),
    ],
)
def test_a_host_that_cannot_run_is_refused_in_one_line(host, cards, environment, parts):
    refused(launch("on_cards.sh", "echo", "started", **host(*cards) | environment), *parts)


@pytest.mark.parametrize(
    "cards, environment",
    [
        (["580.65.06, Tesla T4, 7.5"], {}),
        (["581.00, NVIDIA B200, 10.0"], {}),
        (["1000.1.2, NVIDIA GeForce RTX 5090, 12.0"], {}),
        (["580.65.06, Quadro P400, 6.1", H100], {"CUDA_VISIBLE_DEVICES": "1"}),
        ([H100] * 8, {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}),
        ([H100] * 4, {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3"}),  # task 0 of the host has said it
        ([H100] * 2, {"SLURM_STEP_TASKS_PER_NODE": "2,1", "JAX_LOCAL_DEVICE_IDS": "0,1"}),
    ],
)
def test_a_host_that_can_run_is_not_refused(host, cards, environment):
    done = launch("on_cards.sh", "echo", "started", **host(*cards) | environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


def test_no_driver_is_refused(host, tmp_path):
    environment = host(H100)
    fake(tmp_path / "bin", "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    refused(
        launch("on_cards.sh", "echo", "started", **environment),
        "nvidia-smi finds no driver",
        "--gpus all",
        "JAX_PLATFORMS=cpu",
    )


def test_little_shared_memory_is_refused_where_several_cards_share_it(host):
    refused(
        launch("on_cards.sh", "echo", "started", **host(*[H100] * 8, free=64)),
        "/dev/shm has 64 MiB free",
        "512 MiB for 8 cards",
        "--shm-size=1024m or --ipc=host",
        "mount -o remount,size=1024m /dev/shm",
    )
    refused(
        launch("on_cards.sh", "echo", "started", **host(*[H100] * 16, free=1000)),
        "1024 MiB for 16 cards",
        "--shm-size=2048m",
    )
    assert launch("on_cards.sh", "true", **host(*[H100] * 8, free=512)).returncode == 0
    assert launch("on_cards.sh", "true", **host(H100, free=64)).returncode == 0


def test_shared_memory_is_measured_by_df(host, tmp_path):
    environment = host(H100, H100) | {"UAE_SHM": str(tmp_path)}
    (tmp_path / "bin" / "df").unlink()
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    done = launch("on_cards.sh", "true", **environment)
    assert done.returncode == (0 if free >= 2**29 else 2)
    refused(launch("on_cards.sh", "true", **environment | {"UAE_SHM": str(tmp_path / "none")}), "none has 0 MiB free")


def test_several_hosts_get_warnings_about_their_network(host, tmp_path):
    environment = host(H100) | {"SLURM_STEP_NUM_NODES": "2"}
    done = launch("on_cards.sh", "true", **environment)
    assert done.returncode == 0 and not done.stderr
    (tmp_path / "routes").write_text("Iface\tDestination\tGateway\ndocker0\t00000000\t010011AC\n")
    done = launch("on_cards.sh", "true", **environment)
    assert (
        done.returncode == 0
        and "the default route is by docker0" in done.stderr
        and "set NCCL_SOCKET_IFNAME" in done.stderr
    )
    for changes in ({"NCCL_SOCKET_IFNAME": "eth1"}, {"SLURM_STEP_NUM_NODES": "1"}):
        assert not launch("on_cards.sh", "true", **environment | changes).stderr
    (tmp_path / "infiniband" / "mlx5_0").touch()
    (tmp_path / "routes").write_text("Iface\tDestination\tGateway\neth0\t00000000\t010011AC\n")
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    script = f"ulimit -l 64; exec bash {shlex.quote(str(ROOT / 'launch/on_cards.sh'))} true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0 and "only 64 KiB may be locked" in done.stderr and "--ulimit memlock=-1" in done.stderr
    assert done.stderr.count("\n") == 1 and resource.getrlimit(resource.RLIMIT_MEMLOCK) == before


def test_the_driver_of_a_gke_pod_is_found(host, tmp_path):
    environment = host(H100)
    (tmp_path / "mount" / "bin").mkdir(parents=True)
    (tmp_path / "bin" / "nvidia-smi").rename(tmp_path / "mount" / "bin" / "nvidia-smi")
    environment = shown(launch("on_cards.sh", *SHOW, **environment | {"LD_LIBRARY_PATH": "/a"}))
    assert (
        environment["PATH"].endswith(f":{tmp_path}/mount/bin")
        and environment["LD_LIBRARY_PATH"] == f"/a:{tmp_path}/mount/lib64"
    )


def test_on_cards_says_how_to_call_it():
    done = launch("on_cards.sh", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: launch/on_cards.sh COMMAND")
    assert (
        "JAX_PLATFORMS=cpu" in done.stdout
        and "UAE_GPU_CHECKS=off" in done.stdout
        and launch("on_cards.sh", "-h").stdout == done.stdout
    )
    for arguments, message in (((), "needs a command"), (("--fast",), "unknown option --fast")):
        done = launch("on_cards.sh", *arguments)
        assert (
            done.returncode == 2 and message in done.stderr and "--help" in done.stderr and done.stderr.count("\n") == 1
        )


def test_local_checks_the_host_and_gives_a_process_its_card(host, tmp_path):
    refused(
        launch("local.sh", "--python=true", "--processes=3", CONFIG[0], "runs/a", **host(H100, H100)),
        "3 processes need a card each and CUDA sees 2",
    )
    refused(launch("local.sh", "--python=true", CONFIG[0], "runs/a", **host(H100, H100, free=64)), "64 MiB free")
    # a file each: the lines of two processes on one pipe may run into each other
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\nimport json, os, sys\nopen(f'{tmp_path}/call_{{os.getpid()}}.json', "
        "'w').write(json.dumps([sys.argv[1:], dict(os.environ)]))"
    )
    (tmp_path / "python").chmod(0o755)

    def calls():
        files = list(tmp_path.glob("call_*.json"))
        found = sorted((json.loads(file.read_text()) for file in files), key=lambda pair: pair[0][-1])
        for file in files:
            file.unlink()
        return found

    done = launch(
        "local.sh", f"--python={tmp_path / 'python'}", "--processes=2", CONFIG[0], "runs/a", **host(H100, H100)
    )
    found = calls()
    assert done.returncode == 0 and [words[-1] for words, _ in found] == ["--process_id=0", "--process_id=1"]
    assert [values["JAX_LOCAL_DEVICE_IDS"] for _, values in found] == ["0", "1"]
    assert all(
        THRESHOLDS[0] in values["XLA_FLAGS"] and values["XLA_CLIENT_MEM_FRACTION"] == ".92" for _, values in found
    )
    done = launch("local.sh", f"--python={tmp_path / 'python'}", CONFIG[0], "runs/a", **host(H100, H100))
    ((words, values),) = calls()
    assert (
        done.returncode == 0
        and words[:2] == ["-m", "uae_jax.main"]
        and "JAX_LOCAL_DEVICE_IDS" not in values
        and THRESHOLDS[0] in values["XLA_FLAGS"]
    )


def test_local_shows_the_settings_in_a_dry_run_and_checks_nothing(host):
    done = launch("local.sh", "--dry-run", "--python=python3", CONFIG[0], "runs/a", **host("470.1.1, Tesla K80"))
    assert done.returncode == 0 and done.stdout.startswith(
        "# with XLA_CLIENT_MEM_FRACTION=.92 NCCL_DEBUG=WARN XLA_FLAGS=--xla_gpu_"
    )
    assert done.stdout.splitlines()[1].startswith("python3 -m uae_jax.main")
    assert (
        "#"
        not in launch(
            "local.sh", "--dry-run", "--python=python3", CONFIG[0], "runs/a", **host(H100) | {"JAX_PLATFORMS": "cpu"}
        ).stdout
    )


def test_local_says_that_a_broken_driver_means_the_cpu(host, tmp_path):
    environment = host(H100)
    fake(tmp_path / "bin", "nvidia-smi", "exit 9")
    done = launch("local.sh", "--python=true", CONFIG[0], "runs/a", **environment)
    assert done.returncode == 0 and "nvidia-smi fails, so the run is on the CPU" in done.stderr


def test_slurm_checks_every_node_before_main(host, tmp_path):
    environment = host("570.86.10, NVIDIA H100 80GB HBM3, 9.0") | {"SLURM_SUBMIT_DIR": str(ROOT)}
    fake(
        tmp_path / "bin",
        "srun",
        """while [ "${1#--}" != "$1" ]; do shift; done
for task in 0 1; do SLURM_LOCALID=$task SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NUM_NODES=1 "$@" || exit $?; done""",
    )
    refused(
        launch("slurm.sh", "--python=echo", CONFIG[0], "/shared/run", **environment),
        "on_cards.sh",
        "the driver is 570.86.10",
    )
    done = launch("slurm.sh", "--python=echo", CONFIG[0], "/shared/run", **environment | host(H100, H100))
    assert (
        done.returncode == 0
        and done.stdout.splitlines() == [f"-m uae_jax.main --config={CONFIG[0]} --workdir=/shared/run"] * 2
    )


def test_the_container_pins_what_the_package_needs():
    lines = [
        line
        for line in (ROOT / "launch" / "requirements-cuda.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines) and lines == sorted(
        lines, key=str.lower
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    assert (
        len(pins) == len(lines)
        and len({pins[name] for name in ("jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin")}) == 1
    )
    needed = [Requirement(text) for text in importlib.metadata.requires("uae_jax")]
    needed = [
        one for one in needed if one.marker is None or one.marker.evaluate({"python_version": "3.12", "extra": "cuda"})
    ]
    assert {"jax", "flax", "transformers"} <= {one.name for one in needed} and any(
        "cuda13" in one.extras for one in needed
    )
    for one in needed:
        assert one.specifier.contains(pins[re.sub(r"[-_.]+", "-", one.name).lower()]), one


def test_the_container_is_made_of_files_that_exist():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    steps = [
        line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")
    ]
    assert steps[0][0] == "FROM" and re.fullmatch(r"python:3\.12\.\d+-slim-bookworm", steps[0][1])
    assert {name for name, _ in steps} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert {"uae_jax", "configs", "launch", "setup.py", "README.md"} <= set(copied)
    assert all((ROOT / source).exists() and source.split("/")[0] not in ignored for source in copied)
    entry = json.loads(steps[-1][1])
    assert (
        steps[-1][0] == "ENTRYPOINT"
        and entry == ["launch/on_cards.sh", "python", "-m", "uae_jax.main"]
        and os.access(ROOT / entry[0], os.X_OK)
    )
    assert "--gpus all" in text and "--shm-size=" in text and steps[-2] == ["USER", "uae"]
