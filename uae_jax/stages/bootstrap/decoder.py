"""Phase 4 of the bootstrap: a decoder of captions to images, by the flow matching of `methods.pretrain`."""

import numpy as np

from uae_jax.data.qwen_inputs import Fields
from uae_jax.data.scene_captions import mistaken, mixed_caption
from uae_jax.data.tokenizer import encode_caption
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.scene_stream import World


def stream(
    world: World,
    tokenizer,
    *,
    seed: int,
    batch_size: int,
    side: int,
    length: int,
    pad: int,
    full_fraction: float,
    detail_high: float = 1.0,
    mistakes: float = 0.0,
):
    """Batches of `pixels`, `caption_ids`, `caption_mask` and `sample_id`.

    `full_fraction` of the captions state every fact. The others are short prompts, or state each fact with a
    probability of at most `detail_high`. A fact of a caption is wrong with probability `mistakes`, as in captions from
    the web. The decoder then follows a caption most of the time only, which leaves room for reinforcement learning.
    """

    def example(index: int) -> Fields:
        rng = np.random.default_rng([seed, 13, index])
        scene = world.scene_at("train", index, seed + 3)
        seen = mistaken(scene, rng, mistakes)
        text = (
            scene_stream.full_caption(seen, rng)
            if rng.random() < full_fraction
            else mixed_caption(seen, rng, high=detail_high)
        )
        ids, mask = scene_stream.pad_ids(encode_caption(tokenizer, text), length, pad)
        pixels = scene_stream.pixels_of(world, scene, side)
        return {"pixels": pixels, "caption_ids": ids, "caption_mask": mask, "sample_id": np.int32(index)}

    return scene_stream.stream(example, batch_size)
