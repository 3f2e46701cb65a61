"""Model sizes and what follows from them: data shapes, sampler, hyperparameters of each stage.

Where the paper gives no value (notes in docs/recipes.md), the published value of the nearest method stands here with
its source beside it. Nothing in this folder imports the package: a config is data.
"""

import functools

import ml_collections

CAPTION_PROMPT = (
    "You are an expert vision-language model.  \nYour task is: Given an input image, generate a **textual "
    "description** "
    'of the image. If there is text in the image, transcribe it inside double quotes "".  \nNow, carefully analyze the '
    "input image and output the full description. "
)
NEGATIVE_PROMPT = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."


def _optimizer(learning_rate: float, **changes) -> dict:
    # AdamW .9/.999, weight decay 1e-4 and clip-norm 1 are flow_grpo's (config/base.py)
    return (
        dict(
            learning_rate=learning_rate,
            schedule="constant",
            warmup_steps=0,
            final_fraction=0.0,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=1e-4,
            decayed=r"(^|/)(kernel|embedding|a|b)$",
            max_grad_norm=1.0,
            multipliers=(),
        )
        | changes
    )


def _reward() -> dict:
    return dict(
        names=("clip",),
        weights=(1.0,),
        pixel_weight=0.0,
        caption_weight=0.0,
        contrast=0.0,
        contrast_temperature=0.0,
        overlong_penalty=0.0,
        clamp="hard",
    )


def _guard() -> dict:
    """Bounds at which a stage is stopped and its last good checkpoint restored; 0 switches one off
    (`training.guard`).
    """
    return dict(
        window=10,
        reward_fall=0.1,
        non_finite=3,
        gradient_ratio=10.0,
        gradient_outliers=3,
        kl=1.0,
        flow_kl=0.0,
        truncated=0.5,
        margin=0.5,
    )


def _stages() -> dict:
    """All stages at full size; `tiny` changes what a laptop needs."""
    return dict(
        pretrain=dict(
            steps=20_000,
            batch_size=256,
            micro_batches=1,
            updates_per_rollout=1,
            condition_dropout=0.1,
            # UniWorld-V1 train_denoiser.py: logit-normal(0, 1), weight 1, target noise - image
            time_scheme="logit_normal",
            time_shift=3.0,
            weighting="none",
            train_projector=True,
            optimizer=_optimizer(1e-4, warmup_steps=500, schedule="cosine"),
            ema_decay=0.0,
        ),
        cold_start=dict(
            steps=500,
            batch_size=32,
            micro_batches=1,
            updates_per_rollout=1,
            # the released code: 10 Euler steps, guidance 5
            sampler_steps=10,
            guidance_scale=5.0,
            gradient_steps=0,
            condition="reencoded_caption",
            clamp="straight_through",
            vae_chunk=0,
            reward=_reward(),
            optimizer=_optimizer(1e-5, warmup_steps=20),
            ema_decay=0.0,
        ),
        gen_for_und=dict(
            # TRL: learning rate 1e-6 full, 1e-5 with adapters; groups of 8, temperature 1
            steps=1_000,
            batch_size=64,
            micro_batches=1,
            updates_per_rollout=1,
            group_size=8,
            temperature=1.0,
            max_new_tokens=512,
            sampler_steps=10,
            guidance_scale=5.0,
            shared_noise=True,
            condition_model="reference",
            gather_weights=False,
            aggregation="grpo",
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=0.0,
            kl_weight=0.02,
            kl_estimator="k3",
            advantage_scale="group",
            vae_chunk=0,
            score_chunk=64,
            train="lora",
            lora_rank=32,
            reward=_reward(),
            objective="grpo",
            optimizer=_optimizer(1e-5, warmup_steps=10),
            ema_decay=0.0,
        ),
        und_for_gen=dict(
            # flow_grpo: 48 groups of 24, noise .7, 10 steps, learning rate 3e-4, clip 1e-4, two updates a rollout
            steps=1_000,
            batch_size=48,
            method="flow_grpo",
            micro_batches=1,
            updates_per_rollout=2,
            group_size=24,
            temperature=0.7,
            max_new_tokens=512,
            data_captions=0.0,
            shared_noise=False,
            sampler_steps=10,
            guidance_scale=1.0,
            step_rule="sde",
            noise_level=0.7,
            window=3,
            window_low=0,
            window_high=5,
            clip_range=1e-5,
            kl_weight=0.04,
            kl_kind="gaussian_nodt",
            guard=False,
            # of method="nft"
            noise_levels=2,
            time_scheme="uniform",
            time_shift=3.0,
            strength=1.0,
            advantage_bound=5.0,
            advantage_scale="batch",
            condition_model="reference",
            gather_weights=False,
            train="lora",
            lora_rank=32,
            reward=_reward(),
            vae_chunk=0,
            optimizer=_optimizer(3e-4),
            ema_decay=0.9,
        ),
    )


def _base(preset: str) -> dict:
    return dict(
        preset=preset,
        seed=0,
        stages=("pretrain", "cold_start", "gen_for_und", "und_for_gen"),
        rounds=1,
        # what is not trained is held in bfloat16, as flow_grpo holds it (scripts/train_sd3.py: inference_dtype)
        model=dict(
            folder="",
            lora_alpha=64.0,
            frozen_dtype="bfloat16",
            dtype="bfloat16",
            remat="full",
            merge_adapters=False,
            adapters=True,
            caption_scorer="",
        ),
        data=dict(
            source="folder",
            folder="",
            name="",
            split="train",
            data_dir="",
            image_key="image",
            caption_key="caption",
            heldout_folder="",
            heldout_split="test",
            image_size=512,
            max_prompt=192,
            max_caption=512,
            detail="full",
            rl_detail="mixed",
            mistakes=0.0,
            caption_prompt=CAPTION_PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
        ),
        sampler=dict(shift=3.0, schedule="diffusers"),
        mesh=dict(data=-1, fsdp=1, tensor=1),
        evaluation=dict(
            images=100,
            images_during=32,
            batch_size=4,
            sampler_steps=40,
            guidance_scale=5.0,
            temperature=0.0,
            encoders=("clip",),
            heldout_encoder="dinov2",
            geneval_per_tag=0,
            samples=8,
        ),
        loop=dict(log_every=1, save_every=100, eval_every=100, keep=2, wandb_project=""),
        guard=_guard(),
        **_stages(),
    )


def _tiny() -> dict:
    """The built-in model on the built-in scenes: all four stages in minutes on two cores."""
    config = _base("tiny")
    config["model"] |= dict(frozen_dtype="float32", dtype="float32", remat="none")
    config["data"] |= dict(
        source="scenes",
        image_size=32,
        max_prompt=40,
        max_caption=32,
        caption_prompt="describe",
        # fewer than the decoder's bootstrap had, not none, as in captions that a model wrote
        mistakes=0.12,
        rl_detail="short",
        negative_prompt="",
    )
    # layout and colours of a small picture are decided at high noise, hence the larger shift
    config["sampler"] |= dict(shift=4.0, schedule="single")
    # captions are sampled as they are in training: the most probable caption would hide how much is left out
    config["evaluation"] |= dict(
        images=512,
        images_during=64,
        batch_size=64,
        sampler_steps=16,
        guidance_scale=1.0,
        temperature=1.0,
        geneval_per_tag=96,
    )
    config["loop"] |= dict(save_every=20, eval_every=20)
    # 128 sampled captions a step are few, and an explored caption may well be long: bounds that healthy runs stay far
    # from
    config["guard"] |= dict(kl=2.0, flow_kl=0.3, truncated=0.6, reward_fall=0.2)
    config["pretrain"] |= dict(steps=30, batch_size=64, time_shift=4.0, optimizer=_optimizer(3e-4, warmup_steps=10))
    config["cold_start"] |= dict(
        steps=20, batch_size=16, sampler_steps=6, guidance_scale=1.0, optimizer=_optimizer(1e-5)
    )
    config["gen_for_und"] |= dict(
        steps=60,
        batch_size=16,
        max_new_tokens=32,
        sampler_steps=6,
        guidance_scale=1.0,
        optimizer=_optimizer(1e-3),
        # what a caption adds after it has said everything is not drawn, so that the similarity alone never teaches it
        # to end
        reward=_reward() | dict(overlong_penalty=0.2),
    )
    config["und_for_gen"] |= dict(
        # Flow-GRPO needs more drawings than two cores make in minutes (docs/results.md); three of four captions are
        # short prompts of the scenes, since the captioner by now says everything
        method="nft",
        steps=60,
        batch_size=16,
        group_size=12,
        updates_per_rollout=1,
        max_new_tokens=32,
        data_captions=0.75,
        sampler_steps=6,
        time_shift=4.0,
        advantage_scale="group",
        kl_weight=0.1,
        train="full",
        # a short prompt is answered best by a picture that is a little like all others, or like many; that must not pay
        reward=_reward() | dict(contrast=1.0, contrast_temperature=0.05),
        # at a constant rate the scores wander once they have risen
        optimizer=_optimizer(3e-4, warmup_steps=3, schedule="cosine"),
        ema_decay=0.0,
        # of method="flow_grpo": 1e-4 at 65,536 latent numbers becomes 8e-4 at 1,024 (docs/correctness.md)
        window=2,
        window_low=0,
        window_high=4,
        clip_range=1e-3,
    )
    return config


def _emoji() -> dict:
    """The model of `configs/bootstrap.py:emoji` on 64-pixel scenes of emoji, for one GPU or a patient CPU
    (docs/emoji.md).
    """
    config = _tiny() | dict(preset="emoji")
    config["model"] |= dict(folder="runs/emoji_bootstrap/model")
    config["data"] |= dict(source="emoji", folder="data/emoji", image_size=64)
    # the prompts of the built-in scenes ask for shapes
    config["evaluation"] |= dict(geneval_per_tag=0)
    # 1e-4 at 65,536 latent numbers becomes 4e-4 at 4,096 (docs/correctness.md)
    config["und_for_gen"] |= dict(clip_range=4e-4)
    return config


def _mini() -> dict:
    """The benchmark size; point `--config.model.folder` at a checkpoint of that size."""
    config = _base("mini")
    config["model"] |= dict(frozen_dtype="float32", dtype="float32", remat="none")
    config["data"] |= dict(
        source="scenes", image_size=256, max_caption=64, caption_prompt="Describe this image in detail."
    )
    config["evaluation"] |= dict(images=8, batch_size=2, sampler_steps=6)
    for name in ("pretrain", "cold_start", "gen_for_und", "und_for_gen"):
        config[name] |= dict(
            steps=2, batch_size=2, optimizer=config[name]["optimizer"] | dict(warmup_steps=0, schedule="constant")
        )
    # on a CPU small pieces are faster and need a third of the memory (docs/performance.md)
    config["gen_for_und"] |= dict(group_size=4, max_new_tokens=64, sampler_steps=6, vae_chunk=4, score_chunk=4)
    config["und_for_gen"] |= dict(group_size=4, max_new_tokens=64, sampler_steps=6, updates_per_rollout=1, vae_chunk=4)
    return config


# What changes with the machine, for `PRESET@SLICE`: values that `uae_jax.plan` found to fit, or scaled from them
# (docs/scaling.md). A rollout's pictures are decoded `vae_chunk` at a time, one or two a device.
SLICES = {
    # 64 chips of 16 GiB
    "v5e-64": dict(
        mesh=dict(data=1, fsdp=64),
        pretrain=dict(micro_batches=1),
        cold_start=dict(vae_chunk=64),
        gen_for_und=dict(vae_chunk=64),
        und_for_gen=dict(vae_chunk=64, micro_batches=6),
    ),
    # 64 chips of 32 GiB
    "v6e-64": dict(
        mesh=dict(data=1, fsdp=64),
        pretrain=dict(micro_batches=1),
        cold_start=dict(vae_chunk=64),
        gen_for_und=dict(vae_chunk=128),
        und_for_gen=dict(vae_chunk=128, micro_batches=6),
    ),
    # 64 chips of 95 GiB
    "v5p-64": dict(
        mesh=dict(data=1, fsdp=64),
        pretrain=dict(micro_batches=1),
        cold_start=dict(vae_chunk=64),
        gen_for_und=dict(vae_chunk=256),
        und_for_gen=dict(vae_chunk=256, micro_batches=2),
    ),
    # 8 cards of 80 or 141 GB
    "8xH200": dict(
        mesh=dict(data=1, fsdp=8),
        pretrain=dict(micro_batches=2),
        cold_start=dict(micro_batches=4, vae_chunk=8),
        gen_for_und=dict(micro_batches=2, vae_chunk=16),
        und_for_gen=dict(micro_batches=4, vae_chunk=16),
    ),
    # one card of 80 or 141 GB: fewer pictures a step; of the large model adapters alone
    "1xH200": dict(
        mesh=dict(data=1, fsdp=1),
        pretrain=dict(micro_batches=64),
        cold_start=dict(batch_size=16, micro_batches=16, vae_chunk=1),
        gen_for_und=dict(batch_size=8, micro_batches=2, vae_chunk=4),
        und_for_gen=dict(batch_size=4, group_size=24, micro_batches=4, vae_chunk=4),
    ),
    # one card of 24 GB: adapters alone, and no copy of the language model for sampling
    "1x24GB": dict(
        mesh=dict(data=1, fsdp=1),
        gen_for_und=dict(batch_size=8, micro_batches=8, vae_chunk=2, gather_weights=False),
        und_for_gen=dict(batch_size=4, group_size=24, micro_batches=12, vae_chunk=2, gather_weights=False),
    ),
}
# 8.1 B weights with AdamW's moments and a gradient take 130 GB, 2.5 B 40 GB: such a card trains adapters only
ADAPTERS_ALONE = ("qwen2_5_vl_3b_sd3_5_large@1xH200", "qwen2_5_vl_3b_sd3_5_medium@1x24GB")
# the weights alone are more than the card holds
TOO_LARGE = ("qwen2_5_vl_3b_sd3_5_large@1x24GB",)


def _full(preset: str) -> dict:
    """A full-size preset, such as `qwen2_5_vl_3b_sd3_5_large` or `qwen2_5_vl_3b_sd3_5_large@v6e-64`."""
    config = _base(preset)
    # parameters are cut over all devices: whole, the large one's training state alone is 98 GB
    config["mesh"] = dict(data=1, fsdp=-1, tensor=1)
    # on 64 devices one picture a device, and one at a time in the auto-encoder
    config["cold_start"] |= dict(batch_size=64, vae_chunk=64)
    # a copy of the language model (6 GiB) for the length of a rollout saves gathering it for every token
    config["gen_for_und"] |= dict(vae_chunk=64, gather_weights=True)
    # flow_grpo has 48 groups; 64 give each of 64 devices one
    config["und_for_gen"] |= dict(batch_size=64, micro_batches=6, vae_chunk=64, gather_weights=True)
    for section, values in SLICES.get(preset.partition("@")[2], {}).items():
        config[section] |= values
    return config


FULL = ("qwen2_5_vl_3b_sd3_5_medium", "qwen2_5_vl_3b_sd3_5_large")
PRESETS = {"tiny": _tiny, "emoji": _emoji, "mini": _mini} | {
    name: functools.partial(_full, name)
    for base in FULL
    for name in (base, *(f"{base}@{machine}" for machine in SLICES))
    if name not in TOO_LARGE
}


def preset(name: str | None, stages: tuple[str, ...]) -> ml_collections.ConfigDict:
    """The configuration of a preset, running the given stages.

    Raises:
      ValueError: there is no such preset, or it has none of the stages.
    """
    name = name or "tiny"
    if name in TOO_LARGE:
        raise ValueError(
            f"there is no preset {name!r}: the weights alone are more than such a card holds; choose a smaller model "
            "or more cards"
        )
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    config = ml_collections.ConfigDict(PRESETS[name]())
    config.stages = tuple(
        stage for stage in stages if name not in ADAPTERS_ALONE or stage.endswith(("_for_und", "_for_gen"))
    )
    if stages and not config.stages:
        raise ValueError(
            f"the preset {name!r} trains adapters only, in gen_for_und and und_for_gen; its card is too small for "
            f"{stages[0]}"
        )
    return config
