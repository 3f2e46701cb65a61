"""How often loops run, read from the text of compiled programs without XLA's own count."""

import re

import jax
import jax.numpy as jnp
import pytest

from uae_jax.planning.hlo import Module


def text_of(function, *shapes):
    """The compiled text without the trip counts that a CPU's compiler writes, as libtpu writes none."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    written = jax.jit(function).lower(*arguments).compile().as_text()
    return re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", written)


def runs_of_products(text, trips=99):
    """Runs of each product."""
    found = Module(text, trips)
    return sorted(use.times for use in found.uses() if found.flops(use))


def layers(x, stack):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, stack)[0]


def test_a_scan_runs_as_often_as_its_condition_says():
    text = text_of(layers, (8, 64), (7, 64, 64))
    assert "known_trip_count" not in text and runs_of_products(text) == [7]


def test_scans_inside_of_scans_multiply():
    def steps(x, stack):
        return jax.lax.scan(lambda x, _: (layers(x, stack) + x, None), x, length=3)[0]

    assert runs_of_products(text_of(steps, (8, 64), (7, 64, 64))) == [21]


def test_a_gradient_runs_its_loops_in_both_directions():
    def energy(x, stack):
        return jnp.sum(layers(x, stack) ** 2)

    assert runs_of_products(text_of(jax.grad(energy, argnums=(0, 1)), (8, 64), (7, 64, 64))) == [7, 7, 7]


def test_a_loop_that_data_may_end_runs_to_the_constant_of_its_condition():
    def sample(x, stack):
        def unfinished(state):
            return (state[0] < 5) & (jnp.sum(state[1]) < 1e6)

        return jax.lax.while_loop(unfinished, lambda s: (s[0] + 1, layers(s[1], stack)), (0, x))[1]

    assert runs_of_products(text_of(sample, (8, 64), (7, 64, 64))) == [35]


def test_a_loop_that_data_alone_ends_runs_as_often_as_it_may():
    def until(x, stack):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: layers(x, stack), x)

    assert runs_of_products(text_of(until, (8, 64), (7, 64, 64)), trips=4) == [28]


def loop(condition: str, limit: str = "%nine", begin: str = "%zero") -> str:
    """A loop of libtpu's: a counter, a limit that it carries unchanged, and a value."""
    return f"""HloModule jit_step, is_scheduled=true

%fused_compare (p0: s32[], p1: s32[]) -> pred[] {{
  %p0 = s32[]{{:T(128)}} parameter(0)
  %p1 = s32[]{{:T(128)}} parameter(1)
  ROOT %less = pred[]{{:T(512)}} compare(%p0, %p1), direction=LT
}}

%fused_add (p: s32[]) -> s32[] {{
  %p = s32[]{{:T(128)}} parameter(0)
  %two = s32[]{{:T(128)}} constant(2)
  ROOT %sum = s32[]{{:T(128)}} add(%p, %two)
}}

%condition (carry: (s32[], s32[], f32[8,8])) -> pred[] {{
  %carry = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}) parameter(0)
  %at = s32[]{{:T(128)}} get-tuple-element(%carry), index=0
  %end = s32[]{{:T(128)}} get-tuple-element(%carry), index=1
  %six = s32[]{{:T(128)}} constant(6), metadata={{op_name="jit(step)"}}
  {condition}
}}

%body (carry: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {{
  %carry = (s32[]{{:T(128)}}, s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}) parameter(0)
  %at = s32[]{{:T(128)}} get-tuple-element(%carry), index=0
  %end = s32[]{{:T(128)}} get-tuple-element(%carry), index=1
  %x = f32[8,8]{{1,0:T(8,128)}} get-tuple-element(%carry), index=2
  %kept = s32[]{{:T(128)}} copy(%end)
  %next = s32[]{{:T(128)}} fusion(%at), kind=kLoop, calls=%fused_add
  %y = f32[8,8]{{1,0:T(8,128)}} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %all = (s32[], s32[], f32[8,8]) tuple(%next, %kept, %y)
}}

ENTRY %main (a: f32[8,8], n: s32[]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0:T(8,128)}} parameter(0)
  %n = s32[]{{:T(128)}} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  %one = s32[]{{:T(128)}} constant(1)
  %nine = s32[]{{:T(128)}} constant(9)
  %start = (s32[], s32[], f32[8,8]) tuple({begin}, {limit}, %a)
  %loop = (s32[], s32[], f32[8,8]) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,8]{{1,0:T(8,128)}} get-tuple-element(%loop), index=2
}}
"""


@pytest.mark.parametrize(
    "text, runs",
    [
        # a counter that grows by two, from 0 to 6
        (loop("ROOT %less = pred[] compare(%at, %six), direction=LT"), 3),
        (loop("ROOT %less = pred[] compare(%at, %six), direction=LE"), 4),
        (loop("ROOT %more = pred[] compare(%six, %at), direction=GT"), 3),
        (loop("ROOT %less = pred[] compare(%at, %six), direction=LT", begin="%one"), 3),
        # the limit is among the first values, and compared inside of a fusion
        (loop("ROOT %less = pred[] fusion(%at, %end), kind=kLoop, calls=%fused_compare"), 5),
        # a limit that the program is given
        (loop("ROOT %less = pred[] compare(%at, %end), direction=LT", limit="%n"), 99),
        # no counter
        (loop("ROOT %less = pred[] compare(%six, %end), direction=LT"), 99),
    ],
)
def test_conditions_in_libtpu_s_forms(text, runs):
    assert runs_of_products(text) == [runs]
