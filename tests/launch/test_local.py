"""One host, in one process or several."""

import json
import subprocess
import sys
import time

import pytest
from cards import H100, THRESHOLDS, refused
from launchers import CONFIG, ROOT, commands, environment_of, fake, launch, script


def test_one_host_runs_main_with_the_arguments_as_they_are():
    *_, main = commands("local.sh", "--python", "python3", CONFIG[0], "runs/a b", *CONFIG[1:])
    assert main == ["python3", "-m", "uae_jax.main", f"--config={CONFIG[0]}", "--workdir=runs/a b", *CONFIG[1:]]


def test_several_processes_share_a_coordinator():
    found = commands("local.sh", "--python=python3", "--processes", "3", "--port=4000", CONFIG[0], "runs/a")
    assert len(found) == 3
    for index, words in enumerate(found):
        assert words[-3:] == ["--coordinator=localhost:4000", "--processes=3", f"--process_id={index}"]


def test_local_reports_a_process_that_died_and_stops_on_a_signal(tmp_path):
    (tmp_path / "python").write_text("""#!/bin/sh
case "$*" in *--process_id=1*) exit 9 ;; *) sleep .3; exit 1 ;; esac
""")
    (tmp_path / "python").chmod(0o755)
    done = launch("local.sh", f"--python={tmp_path / 'python'}", "--processes=2", CONFIG[0], "runs/a")
    assert done.returncode == 9 and "ended with code 9" in done.stderr and "the same command continues" in done.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
def test_local_starts_again_after_failures_of_the_machine(tmp_path, processes):
    python = script(
        tmp_path / "python",
        f"""#!/bin/bash
case "$*" in *--process_id=1*) sleep .1; exit 0 ;; esac
echo x >> {tmp_path}/starts
case $(wc -l < {tmp_path}/starts) in 1) kill -KILL $$ ;; 2) exit 75 ;; 3) exit 143 ;; *) exit 0 ;; esac
""",
    )
    done = launch("local.sh", f"--python={python}", f"--processes={processes}", CONFIG[0], str(tmp_path / "run"))
    assert done.returncode == 0 and (tmp_path / "starts").read_text() == "x\n" * 4
    assert done.stderr.count("it is started again in 0 s, from its newest checkpoint") == 3
    assert "code 137, killed" in done.stderr


def test_local_gives_up_and_does_not_repeat_an_error(tmp_path):
    python = script(tmp_path / "python", f"#!/bin/bash\necho x >> {tmp_path}/starts; exit $CODE\n")
    arguments = (f"--python={python}", "--retries=2", CONFIG[0], str(tmp_path / "run"))
    done = launch("local.sh", *arguments, CODE="137")
    assert done.returncode == 69 and (tmp_path / "starts").read_text() == "x\n" * 3
    (tmp_path / "starts").unlink()
    done = launch("local.sh", *arguments, CODE="1")
    assert done.returncode == 1 and (tmp_path / "starts").read_text() == "x\n" and not done.stderr


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
            env=environment_of({}),
        )
        while not (tmp_path / "started").exists() or len((tmp_path / "started").read_text()) < int(processes):
            assert script.poll() is None
            time.sleep(0.05)
        script.terminate()
        assert script.wait(60) == 143
        assert (tmp_path / "started").read_text() == "x" * int(processes)


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
