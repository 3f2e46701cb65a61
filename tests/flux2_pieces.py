"""A tiny FLUX.2-klein with random weights, written by diffusers and transformers."""

import json
import pathlib

import torch
from decoder_pieces import TEXT_WIDTH, randomise, text_encoder
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import PreTrainedTokenizerBase

LAYERS = 29


def make_pipeline(
    tokenizer: PreTrainedTokenizerBase, *, distilled: bool = False, seed: int = 0, vocabulary: int | None = None
) -> Flux2KleinPipeline:
    """The pipeline; its text encoder knows the tokenizer's ids."""
    torch.manual_seed(seed)
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        randomise(
            AutoencoderKLFlux2(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                               up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
                               layers_per_block=1),
            seed,
        ),
        text_encoder(vocabulary or len(tokenizer), LAYERS, seed + 1),
        tokenizer,
        randomise(
            Flux2Transformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                                    num_attention_heads=3, joint_attention_dim=3 * TEXT_WIDTH,
                                    axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False),
            seed + 2,
        ),
        is_distilled=distilled,
    )  # fmt: skip


def write_pipeline(folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, **options) -> Flux2KleinPipeline:
    """Saves the pipeline as diffusers does, and returns it."""
    pipeline = make_pipeline(tokenizer, **options)
    pipeline.save_pretrained(folder)
    # the tests' own tokenizers are of a class that diffusers' index names otherwise
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "Flux2KleinPipeline" and index["is_distilled"] is options.get("distilled", False)
    return pipeline
