"""The image tower of SigLIP (arXiv 2303.15343) without its pooling: every patch becomes an embedding."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax.models.encoders.blocks import TransformerBlock, image_patches
from uae_jax.models.janus.config import VisionConfig
from uae_jax.nn.attention import Mask
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.norms import LayerNorm


class VisionTower(nn.Module):
    """Patches with learned positions through pre-norm blocks."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "b height width c"]) -> Float[Array, "b p d"]:
        """Features of the patches in reading order, in the precision of the pixels.

        Raises:
          ValueError: images of another shape than the config's.
        """
        config, width = self.config, self.config.hidden_size
        wanted = (config.image_size, config.image_size, config.num_channels)
        if pixels.shape[1:] != wanted:
            raise ValueError(f"Janus reads images of shape {wanted}, not {pixels.shape[1:]}; preprocess them first")
        x = Dense(width, name="patch_embedding")(image_patches(pixels, config.patch_size))
        table = self.param("position_embedding", nn.initializers.normal(0.02), (config.tokens, width), jnp.float32)
        x = constrain(x + table.astype(x.dtype), "batch")
        x, _ = scan_layers(TransformerBlock, config.num_hidden_layers)(config, name="layers")(x, Mask())
        return LayerNorm(config.layer_norm_eps, name="post_norm")(x)
