"""Checks of a host with cards, and the settings of XLA and NCCL."""

import os
import resource
import shlex
import subprocess
import sys

import pytest
from cards import H100, SHOW, THRESHOLDS, refused, shown
from launchers import ROOT, fake, launch

from uae_jax.planning.chips import USABLE


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
