"""A model of random weights in the official folder layout, by transformers and diffusers.

    python -m benchmarks.mini_checkpoint DIR [--size=mini|full]

`mini` has about 75 million parameters, 58 of them the token table: large enough to time on two cores, small enough for
eager PyTorch. `full` has the sizes of Qwen2.5-VL-3B, SD3.5-medium with its auto-encoder, and CLIP-L, in bfloat16: 13
GB on disk. Tensors are made and written one at a time, which takes about 2 GB of memory.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy then knows bfloat16 by name)
import numpy as np

from uae_jax.data.tokenizer import SPECIAL_TOKENS, write_scene_tokenizer
from uae_jax.hf.items import Item, write_items
from uae_jax.models.sd3.config import TransformerConfig
from uae_jax.models.sd3.transformer import position_table

VOCABULARY = 151936
PIECE = 2**22  # numbers of noise at a time
PATCH = 14


@dataclasses.dataclass(frozen=True)
class Size:
    """Widths and depths; the defaults are those of the preset `mini`.

    Attributes:
      vocabulary: entries of the token table; width, layers, heads, key_heads, mlp: of the language model.
      mrope: sections of the rotary frequencies, which add up to half a head.
      vision: width of the image encoder; vision_mlp, vision_layers, vision_heads: its other sizes.
      window: attention window in pixels; full_attention: layers of the image encoder without it.
      projector: inner width; context: width of the decoder's context.
      blocks, block_heads, head_width: of the diffusion transformer; sample: side of its latents; positions: of
        its table; dual: blocks with a second attention.
      channels: of the auto-encoder's levels; norm_groups: of its norms.
      clip, clip_layers, clip_heads, clip_image, clip_features: of the reward's image encoder.
      pooled: widths of the two text encoders, whose depth is always 2: only their vector of the empty prompt is used.
      dtype: of the stored weights.
    """

    vocabulary: int = VOCABULARY
    width: int = 384
    layers: int = 4
    heads: int = 6
    key_heads: int = 2
    mlp: int = 1024
    mrope: tuple[int, int, int] = (8, 12, 12)
    vision: int = 192
    vision_mlp: int = 512
    vision_layers: int = 4
    vision_heads: int = 6
    window: int = 112
    full_attention: tuple[int, ...] = (1, 3)
    projector: int = 1024
    context: int = 512
    blocks: int = 4
    block_heads: int = 6
    head_width: int = 64
    sample: int = 32
    positions: int = 32
    dual: tuple[int, ...] = ()
    channels: tuple[int, ...] = (16, 32, 64, 64)
    norm_groups: int = 8
    clip: int = 192
    clip_layers: int = 4
    clip_heads: int = 6
    clip_image: int = 112
    clip_features: int = 192
    pooled: tuple[int, int] = (64, 96)
    dtype: str = "float32"


SMALL = Size(
    vocabulary=600,
    width=64,
    layers=2,
    heads=4,
    key_heads=2,
    mlp=128,
    mrope=(2, 3, 3),
    vision=32,
    vision_mlp=64,
    vision_heads=2,
    window=56,
    projector=128,
    context=64,
    blocks=3,
    block_heads=4,
    head_width=16,
    sample=8,
    channels=(16, 16, 16, 16),
    clip=32,
    clip_layers=2,
    clip_heads=2,
    clip_image=56,
    clip_features=32,
    pooled=(16, 24),
)
FULL = Size(
    width=2048,
    layers=36,
    heads=16,
    mlp=11008,
    mrope=(16, 24, 24),
    vision=1280,
    vision_mlp=3420,
    vision_layers=32,
    vision_heads=16,
    full_attention=(7, 15, 23, 31),
    projector=8192,
    context=4096,
    blocks=24,
    block_heads=24,
    sample=128,
    positions=384,
    dual=tuple(range(13)),
    channels=(128, 256, 512, 512),
    norm_groups=32,
    clip=1024,
    clip_layers=24,
    clip_heads=16,
    clip_image=224,
    clip_features=768,
    pooled=(768, 1280),
    dtype="bfloat16",
)
SIZES = {"mini": Size(), "small": SMALL, "full": FULL}


def _captioner(size: Size):
    from torch import nn
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {
        name: SPECIAL_TOKENS.index(f"<|{name}|>")
        for name in ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    }
    text = dict(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        intermediate_size=size.mlp,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=list(size.mrope)),
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
    )
    vision = dict(
        depth=size.vision_layers,
        hidden_size=size.vision,
        num_heads=size.vision_heads,
        intermediate_size=size.vision_mlp,
        out_hidden_size=size.width,
        fullatt_block_indexes=list(size.full_attention),
        window_size=size.window,
        patch_size=PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    captioner = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    )
    captioner.projector = nn.Sequential(
        nn.Linear(size.width, size.projector), nn.GELU(), nn.Linear(size.projector, size.context)
    )
    return captioner


def _modules(size: Size) -> dict:
    """Every model by the name of its folder."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

    texts = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=width,
                hidden_act=act,
            )
        )
        for width, act in zip(size.pooled, ("quick_gelu", "gelu"))
    ]
    tower = dict(
        hidden_size=size.clip,
        intermediate_size=4 * size.clip,
        num_attention_heads=size.clip_heads,
        projection_dim=size.clip_features,
    )
    return {
        "llm": _captioner(size),
        "dit": SD3Transformer2DModel(
            sample_size=size.sample,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=size.blocks,
            attention_head_dim=size.head_width,
            num_attention_heads=size.block_heads,
            joint_attention_dim=size.context,
            caption_projection_dim=size.block_heads * size.head_width,
            pooled_projection_dim=sum(size.pooled),
            pos_embed_max_size=size.positions,
            dual_attention_layers=size.dual,
            qk_norm="rms_norm",
        ),
        "SD3/vae": AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=list(size.channels),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            norm_num_groups=size.norm_groups,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "SD3/text_encoder": texts[0],
        "SD3/text_encoder_2": texts[1],
        "clip": CLIPModel(
            CLIPConfig(
                vision_config=dict(
                    tower, num_hidden_layers=size.clip_layers, image_size=size.clip_image, patch_size=PATCH
                ),
                text_config=dict(tower, num_hidden_layers=2),
                projection_dim=size.clip_features,
            )
        ),
    }


def write_checkpoint(folder: pathlib.Path, size: Size = Size(), seed: int = 0) -> None:
    """Writes a model folder of random weights that both sides open; memory holds one tensor at a time.

    Args:
      folder: made if absent.
      size: of all parts.
      seed: of the weights.
    """
    import torch

    with torch.device("meta"):
        modules = _modules(size)
    for name, module in modules.items():
        _save_config(module, folder / name, size.dtype)
        items = [
            Item(
                key,
                tuple(value.shape),
                np.dtype(size.dtype),
                _maker(folder / name, name, key, value.shape, size, seed),
                key,
            )
            for key, value in module.state_dict().items()
            if key != "lm_head.weight"  # tied to the token table
        ]
        stem = "model" if hasattr(module.config, "save_pretrained") else "diffusion_pytorch_model"
        write_items(folder / name, items, stem=stem)
    _write_other_files(folder, size)


def _save_config(module: Any, folder: pathlib.Path, dtype: str | None = None) -> None:
    if hasattr(module, "save_config"):  # of diffusers
        module.save_config(folder)
        return
    if dtype is not None:
        module.config.dtype = dtype
    module.config.save_pretrained(folder)


def _maker(
    folder: pathlib.Path, part: str, key: str, shape: Sequence[int], size: Size, seed: int
) -> Callable[[], np.ndarray]:
    """What makes a tensor: noise about 1 for scales and about 0 for others; no bias or scale stays at 0 or 1."""
    if key == "pos_embed.pos_embed":
        config = TransformerConfig.from_folder(folder)
        # compiled, so that the pieces of the table are never in memory
        return lambda: np.asarray(jax.jit(lambda: position_table(config).astype(size.dtype))())
    inputs = math.prod(shape[1:])
    drawn = inputs**-0.5 / 3**0.5 if part in ("dit", "SD3/vae") and len(shape) > 1 else 0.02  # as the libraries begin
    width = math.hypot(0.02, drawn if len(shape) > 1 else 0.0)
    if part == "llm" and "language_model.layers" in key and len(shape) > 1:
        width *= 6  # or tied embeddings would echo the last token
    mean = 2.66 if key == "logit_scale" else 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
    return lambda: _noise(tuple(shape), mean, width, size.dtype, [seed, zlib.crc32(f"{part}/{key}".encode())])


def _noise(shape: tuple[int, ...], mean: float, width: float, dtype: str, seed: Sequence[int]) -> np.ndarray:
    """Normal noise, made in pieces so that no second copy in float32 is in memory."""
    tensor, rng = np.empty(shape, dtype), np.random.default_rng(seed)
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        piece[...] = mean + width * rng.standard_normal(piece.size, np.float32)
    return tensor


def write_configs(folder: pathlib.Path, size: Size = Size()) -> None:
    """The same folder without a weight: enough to plan and to compile.

    Args:
      folder: made if absent.
      size: of all parts.
    """
    import torch

    with torch.device("meta"):
        modules = _modules(size)
    for name, module in modules.items():
        _save_config(module, folder / name)
    _write_other_files(folder, size)


def _write_other_files(folder: pathlib.Path, size: Size) -> None:
    """Schedule, tokenizer and image processors."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(folder / "SD3" / "scheduler")
    words = "describe this image in detail".split() + [f"word{number}" for number in range(300)]
    write_scene_tokenizer(
        folder / "llm_processor", words, patch_size=PATCH, min_pixels=56 * 56, max_pixels=28 * 28 * 1280
    )
    side = size.clip_image
    (folder / "clip" / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="CLIPImageProcessor",
                do_resize=True,
                do_rescale=True,
                do_normalize=True,
                do_center_crop=True,
                do_convert_rgb=True,
                resample=3,
                rescale_factor=1 / 255,
                size=dict(shortest_edge=side),
                crop_size=dict(height=side, width=side),
                image_mean=[0.48145466, 0.4578275, 0.40821073],
                image_std=[0.26862954, 0.26130258, 0.27577711],
            )
        )
    )


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="mini")
    options = parser.parse_args()
    write_checkpoint(options.folder, SIZES[options.size])


if __name__ == "__main__":
    main()
