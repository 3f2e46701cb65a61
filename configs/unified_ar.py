"""One network that captions and draws, trained by the reconstruction of images (Janus-Pro; docs/janus.md).

    python -m uae_jax.main --config=configs/unified_ar.py --workdir=runs/unified
    python -m uae_jax.main --config=unified_ar:janus_pro_1b --workdir=runs/janus \
        --config.model.folder=/weights/Janus-Pro-1B --config.data.folder=/data/photographs

The first command trains the built-in unified model of scenes, which `configs/bootstrap.py:unified` makes from nothing.
The folder of the second holds the released weights, and beside them `clip` for the reward and `dinov2` for the held-out
score.
"""

import functools

import ml_collections

from configs.presets import Deviations, merged, unknown_preset
from uae_jax.settings import as_dict
from uae_jax.stages.run_config import RunConfig

STAGES = ("unified_ar",)


def _tiny() -> Deviations:
    """The built-in unified model on the built-in scenes."""
    return dict(
        model=dict(folder="unified"),
        data=dict(
            source="scenes",
            image_size=32,
            max_caption=32,
            rl_detail="short",
            caption_prompt="describe",
            caption_system="describe",
        ),
        evaluation=dict(
            images=256,
            images_during=64,
            batch_size=64,
            guidance_scale=1.0,
            # captions are sampled as in training: the most probable caption would hide how much is left out
            temperature=1.0,
            geneval_per_tag=32,
        ),
        loop=dict(save_every=20, eval_every=20),
        # 128 sampled captions a step are few, and an explored caption may be long
        guard=dict(kl=2.0, truncated=0.6, reward_fall=0.2),
        unified_ar=dict(
            steps=120,
            batch_size=16,
            images_per_caption=4,
            max_new_tokens=32,
            guidance_scale=1.0,
            optimizer=dict(learning_rate=1e-3, warmup_steps=3),
            # a caption that never ends is drawn all the same
            reward=dict(overlong_penalty=0.2),
            # a drawing's tokens learn more slowly than a caption's
            image=dict(weight=4.0, clip_low=0.2, clip_high=0.2),
        ),
    )


# What a machine needs, for `PRESET@MACHINE`; without a machine it is a slice of 64 chips, of 16 GiB at the least. All
# make a step of one size, some of them in parts (docs/janus.md).
SIZES: dict[str, dict[str, Deviations]] = {
    "janus_pro_1b": {
        "": {},
        "8xH200": dict(mesh=dict(fsdp=8), unified_ar=dict(micro_batches=2)),
        "1x80GB": dict(mesh=dict(fsdp=1), unified_ar=dict(rollout_parts=8, micro_batches=16, vae_chunk=16)),
        "1x24GB": dict(mesh=dict(fsdp=1), unified_ar=dict(rollout_parts=32, micro_batches=64, vae_chunk=4)),
    },
    "janus_pro_7b": {
        # 16 images at a time are one for each group of four chips, which hold a quarter of the sampled copy each
        "": dict(mesh=dict(tensor=4), unified_ar=dict(rollout_parts=4, micro_batches=4, vae_chunk=16)),
        "8xH200": dict(mesh=dict(fsdp=8), unified_ar=dict(rollout_parts=2, micro_batches=8)),
        "1x80GB": dict(mesh=dict(fsdp=1), unified_ar=dict(rollout_parts=32, micro_batches=64, vae_chunk=4)),
    },
}


def _full(name: str) -> Deviations:
    """A published size, such as `janus_pro_1b` or `janus_pro_1b@1x80GB`."""
    sizes, _, machine = name.partition("@")
    deviations = dict(
        model=dict(sizes=sizes, frozen_dtype="bfloat16", dtype="bfloat16", remat="full"),
        data=dict(image_size=384, max_prompt=704, max_caption=256),
        evaluation=dict(batch_size=64),
        mesh=dict(data=1, fsdp=-1),
        unified_ar=dict(batch_size=64, max_new_tokens=256, gather_weights=True, vae_chunk=64),
    )
    return merged(deviations, SIZES[sizes][machine])


PRESETS = {"tiny": _tiny} | {
    name: functools.partial(_full, name)
    for size in SIZES
    for name in (f"{size}@{machine}" if machine else size for machine in SIZES[size])
}


def get_config(preset: str | None = None) -> ml_collections.ConfigDict:
    """The configuration of a preset (`tiny` when none is named).

    Raises:
      ValueError: there is no such preset.
    """
    name = preset or "tiny"
    if name not in PRESETS:
        raise ValueError(unknown_preset(name, PRESETS))
    changes = merged(PRESETS[name](), dict(preset=name, stages=STAGES))
    return ml_collections.ConfigDict(merged(as_dict(RunConfig()), changes))
