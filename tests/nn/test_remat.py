"""Recomputation policies: the same gradient by every name, and what each keeps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import equations

from uae_jax.nn.attention import Mask, attention
from uae_jax.nn.linear import Dense
from uae_jax.nn.remat import POLICIES, remat


class Layer(nn.Module):
    """Attention and a linear map."""

    @nn.compact
    def __call__(self, x, mask):
        """`[B, T, 8]` to (`[B, T, 8]`, None)."""
        heads = Dense(8, name="heads")(x).reshape(*x.shape[:2], 2, 4)
        mixed = attention(heads, heads, heads, mask).reshape(x.shape)
        return x + nn.gelu(Dense(8, name="output")(mixed)), None


def gradient_of(policy):
    """The gradient of three scanned layers as a function of their parameters."""
    scanned = nn.scan(
        remat(Layer, policy), variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3
    )()
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = scanned.init(jax.random.key(1), x, Mask(causal=True))
    return jax.grad(lambda p: jnp.sum(scanned.apply(p, x, Mask(causal=True))[0] ** 2)), params


@pytest.fixture(scope="module")
def expected():
    gradient, params = gradient_of("none")
    return jax.jit(gradient)(params)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_every_policy_has_the_same_gradient(policy, expected):
    gradient, params = gradient_of(policy)
    for found, leaf in zip(jax.tree.leaves(jax.jit(gradient)(params)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5)


def test_policies_keep_what_their_names_say():
    products = {}
    for policy in POLICIES:
        names = [equation.primitive.name for equation in equations(*gradient_of(policy))]
        products[policy] = names.count("dot_general")
    assert products["none"] == products["all_dots"] < products["dots"] == products["offload"] < products["full"]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="remat is 'some'; use one of none, full, dots, all_dots, offload"):
        remat(Layer, "some")
