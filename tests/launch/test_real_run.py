"""A real run of two processes under its launcher, through the death of one of them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launchers import ROOT, environment_of, script

SMALL = (
    "evaluation.images=2 evaluation.images_during=2 evaluation.batch_size=2 evaluation.geneval_per_tag=0 "
    "evaluation.sampler_steps=1 evaluation.samples=1 loop.eval_every=0 loop.save_every=3 pretrain.steps=9 "
    "pretrain.batch_size=4 mesh.data=2"
).split()


@pytest.mark.slow
def test_a_run_whose_process_was_killed_is_finished_by_its_launcher(tmp_path):
    python = script(
        tmp_path / "python",
        '#!/bin/bash\nfor word in "$@"; do case $word in --process_id=*) '
        f"echo $$ > {tmp_path}/${{word##*=}} ;; esac; done\n"
        f'exec {sys.executable} "$@"\n',
    )
    workdir = tmp_path / "run"
    environment = environment_of({"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""})
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [
                "bash",
                ROOT / "launch" / "local.sh",
                f"--python={python}",
                "--processes=2",
                "configs/pretrain.py",
                str(workdir),
                *(f"--config.{setting}" for setting in SMALL),
            ],
            stdout=log,
            stderr=log,
            env=environment,
        )
    metrics = workdir / "metrics.jsonl"
    while launcher.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        time.sleep(0.2)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    code, said = launcher.wait(900), (tmp_path / "log").read_text()
    assert code == 0, said[-3000:]
    assert said.count("it is started again in 0 s, from its newest checkpoint") == 1
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 9
