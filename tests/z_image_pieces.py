"""A tiny Z-Image with random weights, written by diffusers and transformers."""

import pathlib

import torch
from decoder_pieces import TEXT_WIDTH, randomise, text_encoder
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import PreTrainedTokenizerBase


def write_pipeline(
    folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, *, shift: float = 6.0, seed: int = 0
) -> ZImagePipeline:
    """Saves the pipeline as diffusers does, and returns it."""
    torch.manual_seed(seed)
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=shift),
        randomise(
            AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
                          layers_per_block=1, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                          use_post_quant_conv=False),
            seed,
        ),
        text_encoder(len(tokenizer), 3, seed + 1),
        tokenizer,
        randomise(
            ZImageTransformer2DModel(in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3,
                                     cap_feat_dim=TEXT_WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
            seed + 2,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline
