"""Batches of images `[B, H, W, C]` in the layout that the devices convolve fastest.

A model is written for `[B, H, W, C]`. `over_images` may run it on another layout (`nn.cpu.images`). The modules of `nn`
and the functions here follow that layout.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from uae_jax.nn.cpu import images as cpu
from uae_jax.nn.device import on_one_cpu


def over_images(model: Callable[[Array], Array], x: Array) -> Array:
    """`model(x)` of images `[B, H, W, C]`; on a single CPU the model sees them interleaved."""
    if not on_one_cpu():
        return model(x)
    with cpu.interleaving(len(x)):
        return cpu.separate(model(cpu.interleave(x)))


def image_channels(x: Array) -> int:
    """C of one image."""
    return x.shape[-1] // cpu.interleaved()


def for_every_image(vector: Array) -> Array:
    """One number a channel, `[C]`, for the last axis of an array of images."""
    return jnp.tile(vector, cpu.interleaved())


def to_tokens(x: Array) -> Array:
    """The pixels of images as tokens: `[B, H, W, C]` to `[B, H W, C]`."""
    x = cpu.separate(x)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def to_images(tokens: Array, height: int, width: int) -> Array:
    """The inverse of `to_tokens`: `[B, H W, C]` to `[B, H, W, C]`."""
    return cpu.interleave(tokens.reshape(tokens.shape[0], height, width, -1))
