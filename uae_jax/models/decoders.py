"""The decoders that bring their own text encoder: one line each, and all else is in the folder of a kind."""

from uae_jax.models.decoder import Family, Published
from uae_jax.models.flux2 import decoder as flux2
from uae_jax.models.qwen_image import decoder as qwen_image
from uae_jax.models.z_image import decoder as z_image

KNOWN = (
    flux2.FAMILY,
    z_image.FAMILY,
    qwen_image.FAMILY,
)
# by the class of their pipeline in diffusers
FAMILIES: dict[str, Family] = {family.pipeline: family for family in KNOWN}
PUBLISHED: dict[str, Published] = {name: sizes for family in KNOWN for name, sizes in family.published.items()}
