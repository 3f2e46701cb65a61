"""What all launch scripts do: help, refusals of wrong calls, a clean linter."""

import pathlib
import subprocess
import sys

import pytest
from launchers import ROOT, SCRIPTS, launch


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
    assert (
        "one of --image and --built"
        in launch("gke_xpk.sh", "--tpu-type=v6e-8", "--image=a", "--built=b", "a", "b", "c", "d").stderr
    )
    assert "need --create" in launch("tpu_vm.sh", "--spot", "a", "b", "c", "d").stderr
    assert "--install needs a value" in launch("in_pod.sh", "--install").stderr


@pytest.mark.parametrize("script", ["in_pod.sh", "tpu_host.sh"])
def test_the_parts_that_run_elsewhere_explain_themselves(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: launch/{script}")
    done = launch(script, "-x")
    assert done.returncode == 2 and "--help" in done.stderr and done.stderr.count("\n") == 1


def test_the_scripts_are_clean_for_shellcheck():
    linter = pathlib.Path(sys.executable).parent / "shellcheck"
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    done = subprocess.run([linter, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(scripts) == 10, done.stdout
