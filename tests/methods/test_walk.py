"""From `main` to a loss: at most 8 functions in at most 5 files, as docs/methods.md says."""

import pathlib
import re
import sys

import pytest

from uae_jax import main
from uae_jax.methods import STAGES
from uae_jax.stages import kinds

ROOT = pathlib.Path(main.__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
SMALL = (
    "evaluation.images=8 evaluation.images_during=8 evaluation.batch_size=8 evaluation.geneval_per_tag=0 "
    "evaluation.sampler_steps=1 evaluation.samples=1 loop.eval_every=0"
).split()
METHODS = {
    "pretrain": "pretrain.steps=1 pretrain.batch_size=8",
    "cold_start": "cold_start.steps=1 cold_start.batch_size=8 cold_start.sampler_steps=1",
    "gen_for_und": "gen_for_und.steps=1 gen_for_und.batch_size=8 gen_for_und.group_size=2 gen_for_und.sampler_steps=1 "
    "gen_for_und.max_new_tokens=4",
    "flow_grpo": "und_for_gen.method=flow_grpo und_for_gen.steps=1 und_for_gen.batch_size=8 und_for_gen.group_size=2 "
    "und_for_gen.sampler_steps=3 und_for_gen.max_new_tokens=4 und_for_gen.flow_grpo.window=1 "
    "und_for_gen.flow_grpo.window_high=2 und_for_gen.flow_grpo.starts=1",
    "nft": "und_for_gen.method=nft und_for_gen.steps=1 und_for_gen.batch_size=8 und_for_gen.group_size=2 "
    "und_for_gen.sampler_steps=1 und_for_gen.max_new_tokens=4 und_for_gen.nft.levels=1",
}


def documented() -> list[tuple[str, str]]:
    """(function, file) of the page's table."""
    rows = re.findall(r"^\| \d \| `(\w+)` \| `([\w/.]+)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(rows) >= 6
    return rows


def own_frames() -> list[tuple[str, str]]:
    """(outermost function, file) of the package's frames on the stack, from `main` on."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "uae_jax") and path.name != "loops.py":  # as `jax.lax.scan`, no step of the walk
            outer = frame.f_code.co_qualname.partition(".<locals>")[0].rpartition(".")[2]
            frames.append((outer, str(path.relative_to(ROOT))))
        frame = frame.f_back
    return list(dict.fromkeys(reversed(frames)))


class Reached(Exception):
    """The loss is traced: nothing need be compiled to see how it was reached."""


class NoScores:
    """In place of the evaluation, which is not on the walk."""

    def __init__(self, *arguments, **options):
        pass

    def __call__(self, parts, folder):
        folder.mkdir(parents=True, exist_ok=True)
        return {}

    def rows_of(self, complete):
        return 1


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "gen_for_und" else pytest.mark.slow) for name in METHODS],
)
def test_the_walk_to_a_loss_is_the_documented_one(name, tmp_path, monkeypatch):
    stage = "und_for_gen" if name in ("flow_grpo", "nft") else name
    method, seen = STAGES[stage].methods[name if stage == "und_for_gen" else ""], []
    own_loss = method.loss

    def loss(self, *arguments):
        walk = own_frames()
        if ("check_programs", "uae_jax/stages/checks.py") in walk:
            return own_loss(self, *arguments)
        seen.append(walk)
        raise Reached

    monkeypatch.setattr(method, "loss", loss)
    monkeypatch.setattr(kinds, "DecoderEvaluator", NoScores)
    settings = [f"--config.{setting}" for setting in (*SMALL, *METHODS[name].split())]
    with pytest.raises(Reached):
        main.main([f"--config={ROOT / 'configs' / f'{stage}.py'}", f"--workdir={tmp_path / 'run'}", *settings])
    walk = [*seen[0], ("loss", f"uae_jax/methods/{method.__module__.rpartition('.')[2]}.py")]
    own = pathlib.Path(walk[-1][1]).stem
    expected = [(function, file.replace("METHOD", own)) for function, file in documented()]
    assert walk == expected
    assert len(walk) <= 8
    assert len({file for _, file in walk}) <= 5
