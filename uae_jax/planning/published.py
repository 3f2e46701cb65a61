"""Sizes of the published models, so that a full-size run can be planned before any download of weights.

The values are from the `config.json` of the named repositories; the defaults of our config classes are published values
too. Token counts are for Qwen2.5-VL-3B-Instruct's tokenizer and chat template.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from uae_jax.data.qwen_inputs import ImageProcessor
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Decoder, Published
from uae_jax.models.decoders import PUBLISHED
from uae_jax.models.encoders.config import CLIPTextConfig, CLIPVisionConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from uae_jax.models.qwen2_5_vl.config import PUBLISHED as CAPTIONERS
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.decoder import SD3Decoder
from uae_jax.rewards.similarity import Encoder

# the projector's inner width over the captioner's width: PKU-YuanGroup/UAE, llm/config.json, has Linear 2048 to 8192
PROJECTOR_RATIO = 4
# decoders: stabilityai/stable-diffusion-3.5-medium and -large, transformer/config.json
TRANSFORMERS = {
    "sd3_5_medium": TransformerConfig(),
    "sd3_5_large": TransformerConfig(
        num_layers=38, num_attention_heads=38, pos_embed_max_size=192, dual_attention_layers=()
    ),
}
# stabilityai/stable-diffusion-3.5-large, vae/config.json: the defaults of VAEConfig
VAE = VAEConfig()
# openai/clip-vit-large-patch14 (the reward) and facebook/dinov2-large (the held-out score)
ENCODERS = {
    "clip": Encoder(
        "clip",
        "clip",
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            projection_dim=768,
            num_hidden_layers=24,
            num_attention_heads=16,
            patch_size=14,
        ),
        Preprocess(),
    ),
    "dinov2": Encoder(
        "dinov2",
        "dinov2",
        Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518),
        Preprocess(size=(256,), mean=IMAGENET_MEAN, std=IMAGENET_STD),
    ),
}
# stabilityai/stable-diffusion-3.5-large, text_encoder/config.json (OpenAI's CLIP-L) and text_encoder_2 (OpenCLIP bigG)
TEXT_ENCODERS = (
    CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    ),
    CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    ),
)
# the release's demo.py lowers the image processor's max_pixels to 65536
PROCESSOR = ImageProcessor(max_pixels=65536)
# the chat template around a turn of role `generate`: system turn and header before, answer header after
TEMPLATE_PREFIX = (151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 19366, 198)
TEMPLATE_SUFFIX = (151645, 198, 151644, 77091, 198)
# "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
NEGATIVE_PROMPT = (31115, 264, 4194, 11, 3347, 4271, 11, 27261, 11, 28513, 11, 3873, 323, 22809, 11, 30349, 2168, 13)
# tokens of the caption prompt in its chat template without image tokens; a 512-pixel image adds 81
CAPTION_PROMPT_TOKENS = 80


def sd3(name: str) -> Callable[..., SD3Decoder]:
    """SD3 of `TRANSFORMERS` as UAE uses it, for a captioner."""

    def made(captioner: Qwen2_5VLConfig, **settings: Any) -> SD3Decoder:
        return SD3Decoder(dataclasses.replace(TRANSFORMERS[name], **settings), VAE, template(), captioner)

    return made


def own(sizes: Published) -> Callable[..., Decoder]:
    """A decoder with a text encoder of its own, for any captioner."""
    return lambda captioner, **settings: sizes.make(**settings)


# by the second half of `config.model.sizes`
DECODERS: Mapping[str, Callable[..., Decoder]] = {
    **{name: sd3(name) for name in TRANSFORMERS},
    **{name: own(sizes) for name, sizes in PUBLISHED.items()},
}
# Janus's caption prompt without image tokens, an estimate: the official system text, its turns and UAE's prompt. A run
# counts its own; the presets leave room
JANUS_PROMPT_TOKENS = 104
# ids around a caption in the prompt of its drawing: begin of sentence, "<|User|>:", and "\n\n<|Assistant|>:", begin of
# image; only their number counts
JANUS_PREFIX = (100000, 100601, 25)
JANUS_SUFFIX = (185, 185, 100602, 25, 100003)


def template() -> ConditionTemplate:
    """The ids around a caption in the decoder's condition."""
    pad = CAPTIONERS["qwen2_5_vl_3b"].pad_token_id
    return ConditionTemplate(TEMPLATE_PREFIX, TEMPLATE_SUFFIX, NEGATIVE_PROMPT, pad)


def using(sizes: str, *, dtype: str, remat: str, lora_alpha: float) -> tuple[Qwen2_5VLConfig, Decoder]:
    """Captioner and decoder of `config.model.sizes` with a run's precision, recomputation and adapter scale."""
    first, second = next(
        (captioner, decoder) for captioner in CAPTIONERS for decoder in DECODERS if f"{captioner}_{decoder}" == sizes
    )
    captioner = CAPTIONERS[first].using(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    return captioner, DECODERS[second](captioner, dtype=dtype, remat=remat, lora_alpha=lora_alpha)
