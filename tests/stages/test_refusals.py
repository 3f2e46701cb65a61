"""Bad data and settings through the command, as a person meets them: one line, an exit code, and a workdir as it
was.
"""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from programs import compiler_flags

from uae_jax import main
from uae_jax.stages import run as run_module
from uae_jax.training.signals import StopTraining


@pytest.fixture
def workdir(tmp_path):
    """What an earlier run may have left."""
    folder = tmp_path / "run"
    for name in (
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "export/llm/model.safetensors",
        "samples/a/samples.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"kept {name}")
    return folder


@pytest.fixture
def broken_captions(tmp_path):
    """Three captioned pictures; the third line is cut off."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "abc":
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "caption": "red circle"}) for name in "abc"]
    (folder / "captions.jsonl").write_text("\n".join([*lines[:2], lines[2][:-9]]) + "\n")
    return folder


def _contents(folder):
    return {
        path.relative_to(folder): path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def _in_process(*arguments):
    """`main` with these arguments, without the start of another interpreter."""
    main.main(["--config=configs/unified_grpo.py", *arguments])


def test_a_broken_line_of_captions_is_named_by_number(workdir, broken_captions):
    before = _contents(workdir)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "uae_jax.main",
            "--config=configs/unified_grpo.py",
            f"--workdir={workdir}",
            "--config.data.source=folder",
            f"--config.data.folder={broken_captions}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": compiler_flags()},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {broken_captions / 'captions.jsonl'} line 3 is not JSON")
    assert _contents(workdir) == before


@pytest.mark.parametrize(
    "setting, message",
    [
        ("gen_for_und.group_size=1", "config.gen_for_und.group_size is 1; it must be at least 2"),
        ("model.folder=/no/model", "model folder /no/model does not exist"),
        ("gen_for_und.batch_size=3", "config.gen_for_und.batch_size is 3"),
        ("gen_for_und.group_size=many", "config.gen_for_und.group_size is 'many'; it must be of type int"),
        ("und_for_gen.kl_weight=0.1", "config.und_for_gen.kl_weight does not exist; .*"),
        ("evaluation.encoders=longclip", "config.evaluation.encoders needs the image encoder 'longclip'; put it at .*"),
    ],
)
def test_settings_that_cannot_work_end_with_one_line(workdir, capsys, setting, message):
    before = _contents(workdir)
    with pytest.raises(SystemExit) as stop:
        _in_process(f"--workdir={workdir}", f"--config.{setting}")
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(f"error: {message}.*", line)
    assert _contents(workdir) == before


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stopped_run_says_so_and_exits_as_the_shell_expects(tmp_path, monkeypatch, capsys, signum, code):
    def stopped(config, workdir, seconds_at_peak):
        raise StopTraining("gen_for_und", 7, signum)

    monkeypatch.setattr(run_module, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        _in_process(f"--workdir={tmp_path / 'run'}")
    assert stop.value.code == code
    assert capsys.readouterr().err == "stopped at gen_for_und step 7; the same command continues\n"
