"""Makes the built-in tiny model from nothing: auto-encoder, encoders, captioner, decoder.

    python -m uae_jax.main --config=configs/bootstrap.py --workdir=runs/bootstrap

The result is `runs/bootstrap/model`, in the official folder layout. The same workdir continues; another configuration
of a phase that has begun needs a new one. It starts as the paper's model does: a captioner that
is right but says little, and a decoder that draws what a caption says. The preset `emoji` makes a model of 64-pixel
scenes of emoji (docs/emoji.md):

    python -m uae_jax.fetch_emoji --folder=data/emoji
    python -m uae_jax.main --config=configs/bootstrap.py:emoji --workdir=runs/emoji_bootstrap

A part alone, beside those of another model (`start`, `builtin` for the built-in one), here the scorer of captions that
a control reward needs and that is no part of the method:

    python -m uae_jax.main --config=configs/bootstrap.py --workdir=runs/scorer --config.start=builtin \
        --config.phases="('caption_scorer',)"
"""

import ml_collections


def _optimizer(learning_rate: float, warmup_steps: int = 50) -> dict:
    """What differs from the defaults of `training.optimizer.OptimizerConfig`."""
    return dict(learning_rate=learning_rate, schedule="cosine", warmup_steps=warmup_steps, b2=0.98, final_fraction=0.02)


def _tiny() -> dict:
    return dict(
        data=dict(source="scenes", folder=""),
        preset="bootstrap",
        seed=0,
        stages=("bootstrap",),
        side=32,
        caption_tokens=32,
        save_every=200,
        log_every=10,
        start="",
        phases=("vae", "clip", "dinov2", "captioner", "decoder"),
        vae=dict(
            steps=1500,
            batch_size=24,
            optimizer=_optimizer(2e-3),
            model=dict(
                block_out_channels=(8, 16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                latent_channels=16,
                sample_size=32,
            ),
        ),
        clip=dict(
            steps=1800,
            batch_size=48,
            optimizer=_optimizer(1e-3),
            vision=dict(
                hidden_size=96,
                intermediate_size=288,
                num_hidden_layers=3,
                num_attention_heads=3,
                image_size=32,
                patch_size=8,
                projection_dim=64,
            ),
            text=dict(
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                projection_dim=64,
            ),
        ),
        dinov2=dict(
            steps=1500,
            batch_size=64,
            optimizer=_optimizer(1e-3),
            model=dict(
                hidden_size=96, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=3, image_size=32, patch_size=8
            ),
        ),
        captioner=dict(
            steps=1500,
            batch_size=40,
            optimizer=_optimizer(1.5e-3, 100),
            text_weight=0.5,
            # detail of the captions it learns to write: most facts left out, now and then nearly all of them said
            detail_low=0.1,
            detail_high=0.9,
            max_prompt=40,
            text=dict(width=128, layers=4, heads=4, key_heads=2, mlp_width=384, mrope_section=(4, 6, 6)),
            vision=dict(
                depth=4,
                width=96,
                heads=3,
                mlp_width=256,
                out_width=128,
                patch_size=4,
                window_size=16,
                full_attention_blocks=(1, 3),
            ),
        ),
        decoder=dict(
            steps=3800,
            batch_size=64,
            optimizer=_optimizer(1e-3, 200),
            projector_width=256,
            ema_decay=0.998,
            time_shift=4.0,
            condition_dropout=0.1,
            full_fraction=0.6,
            detail_high=1.0,
            caption_tokens=28,
            model=dict(
                sample_size=8,
                patch_size=2,
                num_layers=6,
                attention_head_dim=32,
                num_attention_heads=4,
                joint_attention_dim=128,
                pooled_projection_dim=32,
                pos_embed_max_size=8,
                dual_attention_layers=(),
                qk_norm="rms_norm",
            ),
        ),
        # the end of the decoder's phase: captions in which each fact is wrong with this probability (docs/recipes.md);
        # 0 steps for none
        mistakes=dict(
            steps=200,
            batch_size=64,
            probability=0.25,
            optimizer=dict(learning_rate=5e-4, warmup_steps=10),
        ),
        caption_scorer=dict(
            steps=1200,
            batch_size=48,
            optimizer=_optimizer(1e-3),
            full_fraction=0.3,
            text=dict(
                hidden_size=96,
                intermediate_size=288,
                num_hidden_layers=2,
                num_attention_heads=3,
                max_position_embeddings=40,
            ),
        ),
    )


def _emoji() -> dict:
    """The same parts for twice the side and five times the words: a wider transformer, other phases."""
    config = _tiny()
    config |= dict(preset="bootstrap_emoji", data=dict(source="emoji", folder="data/emoji"), side=64)
    config["vae"]["model"] |= dict(sample_size=64)
    config["vae"] |= dict(steps=2000, batch_size=16)
    config["clip"]["vision"] |= dict(image_size=64)
    config["clip"] |= dict(steps=2000, batch_size=32)
    config["dinov2"]["model"] |= dict(image_size=64)
    config["dinov2"] |= dict(steps=2000, batch_size=32)
    config["captioner"]["vision"] |= dict(patch_size=8, window_size=32)
    config["captioner"] |= dict(steps=3000)
    config["decoder"]["model"] |= dict(sample_size=16, num_attention_heads=5)
    config["decoder"] |= dict(steps=4000, batch_size=48)
    config["mistakes"] |= dict(batch_size=48)
    return config


PRESETS = {"tiny": _tiny, "emoji": _emoji}


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named).

    Raises:
      ValueError: there is no such preset.
    """
    if (preset or "tiny") not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; bootstrap makes the models {', '.join(PRESETS)}")
    return ml_collections.ConfigDict(PRESETS[preset or "tiny"]())
