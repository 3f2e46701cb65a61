"""Counting the work of a traced step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from uae_jax.nn.int8 import quantised_kernel
from uae_jax.planning.flops import count_work
from uae_jax.planning.plan import step_work
from uae_jax.planning.system import abstract_system
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig

pytestmark = pytest.mark.filterwarnings("ignore")
STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


def xla_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def shapes(*sizes):
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


def mlp(x, weights):
    return jnp.tanh(x @ weights) @ weights.T


def scanned(x, stack):
    return jax.lax.scan(lambda x, weights: (jax.checkpoint(mlp)(x, weights), None), x, stack)[0]


def unrolled(x, stack):
    for weights in stack:
        x = jax.checkpoint(mlp)(x, weights)
    return x


def test_kernels_rounded_to_8_bits_are_read_as_such_by_every_token():
    def rollout(weights, x):
        kernel, scale = quantised_kernel(weights)
        ended = jax.lax.while_loop(
            lambda s: s[0] < 5, lambda s: (s[0] + 1, (s[1] @ kernel.astype(x.dtype)) * scale), (0, x)
        )
        return ended[1]

    weights, x = shapes((64, 64), (8, 64))
    found = count_work(rollout, (weights, x), (0,), trips=5)
    assert found.decoding.weight_bytes == 5 * 64 * 64  # a byte each
    assert found.decoding.other_bytes == 5 * 4 * 8 * 64
    assert found.rest.gathered_bytes == 64 * 64


def test_what_is_gathered_at_the_beginning_is_gathered_once():
    """Of a stack that three steps read, and a matrix that is cut."""

    def steps(stack, matrix, x):
        return jax.lax.scan(lambda x, _: (scanned(x, stack) @ matrix, None), x, length=3)[0]

    arguments = shapes((5, 64, 96), (64, 64), (8, 64))
    stack, matrix = 4 * 5 * 64 * 96, 4 * 64 * 64
    often = count_work(steps, arguments, (0, 1))
    once = count_work(steps, arguments, (0, 1), once=(True, False, False))
    assert often.rest.gathered_bytes == 3 * stack + matrix and once.rest.gathered_bytes == stack + matrix
    assert often.flops == once.flops and often.rest.weight_bytes == once.rest.weight_bytes


def test_scanned_layers_count_as_xla_counts_them_unrolled():
    arguments = shapes((64, 96), (5, 96, 160))
    gradients = [jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), argnums=(0, 1)) for f in (scanned, unrolled)]
    counted = count_work(gradients[0], arguments, (1,)).flops
    assert counted == pytest.approx(xla_flops(gradients[1], *arguments), rel=0.05)
    assert xla_flops(gradients[0], *arguments) < 0.5 * counted  # what XLA says of the loop, and why this module exists


@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 0, 1, 1), (1, 2, 2, 1), (1, 1, 1, 4)])
def test_convolutions_and_their_gradients_count_as_xla_counts_them(stride, padding, dilation, groups):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(padding, padding)] * 2,
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    arguments = shapes((2, 12, 12, 8), (3, 3, 8 // groups, 16))
    assert count_work(convolve, arguments, (1,)).flops == pytest.approx(xla_flops(convolve, *arguments), rel=0.02)
    if groups == 1:
        gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k)), argnums=(0, 1))
        assert count_work(gradient, arguments, (1,)).flops == pytest.approx(xla_flops(gradient, *arguments), rel=0.02)


def test_a_sampling_loop_counts_every_token_and_reads_the_weights_for_each():
    def sample(weights, x):
        return jax.lax.while_loop(
            lambda s: s[0] < 7, lambda s: (s[0] + 1, jnp.tanh(s[1] @ weights.astype(jnp.bfloat16))), (0, x)
        )[1]

    count = count_work(sample, [*shapes((32, 32)), jax.ShapeDtypeStruct((4, 32), jnp.bfloat16)], (0,), trips=7)
    assert count.decoding.flops == 7 * 2 * 4 * 32 * 32 and count.rest.flops == 0
    assert count.decoding.weight_bytes == 7 * 32 * 32 * 2  # in the precision of the product
    assert count.decoding.other_bytes == 7 * 4 * 32 * 2


def test_a_layer_is_gathered_once_for_all_reads_of_one_pass():
    """The backward pass reads a layer again, for what it recomputes and for the gradient, and gathers it once."""
    stack = 5 * 96 * 160 * 4
    forward = count_work(scanned, shapes((64, 96), (5, 96, 160)), (1,)).rest
    assert (forward.weight_bytes, forward.gathered_bytes) == (2 * stack, stack)
    gradient = jax.grad(lambda x, weights: jnp.sum(scanned(x, weights) ** 2))
    both = count_work(gradient, shapes((64, 96), (5, 96, 160)), (1,)).rest
    assert both.gathered_bytes == 2 * stack and both.weight_bytes > 4 * stack


def test_what_a_loop_only_passes_on_is_gathered_once_before_it():
    def steps(weights, stack, x):
        return jax.lax.scan(lambda x, _: (scanned(x @ weights, stack), None), x, length=7)[0]

    count = count_work(steps, shapes((96, 96), (5, 96, 160), (64, 96)), (0, 1))
    assert count.rest.gathered_bytes == 96 * 96 * 4 + 7 * 5 * 96 * 160 * 4

    def sample(weights, stack, x):
        return jax.lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + 1, scanned(s[1] @ weights, stack)), (0, x))[1]

    count = count_work(sample, shapes((96, 96), (5, 96, 160), (64, 96)), (0, 1), trips=9)
    assert count.rest.gathered_bytes == 96 * 96 * 4
    assert count.decoding.gathered_bytes == 9 * 5 * 96 * 160 * 4


def test_a_weight_that_a_loop_changes_is_gathered_in_each_of_its_runs():
    def updates(weights, x):
        return jax.lax.scan(lambda w, _: (w - x.T @ (x @ w), None), weights, length=3)[0]

    assert count_work(updates, shapes((32, 16), (8, 32)), (0,)).rest.gathered_bytes == 3 * 32 * 16 * 4


def test_branches_count_as_the_dearest_of_them():
    def choose(which, x):
        return jax.lax.cond(which, lambda x: x @ x @ x, lambda x: x @ x, x)

    count = count_work(choose, [jax.ShapeDtypeStruct((), bool), *shapes((8, 8))], ())
    assert count.flops == 2 * 2 * 8**3


def test_weights_are_followed_through_what_rearranges_them():
    def function(weights, x):
        def layer(x, kernel):
            return x @ kernel.reshape(6, 6).T.astype(jnp.float32), None

        return jax.lax.scan(jax.checkpoint(layer), x @ x.T @ x, weights)[0]

    count = count_work(function, shapes((3, 36), (6, 6)), (0,))
    assert count.rest.weight_bytes == 3 * 36 * 4


@pytest.fixture(scope="module")
def tiny():
    """The tiny preset with a batch that several devices can share."""
    return presets.preset("tiny", STAGES).to_dict()


def counts(values: dict, **changes) -> dict[str, float]:
    config = frozen(RunConfig, presets.merged(values, changes))
    system = abstract_system(config)
    return {stage: step_work(config, system, stage).flops for stage in changes if stage in STAGES}


@pytest.mark.parametrize(
    "stage, field",
    [
        pytest.param("cold_start", "sampler_steps", marks=pytest.mark.slow),
        ("gen_for_und", "max_new_tokens"),
    ],
)
def test_denoising_steps_and_decoded_tokens_cost_in_proportion(tiny, stage, field):
    one, two, three = (counts(tiny, **{stage: {field: count}})[stage] for count in (4, 8, 12))
    # longer captions attend to more: the second difference is small, not zero
    assert two - one > 0
    np.testing.assert_allclose(three - two, two - one, rtol=0.02 if field == "sampler_steps" else 0.35)


def test_micro_batches_change_memory_and_not_work(tiny):
    whole = counts(tiny, pretrain=dict(micro_batches=1))["pretrain"]
    assert counts(tiny, pretrain=dict(micro_batches=4))["pretrain"] == pytest.approx(whole, rel=0.02)
