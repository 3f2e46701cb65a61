"""What one decoding loop keeps: one copy of each prompt, and a cache that grows with the length of the completions
alone.
"""

import jax
import jax.numpy as jnp

from uae_jax.models.language.generate import generate
from uae_jax.models.qwen2_5_vl import model
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig

TEXT = TextConfig(vocab_size=64, width=64, layers=2, heads=4, key_heads=2, mlp_width=64, mrope_section=(4, 2, 2))
CONFIG = Qwen2_5VLConfig(
    text=TEXT, vision=VisionConfig(out_width=64), image_token_id=60, pad_token_id=0, stop_token_ids=(1,)
)
CACHE_BYTES = 2 * TEXT.layers * TEXT.key_heads * TEXT.head_width * 4  # of one token: key and value of all layers


def temporaries(rows: int, prompt: int, new: int) -> int:
    """Bytes that sampling `rows` completions of one prompt needs besides parameters and results."""

    def run(params, batch):
        prefix = model.prompt_prefix(CONFIG, params, None, batch)
        keys = jax.random.split(jax.random.key(0), rows)
        return generate(CONFIG, params, None, prefix, keys, max_new_tokens=new, stop_ids=(1,), group=rows)

    batch = {
        "prompt_ids": jnp.zeros((1, prompt), jnp.int32),
        "prompt_mask": jnp.ones((1, prompt), bool),
        "prompt_positions": jnp.zeros((1, prompt, 3), jnp.int32),
        "prompt_next": jnp.zeros(1, jnp.int32),
    }
    params = {"language": model.abstract_params(CONFIG)["language"]}
    return jax.jit(run).lower(params, batch).compile().memory_analysis().temp_size_in_bytes


def test_decoding_memory_is_linear_in_the_completion_and_keeps_the_prompt_once():
    base, longer, longest = (temporaries(8, 32, new) for new in (512, 1024, 2048))
    token = 8 * CACHE_BYTES
    assert abs((longest - longer) - 2 * (longer - base)) < 0.1 * (longest - longer)
    assert (longer - base) < 2 * 512 * token
    wider = temporaries(16, 512, 64) - temporaries(8, 512, 64)
    assert wider < 8 * 512 * CACHE_BYTES / 4  # a copy of the prompt for each new row would be four times as much
