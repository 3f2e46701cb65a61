"""All stages in order: pretrain, cold_start, gen_for_und, und_for_gen.

    python -m uae_jax.main --config=configs/unified_grpo.py --workdir=runs/tiny
    python -m uae_jax.main --config=configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium --workdir=/mnt/bucket/run \
        --config.model.folder=/weights/UAE --config.data.folder=/data/longcap

A workdir is a folder of the file system; a bucket is mounted first, as `launch/tpu_vm.sh` does.
`--config.rounds=2` runs gen_for_und and und_for_gen twice in turn.
"""

from configs import presets


def get_config(preset: str | None = None):
    """The configuration of a preset (`tiny` when none is named)."""
    return presets.preset(preset, ("pretrain", "cold_start", "gen_for_und", "und_for_gen"))
