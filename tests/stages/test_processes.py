"""Several processes on this machine, over `jax.distributed`: the same numbers as one, and an orderly end when one of
them goes.
"""

import functools
import json
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time

import pytest
from programs import compiler_flags
from stage_pieces import STAGES, changed, check_same_step, largest_gap, linear, make_run, one_step

from uae_jax.data.precomputed import StoredExamples, read_manifest
from uae_jax.stages.export import export_system
from uae_jax.stages.precompute import Request, precompute

HERE = pathlib.Path(__file__).parent
CONFIG_FILE = """import json, pathlib, ml_collections
def get_config(argument=None):
    return ml_collections.ConfigDict(json.loads(pathlib.Path(argument).read_text()))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(count: int, devices: int, command, folder: pathlib.Path) -> list[subprocess.Popen]:
    """`command(coordinator, index)` in `count` processes with so many faked devices each; output in
    `folder/<index>.log`.
    """
    folder.mkdir(exist_ok=True)
    coordinator = f"localhost:{free_port()}"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_", "TPU_"))
    } | {
        "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[:2])),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": compiler_flags(devices),
        "TF_CPP_MIN_LOG_LEVEL": "1",
        # programs read from the cache do not agree on the order of their collectives on CPU
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    started = []
    for index in range(count):
        with (folder / f"{index}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command(coordinator, index), stdout=log, stderr=log, env=environment, cwd=HERE.parents[1]
                )
            )
    return started


def finish(started: list[subprocess.Popen], folder: pathlib.Path, seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes and output of all processes; none is left running."""
    try:
        end = time.monotonic() + seconds
        codes = [process.wait(max(end - time.monotonic(), 0.1)) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(folder / f"{index}.log").read_text() for index in range(len(started))]


@pytest.fixture(scope="module")
def run_alone(config, tmp_path_factory):
    return make_run(linear(config), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def alone(run_alone):
    return functools.cache(lambda stage: one_step(run_alone, stage))


@pytest.fixture(scope="module")
def exported(run_alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_system(run_alone.system, run_alone.parts, folder)
    return contents(folder)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "count, devices, mesh, stages",
    [
        pytest.param(2, 2, dict(data=1, fsdp=2, tensor=2), STAGES, marks=pytest.mark.slow),
        # the tensor axis spans processes: two of them feed the same rows
        pytest.param(4, 1, dict(data=2, fsdp=1, tensor=2), ("pretrain",), marks=pytest.mark.slow),
        (2, 1, dict(data=1, fsdp=1, tensor=2), ("pretrain",)),
    ],
)
def test_processes_do_not_change_a_step_or_an_export(config, alone, exported, tmp_path, count, devices, mesh, stages):
    (tmp_path / "config.json").write_text(json.dumps(changed(linear(config), mesh=mesh)))
    started = start(
        count,
        devices,
        lambda coordinator, index: [
            sys.executable,
            HERE / "process_worker.py",
            tmp_path / "config.json",
            tmp_path / "result",
            coordinator,
            str(count),
            str(index),
            *stages,
        ],
        tmp_path / "logs",
    )
    codes, output = finish(started, tmp_path / "logs", 500)
    assert codes == [0] * count, output[0][-2000:] + output[-1][-2000:]
    found = pickle.loads((tmp_path / "result").read_bytes())
    for stage in stages:
        check_same_step(alone(stage), found[stage])
    assert contents(tmp_path / "export") == exported


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=1, tensor=1), dict(data=1, fsdp=1, tensor=2)])
def test_processes_precompute_shards_of_their_own(config, tmp_path, mesh):
    """18 examples in four shards of five; where both processes have the same rows, the first of them writes."""
    values = changed(config, stages=("pretrain",))
    precompute(values, Request(tmp_path / "alone", examples=18, shard_examples=5, batch_size=4))
    (tmp_path / "config.json").write_text(json.dumps(changed(values, mesh=mesh)))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(CONFIG_FILE)

    def command(coordinator: str, index: int) -> list:
        return [
            sys.executable,
            "-m",
            "uae_jax.precompute",
            f"--config={tmp_path / 'configs' / 'small.py'}:{tmp_path / 'config.json'}",
            f"--out={tmp_path / 'together'}",
            "--examples=18",
            "--shard_examples=5",
            "--batch_size=4",
            f"--coordinator={coordinator}",
            "--processes=2",
            f"--process_id={index}",
        ]

    codes, output = finish(start(2, 1, command, tmp_path / "logs"), tmp_path / "logs", 500)
    assert codes == [0, 0], output[0][-2000:] + output[1][-2000:]
    assert "done: " in output[0] and "done: " not in output[1]
    manifests = [read_manifest(tmp_path / name) for name in ("alone", "together")]
    assert manifests[0].made_of == manifests[1].made_of and [m.count for m in manifests] == [4, 4]
    one, other = (StoredExamples(tmp_path / name, m) for name, m in zip(("alone", "together"), manifests))
    for record in range(18):
        assert (one[record]["caption_ids"] == other[record]["caption_ids"]).all()
        assert largest_gap(one[record], other[record]) < 1e-5


def steps_done(workdir: pathlib.Path) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_steps(workdir: pathlib.Path, steps: int, started: list[subprocess.Popen], seconds: float) -> None:
    end = time.monotonic() + seconds
    while steps_done(workdir) < steps and time.monotonic() < end and all(process.poll() is None for process in started):
        time.sleep(0.2)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_and_the_death_of_one_ends_the_others(config, tmp_path):
    values = changed(
        config,
        stages=("pretrain",),
        pretrain=dict(steps=100_000),
        evaluation=dict(images=2, batch_size=2, geneval_per_tag=0),
        loop=dict(save_every=0),
        mesh=dict(data=1, fsdp=2, tensor=1),
    )
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(CONFIG_FILE)
    workdir, logs = tmp_path / "run", tmp_path / "logs"

    def command(coordinator: str, index: int) -> list:
        return [
            sys.executable,
            "-m",
            "uae_jax.main",
            f"--config={tmp_path / 'configs' / 'small.py'}:{tmp_path / 'config.json'}",
            f"--workdir={workdir}",
            f"--coordinator={coordinator}",
            "--processes=2",
            f"--process_id={index}",
        ]

    started = start(2, 1, command, logs)
    wait_for_steps(workdir, 2, started, 300)
    started[1].send_signal(signal.SIGTERM)
    codes, output = finish(started, logs, 120)
    said = [[line for line in text.splitlines() if line.startswith("stopped at pretrain step")] for text in output]
    assert codes == [143, 143] and said[0] == said[1] and len(said[0]) == 1, output[0][-2000:] + output[1][-2000:]
    stopped = int(said[0][0].split("step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / "pretrain" / str(stopped)).is_dir()

    started = start(2, 1, command, logs)  # the same command continues
    wait_for_steps(workdir, stopped + 2, started, 300)
    started[1].kill()
    codes, output = finish(started, logs, 60)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > stopped
    assert codes[1] == -signal.SIGKILL and codes[0] == 75
    assert "another process of this run is gone" in output[0] and "The same command continues" in output[0], output[0][
        -3000:
    ]
