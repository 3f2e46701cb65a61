"""The decoders that bring their own text encoder, by the class of their pipeline in diffusers."""

from uae_jax.models.decoder import Family
from uae_jax.models.flux2 import decoder as flux2

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (flux2.FAMILY,)}
