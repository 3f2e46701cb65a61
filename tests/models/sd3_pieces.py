"""A small transformer with random weights in PyTorch, and its velocity there and here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from uae_jax.models.sd3 import transformer as sd3

SMALL = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
)


def torch_transformer(**sizes) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SMALL, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs() -> tuple:
    rng = np.random.default_rng(0)
    shapes = (2, 4, 6, 4), (2, 5, 12), (2, 10)
    latents, context, pooled = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return latents, np.array([900.0, 20.0], np.float32), context, pooled


def torch_velocity(model) -> np.ndarray:
    latents, timestep, context, pooled = (torch.tensor(array) for array in inputs())
    with torch.no_grad():
        out = model(
            hidden_states=latents.permute(0, 3, 1, 2),
            timestep=timestep,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 1).numpy()


@functools.partial(jax.jit, static_argnums=0)
def velocity(config, params, adapter=None):
    variables = {"params": params} if adapter is None else {"params": params, "lora": adapter}
    return sd3.Transformer(config).apply(variables, *map(jnp.asarray, inputs()))
