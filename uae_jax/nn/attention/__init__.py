"""Attention: one entry point, one description of masks, one implementation for each kind of device."""

from uae_jax.nn.attention.entry import IMPLEMENTATIONS as IMPLEMENTATIONS
from uae_jax.nn.attention.entry import attention as attention
from uae_jax.nn.attention.entry import preferred_length as preferred_length
from uae_jax.nn.attention.entry import use_attention as use_attention
from uae_jax.nn.attention.mask import Mask as Mask
from uae_jax.nn.attention.mask import SharedKeys as SharedKeys
from uae_jax.nn.attention.streams import Stream as Stream
from uae_jax.nn.attention.streams import joint_attention as joint_attention
