"""Features of images by any of the image encoders."""

from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config

AnyConfig = CLIPConfig | CLIPVisionConfig | Dinov2Config | Dinov3Config


def image_features(
    config: AnyConfig, params: trees.Tree, pixels: Float[Array, "b H W 3"], *, remat: bool = False
) -> Float[Array, "b d"]:
    """CLIP's projection of the class token, or DINO's class token after the last norm, of any length.

    Args:
      config, params: of the encoder.
      pixels: as the encoder's preprocessing makes them.
      remat: recompute layers in the backward pass.
    """
    if isinstance(config, Dinov2Config | Dinov3Config):
        return dino.cls_features(config, params, pixels, remat=remat)
    return clip.image_features(config, params, pixels, remat=remat)
