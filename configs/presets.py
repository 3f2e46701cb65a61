"""Model sizes and what follows from them: what differs from the defaults of the settings.

The defaults are those of the full-size run, and stand with their meaning and source where the settings are defined;
`python -m uae_jax.main --config=unified_grpo --describe` prints them. Here stands only what a preset changes.
"""

import difflib
import functools
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from configs import own_decoders
from configs.recipes import RECIPES, Recipe
from uae_jax.settings import as_dict
from uae_jax.stages.run_config import RunConfig

Deviations = dict[str, Any]


def _tiny() -> Deviations:
    """The built-in model on the built-in scenes: all four stages in minutes on two cores."""
    return dict(
        data=dict(
            source="scenes",
            image_size=32,
            max_prompt=40,
            max_caption=32,
            rl_detail="short",
            caption_prompt="describe",
            negative_prompt="",
        ),
        # layout and colours of a small image are decided at high noise, hence the larger shift
        sampler=dict(shift=4.0, schedule="single"),
        evaluation=dict(
            images=512,
            images_during=64,
            batch_size=64,
            sampler_steps=16,
            guidance_scale=1.0,
            # captions are sampled as in training: the most probable caption would hide how much is left out
            temperature=1.0,
            geneval_per_tag=96,
            # the built-in captioner knows no letters: the captions that state the options compete. It answers all of
            # these questions right; forty of each category make a fall of .25 no accident (guard.understanding_fall)
            questions="builtin",
            questions_by="text",
        ),
        loop=dict(save_every=20, eval_every=20),
        # 128 sampled captions a step are few, and an explored caption may be long: healthy runs stay far from these
        guard=dict(kl=2.0, flow_kl=0.3, truncated=0.6, reward_fall=0.2),
        pretrain=dict(
            steps=30,
            batch_size=64,
            time_shift=4.0,
            optimizer=dict(learning_rate=3e-4, schedule="constant", warmup_steps=10),
        ),
        cold_start=dict(steps=20, batch_size=16, sampler_steps=6, guidance_scale=1.0, optimizer=dict(warmup_steps=0)),
        gen_for_und=dict(
            steps=60,
            batch_size=16,
            max_new_tokens=32,
            sampler_steps=6,
            guidance_scale=1.0,
            optimizer=dict(learning_rate=1e-3, warmup_steps=0),
            # what a caption adds after it has said everything is not rendered, so that the similarity alone never
            # teaches it to end
            reward=dict(overlong_penalty=0.2),
        ),
        und_for_gen=dict(
            # supervised, on the captioner's captions and some short prompts: at this size no reward did better
            # (docs/results.md)
            method="matching",
            steps=500,
            batch_size=16,
            group_size=12,
            max_new_tokens=32,
            data_captions=0.25,
            sampler_steps=6,
            train="full",
            # at a constant rate the scores wander once they have risen
            optimizer=dict(learning_rate=1e-3, warmup_steps=3, schedule="cosine"),
            matching=dict(time_shift=4.0, ema_decay=0.0),
            # for method=nft, whose update weighs every drawing's own flow matching
            nft=dict(levels=2, time_shift=4.0, kl_weight=0.1, ema_decay=0.0, old_decay=0.0),
            flow_grpo=dict(
                step_rule="sde",
                noise_level=0.7,
                # a reward says little of the later steps: one of the first three is stochastic
                one_replay=True,
                starts=2,
                window=1,
                window_high=3,
                grpo_guard=True,
                kl_weight=0.01,
                # 1e-4 at 65,536 latent values becomes 8e-4 at 1,024 (docs/correctness.md)
                clip_range=1e-3,
                updates_per_rollout=1,
                ema_decay=0.0,
            ),
        ),
    )


def _emoji() -> Deviations:
    """The model of `configs/bootstrap.py:emoji` on 64-pixel scenes of emoji, for one GPU or a patient CPU."""
    return merged(
        _tiny(),
        dict(
            model=dict(folder="runs/emoji_bootstrap/model"),
            # fewer than the decoder's bootstrap had, not none, as in captions that a model wrote
            data=dict(source="emoji", folder="data/emoji", image_size=64, mistakes=0.12),
            # the prompts of the built-in scenes ask for shapes
            evaluation=dict(geneval_per_tag=0),
            # 1e-4 at 65,536 latent values becomes 4e-4 at 4,096 (docs/correctness.md)
            und_for_gen=dict(flow_grpo=dict(clip_range=4e-4)),
        ),
    )


def _mini() -> Deviations:
    """The benchmark size; point `--config.model.folder` at a checkpoint of that size."""
    short = dict(steps=2, batch_size=2)
    # on a CPU small pieces are faster and need a third of the memory (dev/performance.md)
    pieces = short | dict(group_size=4, max_new_tokens=64, sampler_steps=6, vae_chunk=4)
    return dict(
        data=dict(
            source="scenes",
            image_size=256,
            max_prompt=192,
            max_caption=64,
            caption_prompt="Describe this image in detail.",
        ),
        evaluation=dict(images=8, batch_size=2, sampler_steps=6),
        pretrain=short | dict(optimizer=dict(warmup_steps=0, schedule="constant")),
        cold_start=short | dict(optimizer=dict(warmup_steps=0)),
        gen_for_und=pieces | dict(score_chunk=4, optimizer=dict(warmup_steps=0)),
        und_for_gen=pieces | dict(flow_grpo=dict(updates_per_rollout=1)),
    )


# What changes with the machine, for `PRESET@SLICE`: values that `uae_jax.plan` found to fit, or scaled from them
# (docs/scaling.md). The images of a rollout are decoded `vae_chunk` at a time, one or two a device. One card writes the
# captions of all parts in one loop (`rollout_slots`): a turn reads the whole language model, for one row or many.
SLICES: dict[str, Deviations] = {
    # 64 chips of 16 GiB; four chips share the captioner while it samples
    "v5e-64": dict(mesh=dict(fsdp=64), gen_for_und=dict(rollout_ways=4), und_for_gen=dict(rollout_ways=4)),
    # 64 chips of 32 GiB
    "v6e-64": dict(
        mesh=dict(fsdp=64),
        gen_for_und=dict(vae_chunk=128, rollout_ways=4),
        und_for_gen=dict(vae_chunk=128, rollout_ways=4),
    ),
    # 64 chips of 95 GiB
    "v5p-64": dict(
        mesh=dict(fsdp=64),
        gen_for_und=dict(vae_chunk=256, rollout_ways=4),
        und_for_gen=dict(vae_chunk=256, micro_batches=2, rollout_ways=4),
    ),
    # 8 chips of 16 GiB: the batch of many, in parts
    "v5e-8": dict(
        mesh=dict(fsdp=8),
        pretrain=dict(micro_batches=4),
        cold_start=dict(micro_batches=8, vae_chunk=8),
        gen_for_und=dict(rollout_parts=2, micro_batches=4, vae_chunk=8),
        und_for_gen=dict(batch_size=48, rollout_parts=2, vae_chunk=8),
    ),
    # 8 cards of 80 or 141 GB
    "8xH200": dict(
        mesh=dict(fsdp=8),
        pretrain=dict(micro_batches=2),
        cold_start=dict(micro_batches=4, vae_chunk=8),
        gen_for_und=dict(micro_batches=2, vae_chunk=16),
        und_for_gen=dict(batch_size=48, micro_batches=3, vae_chunk=16),
    ),
    # one card of 80 or 141 GB: the batch of many cards, in parts; of the large model adapters alone
    "1xH200": dict(
        mesh=dict(fsdp=1),
        pretrain=dict(micro_batches=64),
        cold_start=dict(micro_batches=64, vae_chunk=1),
        gen_for_und=dict(rollout_parts=8, micro_batches=16, vae_chunk=4),
        und_for_gen=dict(batch_size=48, rollout_parts=12, micro_batches=48, vae_chunk=4),
    ),
    # one card of 80 GB: larger parts than those of the row above, which it has too, and so fewer reads of the weights
    "1x80GB": dict(
        mesh=dict(fsdp=1),
        pretrain=dict(micro_batches=64),
        cold_start=dict(micro_batches=64, vae_chunk=1),
        gen_for_und=dict(rollout_parts=4, micro_batches=8, vae_chunk=8, rollout_slots=128),
        und_for_gen=dict(batch_size=48, rollout_parts=6, micro_batches=24, vae_chunk=8, rollout_slots=48),
    ),
    # one card of 40 or 48 GB: adapters alone
    "1x48GB": dict(
        mesh=dict(fsdp=1),
        gen_for_und=dict(rollout_parts=8, micro_batches=16, vae_chunk=4),
        und_for_gen=dict(batch_size=48, rollout_parts=12, micro_batches=48, vae_chunk=4, rollout_slots=12),
    ),
    # one card of 24 GB: adapters alone, and no copy of the language model for sampling
    "1x24GB": dict(
        mesh=dict(fsdp=1),
        gen_for_und=dict(rollout_parts=8, micro_batches=64, vae_chunk=2, gather_weights=False, rollout_slots=64),
        und_for_gen=dict(
            batch_size=48, rollout_parts=48, micro_batches=144, vae_chunk=2, gather_weights=False, rollout_slots=48
        ),
    ),
}
LARGE = ("qwen2_5_vl_3b_sd3_5_large", "qwen2_5_vl_7b_sd3_5_large")
# 8.1 B weights with AdamW's moments and a gradient take 130 GB, 2.5 B 40 GB: such machines train adapters only
ADAPTERS_ALONE = (
    *(f"{base}@{machine}" for base in LARGE for machine in ("1xH200", "1x80GB", "v5e-8")),
    "qwen2_5_vl_7b_sd3_5_medium@1x80GB",
    "qwen2_5_vl_3b_sd3_5_medium@1x48GB",
    "qwen2_5_vl_3b_sd3_5_large@1x48GB",
    "qwen2_5_vl_7b_sd3_5_medium@1x48GB",
    "qwen2_5_vl_3b_sd3_5_medium@1x24GB",
)
# the weights and what sampling needs are more than the card holds
TOO_LARGE = (
    "qwen2_5_vl_7b_sd3_5_large@1x48GB",
    "qwen2_5_vl_3b_sd3_5_large@1x24GB",
    "qwen2_5_vl_7b_sd3_5_medium@1x24GB",
    "qwen2_5_vl_7b_sd3_5_large@1x24GB",
)


def _own(name: str) -> Deviations:
    """A preset of a decoder with its own text encoder, such as `qwen2_5_vl_3b_klein_4b@1x24GB`."""
    decoder, sizes, machine = OWN[name]
    return merged(own_decoders.deviations(decoder, sizes), decoder.machines.get(machine, {}))


def _full(name: str) -> Deviations:
    """A full-size preset, such as `qwen2_5_vl_3b_sd3_5_large` or `qwen2_5_vl_3b_sd3_5_large@v6e-64`."""
    sizes, _, machine = name.partition("@")
    # a copy of the language model for the length of a rollout saves gathering it for every token; 6 GiB fit everywhere,
    # the 15 GiB of 7 B parameters not into chips of 16, unless some share it
    fits = not sizes.startswith("qwen2_5_vl_7b") or machine not in ("", "v5e-8")
    gathered = dict(gather_weights=True) if fits else {}
    deviations = dict(
        # what is not trained is stored in bfloat16, as flow_grpo stores it (scripts/train_sd3.py: inference_dtype)
        model=dict(sizes=sizes, frozen_dtype="bfloat16", dtype="bfloat16", remat="full"),
        data=dict(max_prompt=192),
        # parameters are sharded over all devices: the training state of the large one alone is 98 GB
        mesh=dict(data=1, fsdp=-1),
        # on 64 devices one image a device, and one at a time in the auto-encoder
        cold_start=dict(batch_size=64, vae_chunk=64),
        gen_for_und=dict(vae_chunk=64) | gathered,
        # scores at the guidance of the release, and at that of the rollouts of und_for_gen
        evaluation=dict(also_guidance_scale=1.0),
        # flow_grpo has 48 groups; 64 give each of 64 devices one
        und_for_gen=dict(batch_size=64, micro_batches=6, vae_chunk=64) | gathered,
    )
    deviations = merged(deviations, SLICES.get(machine, {}))
    return merged(deviations, _fewer_gathers(sizes, machine))


def _fewer_gathers(sizes: str, machine: str) -> Deviations:
    """How 64 chips receive the transformer less often in the RL stages: in larger parts, and once a step where a copy
    fits, 4.6 GiB of medium and 15 of large (docs/scaling.md).
    """
    if machine not in ("v5e-64", "v6e-64", "v5p-64"):
        return {}
    if machine == "v5e-64" and sizes.endswith("large"):
        return dict(und_for_gen=dict(micro_batches=1))
    copy = dict(gather_decoder=True)
    return dict(gen_for_und=copy, und_for_gen=copy | dict(micro_batches=2))


FULL = (
    "qwen2_5_vl_3b_sd3_5_medium",
    "qwen2_5_vl_3b_sd3_5_large",
    "qwen2_5_vl_7b_sd3_5_medium",
    "qwen2_5_vl_7b_sd3_5_large",
)
OWN = own_decoders.known()
PRESETS = (
    {"tiny": _tiny, "emoji": _emoji, "mini": _mini}
    | {
        name: functools.partial(_full, name)
        for base in FULL
        for name in (base, *(f"{base}@{machine}" for machine in SLICES))
        if name not in TOO_LARGE
    }
    | {name: functools.partial(_own, name) for name in OWN}
)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Deviations:
    """Nested settings with those of another one in their place."""
    both = dict(base)
    for name, value in changes.items():
        both[name] = merged(both.get(name, {}), value) if isinstance(value, Mapping) else value
    return both


def _recipe(name: str, recipe: str) -> Recipe:
    if recipe not in RECIPES or name.partition("@")[0] not in FULL:
        raise ValueError(
            f"there is no {name}+{recipe}; recipes are {', '.join(RECIPES)}, of the presets {', '.join(FULL)}"
        )
    return RECIPES[recipe]


def unknown_preset(name: str, known: Collection[str]) -> str:
    """What to say of a preset that does not exist: its model's machines, the nearest preset, or all models."""
    model = name.partition("@")[0]
    if machines := [other.partition("@")[2] for other in known if other.startswith(f"{model}@")]:
        hint = f"{model} is for {', '.join(f'@{machine}' for machine in machines)}"
    elif near := difflib.get_close_matches(name, known, 1):
        hint = f"did you mean {near[0]}?"
    else:
        models = [other for other in known if "@" not in other]
        made = next((other for other in known if "@" in other), "")
        hint = f"choose one of {', '.join(models)}" + (f", with a machine as in {made}" if made else "")
    return f"unknown preset {name!r}; {hint}"


def preset(name: str | None, stages: tuple[str, ...]) -> ml_collections.ConfigDict:
    """The configuration of a preset, running the given stages.

    Args:
      name: such as `qwen2_5_vl_3b_sd3_5_medium@8xH200+nft`: model, machine and recipes (`configs.recipes`), of which
        the last two may be left out; None for `tiny`.
      stages: those of the configuration file; a recipe keeps its own ones of them.

    Raises:
      ValueError: there is no such preset or recipe, or it has none of the stages.
    """
    full, (name, *chosen) = name or "tiny", (name or "tiny").split("+")
    if name in TOO_LARGE or name in own_decoders.too_large():
        raise ValueError(
            f"there is no preset {name!r}: the model is more than such a card holds; choose a smaller model "
            "or more cards"
        )
    if name not in PRESETS:
        raise ValueError(unknown_preset(name, PRESETS))
    recipes = [_recipe(name, recipe) for recipe in chosen]
    known = set().union(*(recipe.stages for recipe in recipes)) if recipes else set(stages)
    wanted = tuple(
        stage
        for stage in stages
        if stage in known and (name not in ADAPTERS_ALONE or stage.endswith(("_for_und", "_for_gen")))
    )
    if recipes and not wanted:
        raise ValueError(
            f"the recipe of {full!r} has the stage {', '.join(sorted(known))}, and the configuration runs "
            f"{', '.join(stages)}; use the configuration of that stage"
        )
    if name in OWN:
        decoder, _, machine = OWN[name]
        own = own_decoders.stages_of(decoder, machine)
        wanted = tuple(stage for stage in wanted if stage in own)
        if stages and not wanted:
            raise ValueError(
                f"the preset {name!r} has a decoder with a text encoder of its own; it runs {' and '.join(own)}, not "
                f"{stages[0]}"
            )
    if stages and not wanted:
        raise ValueError(
            f"the preset {name!r} trains adapters only, in gen_for_und and und_for_gen; its machine is too small for "
            f"{stages[0]}"
        )
    changes = PRESETS[name]()
    for recipe in recipes:
        changes = merged(changes, recipe.changes)
    changes = merged(changes, dict(preset=full, stages=wanted))
    return ml_collections.ConfigDict(merged(as_dict(RunConfig()), changes))
