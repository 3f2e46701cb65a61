"""A workdir as a run leaves it, without its weights."""

import json

import numpy as np
from PIL import Image

from uae_jax.training.metrics import MetricWriter
from uae_jax.training.summary import intervals, write_summary


def make_samples(folder, caption):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("0_original.png", "0_reconstruction.png"):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / name)
    sample = {
        "original": "0_original.png",
        "caption": caption,
        "reconstruction": "0_reconstruction.png",
        "scores": {"reward": 0.5},
    }
    (folder / "samples.json").write_text(json.dumps([sample]))


def make_run(workdir):
    rng = np.random.default_rng(0)
    writer, stages = MetricWriter(workdir, tensorboard=False), []
    for index, name in enumerate(("pretrain", "cold_start", "gen_for_und", "und_for_gen")):
        writer.begin(name, 0)
        for step in range(1, 61):
            numbers = {"loss": np.exp(-step / 20) + 0.1 * rng.normal(), "grad_norm": rng.gamma(2)}
            if index >= 2:
                numbers |= {
                    "reward": 0.5 + step / 200 + 0.05 * rng.normal(),
                    "caption_tokens": 10 + step / 5,
                    "kl": step / 1e4,
                }
            writer.write(name, step, step * 0.5, numbers)
            if step % 20 == 0:
                writer.write(
                    name, step, step * 0.5, {"eval/reward": 0.4 + step / 100, "eval/heldout_score": 0.3 + step / 150}
                )
        before, after = (
            {"reward": rng.normal(mean, 0.1, 40), "caption_tokens": rng.normal(20, 3, 40)} for mean in (0.5, 0.7)
        )
        stages.append(
            {
                "name": name,
                "steps": 60,
                "seconds": 30.0,
                "wall_seconds": 40.0,
                "before": intervals(before),
                "after": intervals(after),
            }
        )
        for when in ("before", "after"):
            make_samples(workdir / "samples" / f"{name}_{when}", f"a <red> circle {when}")
    writer.close()
    return write_summary(workdir, preset="tiny", seed=3, stages=stages)
