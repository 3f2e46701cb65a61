"""Batches of images `[B, H, W, C]` in the layout that the devices convolve fastest.

A model is written for `[B, H, W, C]`. `over_images` may run it on another layout (`nn.cpu.images`). The modules of `nn`
and the functions here follow that layout.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax.nn.cpu import images as cpu
from uae_jax.nn.device import on_one_cpu


def signed(pixels: Array) -> Array:
    """uint8 0..255 as float32 in [-1, 1], the VAE's input; floats, which are in that range already, as they are."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


def over_images(
    model: Callable[[Array], Array], x: Float[Array, "b height width c"]
) -> Float[Array, "b rows columns features"]:
    """`model(x)` of images; on a single CPU the model sees them interleaved."""
    if not on_one_cpu():
        return model(x)
    with cpu.interleaving(len(x)):
        return cpu.separate(model(cpu.interleave(x)))


def image_channels(x: Float[Array, "_ height width _"]) -> int:
    """C of one image."""
    return x.shape[-1] // cpu.interleaved()


def for_every_image(vector: Float[Array, " c"]) -> Float[Array, " _"]:
    """One number a channel, for the last axis of an array of images."""
    return jnp.tile(vector, cpu.interleaved())


def to_tokens(x: Float[Array, "_ height width _"]) -> Float[Array, "b height*width c"]:
    """The pixels of images `[B, H, W, C]` as tokens."""
    x = cpu.separate(x)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def to_images(tokens: Float[Array, "b t c"], height: int, width: int) -> Float[Array, "_ {height} {width} _"]:
    """The inverse of `to_tokens`."""
    return cpu.interleave(tokens.reshape(tokens.shape[0], height, width, -1))
