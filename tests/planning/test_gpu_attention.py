"""Attention on NVIDIA GPUs as far as a host without one can tell: which form a card gets, and odd lengths with their
gradients.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from gpu_programs import cards

from uae_jax import sharding
from uae_jax.nn.attention import Mask, attention, preferred_length, use_attention
from uae_jax.nn.attention.entry import choose
from uae_jax.nn.device import compute_capability


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("Tesla T4", (7, 5)),
        ("Quadro RTX 6000", (7, 5)),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("Tesla P4", (6, 0)),
        ("NVIDIA A100-SXM4-40GB", (8, 0)),
        ("NVIDIA L4", (8, 0)),
        ("NVIDIA L40S", (8, 0)),
        ("NVIDIA GeForce RTX 4090", (8, 0)),
        ("NVIDIA RTX 6000 Ada Generation", (8, 0)),
        ("NVIDIA RTX 2000 Ada Generation", (8, 0)),
        ("NVIDIA B200", (8, 0)),
        ("NVIDIA T400", (7, 5)),
        ("Tesla M60", (6, 0)),
        ("AMD Instinct MI300X", (0, 0)),
    ],
)
def test_the_name_of_a_card_that_is_not_there_tells_whether_it_is_too_old(kind, expected):
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with cards(kind), sharding.in_use(mesh):
        assert compute_capability() == expected


# lengths of queries and keys, and the mask; one row of keys is shorter than the others
CASES = {
    "even": (256, 256, False, False),
    "odd": (255, 255, False, False),
    "odd queries": (255, 256, False, True),
    "odd keys": (256, 255, False, True),
    "odd with lengths": (255, 255, False, True),
    "odd causal": (255, 255, True, False),
    "odd causal with lengths": (255, 255, True, True),
    "last queries": (131, 255, True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_odd_lengths_are_differentiated_as_by_the_formula(case, monkeypatch):
    """With JAX's own form in the place of cuDNN's kernels, which are given the same arguments."""
    length, size, causal, padded = CASES[case]
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (
        jax.random.normal(k, (2, side, heads, 16))
        for k, side, heads in zip(keys, (length, size, size, length), (4, 2, 2, 4))
    )
    valid = jnp.arange(size) < jnp.array([size, size - 70])[:, None] if padded else None
    mask = Mask(valid=valid, causal=causal, right_padded=True)
    whole = jax.nn.dot_product_attention
    seen = []

    def instead(*arrays, implementation, **given):
        seen.append([array.shape[1] for array in arrays])
        return whole(*arrays, implementation="xla", **given)

    def outcome(form):
        with use_attention(form):
            return jax.value_and_grad(lambda *x: (attention(*x, mask) * weight).sum(), argnums=(0, 1, 2))(
                query, key, value
            )

    expected = outcome("plain")
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    found = outcome("cudnn")
    assert all(side % 2 == 0 for sides in seen for side in sides)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert abs(ours - theirs).max() <= 2e-5 * abs(theirs).max() and ours.shape == theirs.shape


@pytest.mark.parametrize("case", CASES)
def test_odd_lengths_are_lowered_for_cards_with_their_gradient(case):
    length, size, causal, padded = CASES[case]
    valid = jnp.arange(size) < jnp.array([size, size - 70])[:, None] if padded else None
    mask = Mask(valid=valid, causal=causal, right_padded=True)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    place = jax.NamedSharding(mesh, jax.P())
    shapes = [
        jax.ShapeDtypeStruct((2, side, heads, 64), "bfloat16", sharding=place)
        for side, heads in ((length, 4), (size, 2), (size, 2))
    ]
    with cards(), sharding.in_use(mesh):
        step = jax.jit(jax.grad(lambda *x: attention(*x, mask).astype("float32").sum(), argnums=(0, 1, 2)))
        text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"@__cudnn\$fmha\w*Backward", text)) == 1


def test_a_card_gets_the_form_that_its_generation_and_the_operands_allow():
    def chosen(kind, dtype="bfloat16", width=64):
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        with cards(kind), sharding.in_use(mesh):
            return choose("gpu", jax.ShapeDtypeStruct((1, 1024, 2, width), dtype), 1024)

    assert (
        chosen("NVIDIA A100-SXM4-80GB")
        == chosen("NVIDIA L4", "float16")
        == chosen("NVIDIA GeForce RTX 5090", width=128)
        == "cudnn"
    )
    assert {
        chosen("Tesla T4"),
        chosen("Tesla V100"),
        chosen("NVIDIA L4", "float32"),
        chosen("NVIDIA H200", width=512),
    } == {"by_query_blocks"}


def test_accelerators_prefer_lengths_of_whole_tiles_and_cpus_take_any():
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with cards(), sharding.in_use(mesh):
        assert (preferred_length(1555), preferred_length(1568)) == (1568, 1568)
    assert preferred_length(1555) == 1555
