"""A SLURM cluster, by stubs of srun and scontrol."""

import json

import pytest
from cards import H100, refused
from launchers import CONFIG, ROOT, before, calls, commands, fake, launch


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


def job(tmp_path, srun: str, *options: str, restarts: int = 0, **environment: str):
    """One start of job 77, whose srun does as it is told; returns what the script did, and whether it queued itself."""
    fake(tmp_path / "bin", "srun", srun)
    fake(tmp_path / "bin", "scontrol", environment.pop("scontrol", ""))
    submitted = tmp_path / "submitted"
    if not submitted.exists():
        submitted.mkdir()
        (submitted / "launch").symlink_to(ROOT / "launch")
    queued = calls(tmp_path / "bin", "scontrol requeue 77")
    done = launch(
        "slurm.sh",
        *options,
        CONFIG[0],
        str(tmp_path / "run"),
        SLURM_SUBMIT_DIR=str(submitted),
        SLURM_JOB_ID="77",
        SLURM_RESTART_COUNT=str(restarts),
        **before(tmp_path / "bin"),
        **environment,
    )
    return done, calls(tmp_path / "bin", "scontrol requeue 77") > queued


@pytest.mark.parametrize(
    "srun, code, queued",
    [
        ("exit 0", 0, False),
        ("exit 143", 0, True),  # the time limit, or a preemption: all tasks have saved
        ("exit 75", 0, True),
        ("exit 137", 0, True),
        ("kill -KILL $$", 0, True),  # srun itself
        ("echo 'srun: error: Node failure on n3' >&2; exit 1", 0, True),
        ("exit 1", 1, False),
        ("exit 2", 2, False),
    ],
)
def test_a_job_queues_itself_again_after_infrastructure_only(tmp_path, srun, code, queued):
    done, again = job(tmp_path, srun)
    assert (done.returncode, again) == (code, queued), done.stderr


SAID = "echo 'srun: error: n1: {}' >&2; "
ENDED = SAID.format("tasks 0-2,4-7: Terminated")


@pytest.mark.parametrize(
    "srun, code, queued",
    [
        # srun ends the other tasks for the first one, and answers with the highest code
        (SAID.format("task 3: Exited with exit code 1") + ENDED + "exit 143", 1, False),
        (SAID.format("task 3: Exited with exit code 2") + SAID.format("tasks 0-2: Killed") + "exit 137", 2, False),
        (SAID.format("task 3: Exited with exit code 75") + ENDED + "exit 143", 0, True),
        (SAID.format("task 3: Killed") + SAID.format("tasks 0-2: Exited with exit code 75") + "exit 137", 0, True),
        (SAID.format("task 3: Out Of Memory") + ENDED + "exit 143", 0, True),
        (SAID.format("task 3: Segmentation fault (core dumped)") + ENDED + "exit 143", 0, True),
        (SAID.format("tasks 0-7: Exited with exit code 143") + "exit 143", 0, True),
        (
            "echo 'Terminating process because the JAX distributed service detected fatal errors' >&2; "
            + SAID.format("tasks 0-7: Exited with exit code 1")
            + "exit 1",
            0,
            True,
        ),
        (
            "echo 'error: /data/a.jpg is damaged' >&2; "
            "echo 'Terminating process because the JAX distributed service detected fatal errors' >&2; "
            + SAID.format("tasks 0-7: Exited with exit code 1")
            + "exit 1",
            1,
            False,
        ),
    ],
)
def test_the_task_that_failed_first_decides(tmp_path, srun, code, queued):
    done, again = job(tmp_path, srun)
    assert (done.returncode, again) == (code, queued), done.stderr
    assert "srun: error: n1" in done.stderr  # it is still seen


def test_a_job_is_not_queued_again_for_ever(tmp_path):
    done, again = job(tmp_path, "exit 143", restarts=100)
    assert (done.returncode, again) == (143, False) and "queued again 100 times" in done.stderr
    done, again = job(tmp_path, "exit 143", "--max-restarts=200", restarts=100)
    assert (done.returncode, again) == (0, True)


def test_a_job_without_progress_ends(tmp_path):
    found = [job(tmp_path, "exit 75", "--retries", "2", restarts=count) for count in range(3)]
    assert [done.returncode for done, _ in found] == [0, 0, 69] and [again for _, again in found] == [True, True, False]
    assert "without a new line of metrics" in found[-1][0].stderr
    (tmp_path / "run").mkdir()
    line = f"echo '{{}}' >> {tmp_path}/run/metrics.jsonl; exit 75"
    assert all(job(tmp_path, line, "--retries=1", restarts=count)[1] for count in range(4))


def test_the_counts_of_a_job_go_with_it(tmp_path):
    job(tmp_path, "exit 75")
    assert (tmp_path / "submitted" / "slurm-77.restarts").exists()
    job(tmp_path, "exit 0")
    assert not (tmp_path / "submitted" / "slurm-77.restarts").exists()


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path):
    done, _ = job(tmp_path, "exit 143", scontrol=f"[ $(grep -c scontrol {tmp_path}/bin/calls) -ge 3 ]")
    assert done.returncode == 0 and calls(tmp_path / "bin", "scontrol requeue") == 3
    done, _ = job(tmp_path, "exit 143", scontrol="exit 1")
    assert done.returncode == 143 and "the same sbatch continues the run" in done.stderr


@pytest.mark.parametrize("owner, left", [("slurm-77", False), ("slurm-78", True)])
def test_a_job_takes_the_lock_of_a_killed_task_with_it(tmp_path, owner, left):
    lock = tmp_path / "run" / "run.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"host": "n1", "process": 7, "run": owner}))
    job(tmp_path, "exit 137", "--retries=0")
    assert lock.exists() == left


def test_every_start_of_a_job_has_one_name(tmp_path):
    """By it a start on other nodes takes over the lock of the work folder."""
    done, _ = job(tmp_path, 'echo "$UAE_RUN"')
    assert done.stdout == "slurm-77\n"


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
