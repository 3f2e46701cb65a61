"""The command: every benchmark of the table is there, help is quick and errors are one line, as a process of its
own.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from matplotlib import cbook
from PIL import Image
from programs import compiler_flags

from uae_jax import evaluate

ROOT = pathlib.Path(evaluate.__file__).parents[1]


@pytest.mark.parametrize("name", evaluate.COMMANDS)
def test_each_command_has_examples_and_arguments(name, capsys):
    described = importlib.import_module(evaluate.COMMANDS[name][0]).__doc__ or ""
    assert f"python -m uae_jax.evaluate {name}" in described
    with pytest.raises(SystemExit) as end:
        evaluate.main([name, "--help"])
    assert end.value.code == 0 and described.splitlines()[0] in capsys.readouterr().out


def test_unknown_commands_and_flags_are_told(capsys):
    for arguments in ([], ["nothing"], ["unified_bench", "--clips=x"], ["unified_bench", "--ref=x"]):
        with pytest.raises(SystemExit) as end:
            evaluate.main(arguments)
        assert end.value.code == 2
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in evaluate.COMMANDS)


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": compiler_flags()}
    return subprocess.run(
        [sys.executable, "-m", "uae_jax.evaluate", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_as_a_process_with_relative_paths(tmp_path):
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    (tmp_path / "ref").mkdir(), (tmp_path / "gen").mkdir()
    photo.save(tmp_path / "ref" / "0.jpg")
    photo.resize((64, 64)).save(tmp_path / "gen" / "0.png")
    encoder = ROOT / "uae_jax" / "assets" / "tiny" / "clip"
    done = run(tmp_path, "unified_bench", "--ref_dir=ref", "--gen_dir=gen", f"--clip={encoder}", "--output=scores.json")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "scores.json").read_text())["summary"]["n_valid"] == 1
        and (tmp_path / "report.html").is_file()
    )
    photo.save(tmp_path / "gen" / "stranger.jpg")
    done = run(tmp_path, "unified_bench", "--ref_dir=ref", "--gen_dir=gen", f"--clip={encoder}", "--output=again.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: 1 thing could not be scored: gen/stranger.jpg: no reference has its name"
    )
    assert json.loads((tmp_path / "again.json").read_text())["statistics_by_model"]["clip"]["n_valid"] == 1
