"""Sums over denoising steps whose gradient is taken one step at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from uae_jax.trees import Tree

Steps = PyTree[Shaped[Array, "w ..."]]


def sum_over_steps(
    loss: Callable[[Tree, Tree], tuple[Float[Array, ""], Tree]], params: Tree, steps: Steps
) -> tuple[Float[Array, ""], Steps]:
    """The sum of a loss over steps, with the memory of one step and without computing any step twice.

    Under differentiation, the gradient of each step is taken right after its loss and added up. The backward pass only
    scales this total, which is exact because the result is linear in it. What `loss` closes over gets no gradient.

    Args:
      loss: `(params, step) -> (sum, more)`; nothing differentiates `more`.
      params: what is differentiated.
      steps: the leaves of all w steps; `loss` gets them one step at a time.

    Returns:
      The sum, and `more` of all steps.
    """

    def values(params: Tree) -> tuple[Array, Tree]:
        _, (totals, more) = jax.lax.scan(lambda _, step: (None, loss(params, step)), None, steps)
        return totals.sum(), more

    def forward(params: Tree) -> tuple[tuple[Array, Tree], Tree]:
        def step_gradient(gradients: Tree, step: Tree) -> tuple[Tree, tuple[Array, Tree]]:
            found, new = jax.value_and_grad(loss, has_aux=True)(params, step)
            return jax.tree.map(lambda old, extra: old + extra.astype(jnp.float32), gradients, new), found

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        gradients, (totals, more) = jax.lax.scan(step_gradient, zeros, steps)
        return (totals.sum(), more), jax.tree.map(lambda new, leaf: new.astype(leaf.dtype), gradients, params)

    def backward(gradients: Tree, cotangents: tuple[Array, Tree]) -> tuple[Tree]:
        return (jax.tree.map(lambda leaf: (leaf * cotangents[0]).astype(leaf.dtype), gradients),)

    summed = jax.custom_vjp(values)
    summed.defvjp(forward, backward)
    return summed(params)
