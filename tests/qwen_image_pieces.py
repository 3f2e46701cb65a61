"""A tiny Qwen-Image with random weights, written by diffusers and transformers."""

import pathlib

import torch
from decoder_pieces import TEXT_WIDTH, randomise
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SCHEDULER = dict(
    use_dynamic_shifting=True,
    time_shift_type="exponential",
    base_image_seq_len=256,
    max_image_seq_len=8192,
    base_shift=0.5,
    max_shift=0.9,
    shift_terminal=0.02,
)


def captioner(vocabulary: int) -> torch.nn.Module:
    """A tiny Qwen2.5-VL, of which the language model is read."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]},
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=8,
            intermediate_size=8,
            num_heads=1,
            out_hidden_size=TEXT_WIDTH,
            fullatt_block_indexes=[0],
        ),
        tie_word_embeddings=False,
        image_token_id=5,
        video_token_id=6,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def write_pipeline(folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> QwenImagePipeline:
    """Saves the pipeline as diffusers does, and returns it."""
    torch.manual_seed(seed)
    pipeline = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        randomise(
            AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, -0.4],
                                   latents_std=[1.1, 0.9, 1.3, 0.7]),
            seed,
        ),
        randomise(captioner(len(tokenizer)), seed + 1),
        tokenizer,
        randomise(
            QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                        num_attention_heads=3, joint_attention_dim=TEXT_WIDTH,
                                        axes_dims_rope=(8, 4, 4)),
            seed + 2,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline
