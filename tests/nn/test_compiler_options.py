"""Programs of a CPU hold one layer's weights in float32 at a time, and those of float32 are compiled as ever."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from uae_jax.nn.cpu.compiler import compiler_options

LAYERS, WIDTH, TOKENS = 8, 512, 4


def decode(kernels, x):
    """A loop over tokens, each of which goes through all layers."""

    def token(_, x):
        return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    return lax.fori_loop(0, TOKENS, token, x)


def test_stacked_weights_are_not_copied_to_float32():
    kernels = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, WIDTH), jnp.bfloat16)
    program = jax.jit(decode, compiler_options=compiler_options("bfloat16"))
    temporaries = program.lower(kernels, x).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 2 * WIDTH * WIDTH * 4


def test_the_loop_computes_the_same():
    kernels = (jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2, WIDTH)).astype(jnp.bfloat16)
    kept = jax.jit(decode, compiler_options=compiler_options("bfloat16"))(kernels, x)
    assert (kept == jax.jit(decode)(kernels, x)).all()


@pytest.mark.parametrize(
    "dtype, few", [("float32", True), (jnp.float32, True), ("bfloat16", False), (jnp.bfloat16, False)]
)
def test_float32_has_no_options(dtype, few):
    assert (compiler_options(dtype) == {}) == few
