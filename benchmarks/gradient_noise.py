"""How much of the decoder's policy gradient is noise: cosine of two halves of a batch, and the noise scale.

    python -m benchmarks.gradient_noise --workdir=runs/noise                             the built-in model
    python -m benchmarks.gradient_noise --workdir=runs/noise --model=runs/seed_1 --batches=8 --arms=nft,shared_1

Nothing is trained: each estimator makes rollouts of the same model on the same images, and the halves of a batch give
two gradients. The noise scale is the number of drawings at which signal and noise are equal (`rl.gradient_noise`).
Estimators are so compared before any of them is run. A line also has the seconds of a rollout with its gradient, after
compilation. One stochastic step k: from noises of their own (`own_k`), or from one noise with one replay (`shared_k`).
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import presets
from uae_jax.methods.method import gradients_of, make_method, make_rollout
from uae_jax.methods.trained import trainable
from uae_jax.settings import frozen
from uae_jax.stages.run import Run
from uae_jax.stages.run_config import RunConfig

STAGE = "und_for_gen"
# one stochastic step with weights that are flat over steps, no KL
FLOW = dict(window=1, step_rule="sde", noise_level=0.7, grpo_guard=True, kl_weight=0.0, advantage_scale="batch")
NFT = dict(levels=2, time_shift=4.0, kl_weight=0.0, old_decay=0.0, advantage_scale="batch")


def _flow(step: int, **own: Any) -> dict[str, Any]:
    return dict(method="flow_grpo", flow_grpo=FLOW | dict(window_low=step, window_high=step + 1) | own)


ARMS: dict[str, dict[str, Any]] = {
    **{f"own_{step}": _flow(step) for step in range(4)},
    **{f"shared_{step}": _flow(step, one_replay=True) for step in range(4)},
    **{f"starts_{step}": _flow(step, one_replay=True, starts=2) for step in range(3)},
    "nft": dict(method="nft", nft=NFT),
    "nft_shared": dict(method="nft", nft=NFT | dict(shared_levels=True, stratified=True)),
    "awm": dict(method="nft", nft=NFT | dict(objective="awm", stratified=True, shared_levels=True)),
}


def configured(arm: Mapping[str, Any], options: argparse.Namespace) -> RunConfig:
    """The configuration of an estimator: the captioner's own captions, the plain reward, all of the transformer."""
    stage = dict(
        data_captions=options.data_captions,
        batch_size=options.images,
        group_size=options.group,
        train="full",
        reward=dict(contrast=0.0),
    )
    values = presets.merged(presets.preset("tiny", (STAGE,)).to_dict(), {STAGE: stage | arm, "seed": options.seed})
    small = dict(images=1, geneval_per_tag=0, questions="")
    return frozen(RunConfig, presets.merged(values, dict(model=dict(folder=options.model), evaluation=small)))


def measure(arm: Mapping[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """`gradient_cosine` and `noise_scale` over the batches, their spread, and seconds a batch."""
    run = Run(configured(arm, options), options.workdir)
    settings = run.config.stage(STAGE)
    method = make_method(STAGE, settings, run.config.sampler, run.system)
    key = jax.random.key(options.seed)
    start = trainable(run.system.model, run.parts, run.config.trains(STAGE), settings.lora_rank, key)
    params = jax.tree.map(jnp.asarray, start)
    others = {name: part for name, part in run.parts.items() if name not in params}

    @jax.jit
    def gradients(batch: Mapping, key: jax.Array) -> tuple[dict, jax.Array]:
        rollout = make_rollout(method, params, others, batch, key)
        rows = settings.samples_per_image
        found = gradients_of(method.loss, params, others, rollout, key, settings.micro_batches, compared=rows)
        return found[2], rollout["metrics"]["reward_std"][0] / rollout["metrics"]["reward_std"][1]

    pairs, seconds, spreads = [], [], []
    loader = run.batches(STAGE, settings.batch_size)
    for number in range(options.batches):
        batch, begun = next(loader), time.monotonic()
        metrics, spread = jax.device_get(gradients(batch, jax.random.fold_in(key, number)))
        seconds.append(time.monotonic() - begun)
        spreads.append(float(spread))
        pairs.append(metrics)
    loader.close()
    total, count = (np.sum([pair["noise_scale"][side] for pair in pairs]) for side in (0, 1))
    cosines = np.array([float(pair["gradient_cosine"][0]) for pair in pairs])
    return {
        "cosine": float(cosines.mean()),
        "cosine_error": float(cosines.std(ddof=1) / np.sqrt(len(cosines))) if len(cosines) > 1 else float("nan"),
        "noise_scale": float(total / count) if count > 0 else float("inf"),
        "reward_std": float(np.mean(spreads)),
        "seconds": float(np.median(seconds[1:] or seconds)),
        "drawings": options.images * options.group,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line an estimator, and writes WORKDIR/gradient_noise.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_noise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the result")
    parser.add_argument(
        "--model", default="", help="workdir or model folder of 32-pixel scenes; built-in when left out"
    )
    parser.add_argument("--arms", default="", help=f"some of {', '.join(ARMS)}, with commas between; all when empty")
    parser.add_argument("--batches", type=int, default=6, help="of each estimator")
    parser.add_argument("--images", type=int, default=16, help="of a batch, an even number")
    parser.add_argument("--group", type=int, default=8, help="drawings of an image")
    parser.add_argument("--data_captions", type=float, default=0.0, help="share of the data set's own captions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    names = [name for name in options.arms.split(",") if name] or list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"there is no estimator {unknown[0]!r}; choose from {', '.join(ARMS)}")
    options.workdir.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        found[name] = measure(ARMS[name], options)
        print(
            "{name:11s} cosine {cosine:.3f} +- {cosine_error:.3f}  noise scale {noise_scale:8.0f} drawings  reward "
            "spread {reward_std:.3f}  {seconds:.2f} s for {drawings} drawings".format(name=name, **found[name]),
            flush=True,
        )
        (options.workdir / "gradient_noise.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
