"""TPU VM slices: a run that needs its launcher only to start, through everything that fails on the way."""

import os
import signal
import subprocess

import pytest
from launchers import CONFIG, ROOT, before, calls, commands, environment_of, fake
from slices import Slice

WAIT = "until [ -e $S/go ]; do sleep .02; done"
GO = "touch $S/go"


@pytest.fixture
def tpu(tmp_path):
    made = Slice(tmp_path)
    yield made
    made.end()


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
    assert remote == [
        "bash uae_jax/launch/tpu_host.sh alive 2>/dev/null || "
        "(tar xzf uae_jax.tar.gz && bash uae_jax/launch/tpu_host.sh prepare)",
        "cd uae_jax && bash launch/tpu_host.sh start STAMP tpu-slice.us-east5-b 5 bucket\\,weights /mnt/bucket/runs/a "
        f"--config={CONFIG[0]} --workdir=/mnt/bucket/runs/a --config.model.folder=/mnt/weights/UAE",
    ]
    assert not any("queued-resources" in words for words in commands("tpu_vm.sh", "slice", "z", CONFIG[0], "/nfs/run"))
    for option, words in (("--status", "status"), ("--follow", "follow"), ("--stop", "stop")):
        (found,) = commands("tpu_vm.sh", option, "slice", "z")
        assert found[-1] == f"cd uae_jax && bash launch/tpu_host.sh {words}"


def test_a_run_is_started_on_all_hosts_and_followed_to_its_end(tpu):
    done = tpu.launch()
    assert done.returncode == 0, done.stderr
    assert [tpu.starts(0), tpu.starts(1)] == [1, 1]
    assert f"start 1 of host0 with -m uae_jax.main --config={CONFIG[0]} --workdir={tpu.workdir}" in done.stdout
    assert "host0: ended with code 0" in done.stderr and "host1: ended with code 0" in done.stderr
    installed = (tpu.bin / "calls").read_text()
    assert "uv venv -q --python 3.12 .venv" in installed and "-r launch/requirements-tpu.txt" in installed
    again = tpu.launch()  # nothing is installed twice
    assert again.returncode == 0 and (tpu.bin / "calls").read_text().count("uv venv") == 2  # one a host


def test_the_name_of_the_run_stays_over_starts(tpu):
    """By it a start on new hosts takes over the lock of the work folder."""
    tpu.main('echo "$UAE_RUN" >> $S/names; if [ $n = 1 ]; then exit 75; fi')
    assert tpu.launch().returncode == 0 and tpu.launch().returncode == 0
    names = (tpu.folder / "names").read_text().split()
    assert len(names) >= 4 and set(names) == {"tpu-slice.z"}


def test_the_hosts_start_a_run_again_by_themselves(tpu):
    tpu.main("if [ $n = 1 ]; then kill -KILL $$; fi; if [ $n = 2 ]; then exit 75; fi; if [ $n = 3 ]; then exit 143; fi")
    done = tpu.launch()
    assert done.returncode == 0 and tpu.starts(0) == 4 and tpu.calls("tpu_host.sh start") == 1
    assert "host0: ended with code 0, started 4 times, done" in done.stderr


def test_the_death_of_another_process_is_no_error_of_the_user(tpu):
    gone = "echo 'Terminating process because the JAX distributed service detected fatal errors' >&2; exit 1"
    tpu.main(f"if [ $n = 1 ]; then {gone}; fi")
    assert tpu.launch().returncode == 0 and tpu.starts(0) == 2


def test_an_error_of_the_user_ends_the_run_on_all_hosts(tpu):
    tpu.main(
        "if [ $h = host1 ]; then echo 'error: /data/a.jpg is damaged' >&2; exit 1; fi\n"
        "until [ -e $S/host1/uae_run/ended ]; do sleep .02; done; exit 75"  # it sees that host1 is gone
    )
    done = tpu.launch("--create=v6e-8")
    assert done.returncode == 1 and [tpu.starts(0), tpu.starts(1)] == [1, 1]
    assert "host1: ended with code 1, error: /data/a.jpg is damaged" in done.stderr
    assert "host0: ended with code 1, on host1: error: /data/a.jpg is damaged" in done.stderr
    assert tpu.calls("delete") == 0
    tpu.main("exit 0")
    assert tpu.launch().returncode == 0  # the same command, after the mend


def test_starts_without_progress_are_given_up(tpu):
    tpu.main("exit 75")
    done = tpu.launch("--retries", "2")
    assert done.returncode == 69 and tpu.starts(0) <= 3 and "given up after starts without progress" in done.stderr


def test_a_connection_that_ends_is_made_again(tpu):
    tpu.main(WAIT)
    tpu.faults("follow|exit 255", f"follow|{GO}; exit 255")
    done = tpu.launch()
    assert done.returncode == 0 and [tpu.starts(0), tpu.starts(1)] == [1, 1], done.stderr
    assert "the connection ended, and the run goes on (2 hosts); connecting again" in done.stderr


def test_a_launcher_that_is_gone_does_not_end_the_run(tpu):
    tpu.main(f"{WAIT}; exit 0")
    launcher = subprocess.Popen(
        ["bash", ROOT / "launch" / "tpu_vm.sh", *tpu.words()],
        env=environment_of(before(tpu.bin)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    tpu.until(lambda: tpu.calls("follow"))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    status = tpu.ask("--status")
    assert status.returncode == 0 and status.stdout == "host0: running\nhost1: running\n"
    tpu.faults(f"follow|{GO}")
    again = tpu.launch()  # the same command shows the run that is going on
    assert again.returncode == 0 and [tpu.starts(0), tpu.starts(1)] == [1, 1]
    assert tpu.calls("tpu_host.sh start") == 1
    followed = tpu.ask("--follow")
    assert followed.returncode == 0 and "start 1 of host0" in followed.stdout


def test_ctrl_c_ends_the_view_and_not_the_run(tpu):
    tpu.main(WAIT)
    launcher = subprocess.Popen(
        ["bash", ROOT / "launch" / "tpu_vm.sh", *tpu.words()],
        env=environment_of(before(tpu.bin)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # a shell that waits for a command other than the view goes on after Ctrl-C
    assert any("start 1 of host0" in line for line in launcher.stdout)
    tpu.until(tpu.running)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(60) == 130 and "the run goes on; launch/tpu_vm.sh --follow slice z" in launcher.stderr.read()
    assert tpu.ask("--status").stdout == "host0: running\nhost1: running\n"


def test_detach_ends_at_once(tpu):
    tpu.main(WAIT)
    done = tpu.launch("--detach")
    assert done.returncode == 0 and "launch/tpu_vm.sh --follow slice z shows it" in done.stderr
    assert tpu.calls("follow") == 0 and "running" in tpu.ask("--status").stdout


def test_stop_lets_the_run_save_and_it_stays_stopped(tpu):
    tpu.main("trap 'echo saved >> $S/saved; exit 143' TERM; until [ -e $S/go ]; do sleep .02; done")
    tpu.launch("--detach")
    tpu.until(tpu.running)
    assert tpu.ask("--stop").returncode == 0
    followed = tpu.ask("--follow")
    assert followed.returncode == 143 and (tpu.folder / "saved").read_text() == "saved\n" * 2
    assert "told to stop (code 143" in followed.stderr and [tpu.starts(0), tpu.starts(1)] == [1, 1]
    assert tpu.on_host(0, "resume").returncode == 0 and tpu.starts(0) == 1  # a boot does not start it either


def test_a_boot_of_a_host_goes_on(tpu):
    tpu.main(WAIT)
    tpu.launch("--detach")
    tpu.until(tpu.running)
    tpu.kill_host(0)
    assert "host0: lost\nhost1: running\n" == tpu.ask("--status").stdout
    line = (tpu.folder / "host0" / "crontab").read_text()
    assert line.startswith("@reboot bash") and line.rstrip().endswith("launch/tpu_host.sh resume")
    tpu.on_host(0, "resume")
    tpu.until(lambda: tpu.starts(0) == 2)
    (tpu.folder / "go").touch()
    assert tpu.ask("--follow").returncode == 0
    tpu.on_host(0, "resume")  # it has ended
    assert tpu.starts(0) == 2


def test_the_end_of_a_host_is_no_wish_to_stop(tpu):
    """systemd ends all processes of a host: supervisor and run get the signal, and the next boot goes on."""
    tpu.main("if [ $n = 1 ]; then trap 'exit 143' TERM; until [ -e $S/go ]; do sleep .02; done; fi")
    tpu.launch("--detach")
    tpu.until(tpu.running)
    supervisor, child = (int((tpu.folder / "host0" / "uae_run" / name).read_text()) for name in ("pid", "child"))
    os.kill(supervisor, signal.SIGTERM)
    os.kill(child, signal.SIGTERM)
    tpu.until(lambda: "host0: lost" in tpu.ask("--status").stdout)
    tpu.on_host(0, "resume")
    tpu.until(lambda: "host0: ended with code 0" in tpu.ask("--status").stdout)


@pytest.mark.parametrize(
    "fault",
    [
        "tpu-vm describe|echo 'ERROR: UNAVAILABLE: 503' >&2; exit 1",
        "tpu-vm scp|echo 'ssh: connect to host 1.2.3.4 port 22: Connection timed out' >&2; exit 1",
        "prepare|exit 255",
        "tpu_host.sh start|exit 255",
        "tpu_host.sh status|echo 'ERROR: HttpError 502' >&2; exit 1",
    ],
)
def test_a_failure_of_gcloud_that_passes_is_tried_again(tpu, fault):
    tpu.faults(fault, fault)
    done = tpu.launch()
    assert done.returncode == 0 and not tpu.faults_left(), done.stderr
    assert [tpu.starts(0), tpu.starts(1)] == [1, 1]


def test_a_connection_that_fails_after_the_start_starts_nothing_twice(tpu):
    tpu.main(WAIT)
    # the command arrives, its answer does not
    again = '(cd $S/host0 \\&\\& HOME=$PWD HOSTNAME=host0 bash -c "${!#}"); exit 255'.replace("\\", "")
    tpu.faults(f"tpu_host.sh start|{again}", f"follow|{GO}")
    assert tpu.launch().returncode == 0 and [tpu.starts(0), tpu.starts(1)] == [1, 1]
    tpu.on_host(0, "start", (tpu.folder / "host0" / "uae_run" / "command").read_text().split()[0], "and", "more")
    assert tpu.starts(0) == 1  # nor after its end


@pytest.mark.parametrize(
    "part, said",
    [
        ("prepare", "No space left on device"),
        ("tpu-vm scp", "PERMISSION_DENIED: no access"),
        ("tpu-vm describe", "Reauthentication failed"),
    ],
)
def test_a_failure_of_gcloud_that_stays_ends_the_launcher(tpu, part, said):
    tpu.faults(f"{part}|echo 'ERROR: {said}' >&2; exit 1")
    done = tpu.launch()
    assert done.returncode == 1 and said in done.stderr and tpu.calls(part) == 1 and tpu.starts(0) == 0


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(tpu):
    (tpu.folder / "node").unlink()
    tpu.main(f"if [ $n = 1 ]; then {WAIT}; fi")
    tpu.faults("follow|started; preempt; exit 255")
    done = tpu.launch("--create=v5p-128", "--spot")
    assert done.returncode == 0 and [tpu.starts(0), tpu.starts(1)] == [2, 2], done.stderr
    assert tpu.calls("queued-resources create") == 2 and tpu.calls("queued-resources delete") == 1
    assert "the slice slice was taken away; it is asked for again (1), and the run goes on" in done.stderr


def test_a_slice_that_is_taken_away_during_the_installation_is_made_again(tpu):
    tpu.state("queued", "ACTIVE")
    tpu.faults("prepare|preempt; exit 1")
    done = tpu.launch("--create=v5p-128")
    assert done.returncode == 0 and tpu.calls("queued-resources create") == 1, done.stderr


def test_a_slice_is_not_asked_for_without_end(tpu):
    tpu.state("queued", "ACTIVE")
    tpu.main(WAIT)
    tpu.faults(*["follow|started; preempt; exit 255"] * 2)
    done = tpu.launch("--create=v5p-128", "--restarts=1")
    assert done.returncode == 75 and tpu.calls("queued-resources create") == 1 and "raise --restarts" in done.stderr


def test_a_preempted_slice_that_was_not_asked_for_is_told(tpu):
    tpu.main(WAIT)
    tpu.faults("follow|started; preempt; exit 255")
    done = tpu.launch()
    assert done.returncode == 75 and "--create TYPE makes it again" in done.stderr
    assert tpu.calls("create") == 0


def test_a_slice_that_does_not_exist_is_told(tpu):
    (tpu.folder / "node").unlink()
    done = tpu.launch()
    assert done.returncode == 1 and "there is no slice slice in z; --create TYPE makes it" in done.stderr


def test_a_slice_that_a_person_stopped_is_not_made_anew(tpu):
    tpu.state("queued", "ACTIVE")
    tpu.state("node", "STOPPED")
    done = tpu.launch("--create=v6e-8")
    assert done.returncode == 1 and "tpu-vm start slice --zone z brings it back" in done.stderr
    assert tpu.calls("delete") == 0


def test_a_slice_that_fails_again_and_again_is_told(tpu):
    tpu.state("queued", "FAILED")
    tpu.faults(*["create|echo FAILED > $S/queued; exit 0"] * 2)
    done = tpu.launch("--create=v6e-8")
    assert done.returncode == 1 and "failed 3 times" in done.stderr and tpu.calls("queued-resources create") == 2


def test_a_refused_request_for_a_slice_is_the_end(tpu):
    tpu.faults("create|echo 'ERROR: INVALID_ARGUMENT: no such type' >&2; exit 1")
    done = tpu.launch("--create=v6e-7")
    assert done.returncode == 1 and "no such type" in done.stderr and tpu.calls("create") == 1
    done = tpu.launch("--create=v9-8")
    assert done.returncode != 0 and "name it with --runtime" in done.stderr and tpu.calls("create") == 1


def test_a_slice_that_is_repaired_is_waited_for(tpu):
    tpu.state("node", "REPAIRING")
    tpu.faults(*["tpu-vm describe|"] * 2, "tpu-vm describe|echo READY > $S/node")
    done = tpu.launch()
    assert done.returncode == 0 and done.stderr.count("waiting for the slice slice (coming)") == 1


def test_a_host_that_was_made_anew_gets_the_run_again(tpu):
    """Maintenance may replace a host; the others wait for it."""
    tpu.main(f"if [ $h = host0 ] || [ $n = 1 ]; then {WAIT}; fi")
    tpu.faults("follow|started; lose_host 1; exit 255", f"follow|{GO}")
    done = tpu.launch()
    assert done.returncode == 0 and [tpu.starts(0), tpu.starts(1)] == [1, 2], done.stderr


def test_hosts_that_do_not_answer_end_the_view_and_not_the_run(tpu):
    tpu.main(WAIT)
    tpu.launch("--detach")
    tpu.faults(*["tpu-vm ssh|exit 255"] * 40)
    done = tpu.ask("--follow")
    assert done.returncode == 75 and "launch/tpu_vm.sh --follow slice z connects again" in done.stderr
    tpu.faults(f"follow|{GO}")
    assert tpu.ask("--follow").returncode == 0


def test_a_bucket_is_mounted_before_each_start(tpu):
    """A mount is gone after a boot, and may fail for a while."""
    assert tpu.launch().returncode == 0
    for name, body in {
        "mountpoint": f"[ -e {tpu.folder}/mounted ]",
        "gcsfuse": f"[ $(grep -c ^gcsfuse {tpu.bin}/calls) -ge 3 ] && touch {tpu.folder}/mounted",
        "fusermount": "",
        "ls": "",
        "sudo": "",
    }.items():
        fake(tpu.bin, name, body)
    tpu.main("if [ $n = 2 ]; then rm $S/mounted; exit 75; fi")
    tpu.on_host(0, "start", "7", "tpu-slice.z", "5", "bucket", str(tpu.workdir), "--config=a")
    tpu.until(lambda: "host0: ended with code 0" in tpu.ask("--status").stdout)
    assert calls(tpu.bin, "gcsfuse --implicit-dirs", "bucket /mnt/bucket") == 4 and tpu.starts(0) == 3


def test_another_run_on_the_slice_is_refused(tpu):
    tpu.main(WAIT)
    tpu.launch("--detach")
    done = tpu.launch("--detach", UAE_LOOK="0.02")
    assert done.returncode == 0 and tpu.calls("tpu_host.sh start") == 1
    other = Slice.words(tpu, "--detach")[:-1] + (str(tpu.folder / "other"),)
    refused = subprocess.run(
        ["bash", ROOT / "launch" / "tpu_vm.sh", *other],
        capture_output=True,
        text=True,
        env=environment_of(before(tpu.bin)),
        timeout=60,
    )
    assert refused.returncode == 2 and "another run is going on at slice" in refused.stderr
    assert "--stop" in refused.stderr
