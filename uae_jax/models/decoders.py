"""The decoders that bring their own text encoder, by the class of their pipeline in diffusers."""

from uae_jax.models.decoder import Family
from uae_jax.models.flux2 import decoder as flux2
from uae_jax.models.qwen_image import decoder as qwen_image
from uae_jax.models.z_image import decoder as z_image

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (flux2.FAMILY, z_image.FAMILY, qwen_image.FAMILY)}
