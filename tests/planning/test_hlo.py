"""Reading the text of compiled programs: products, loops and traffic against what is known of the program."""

import jax
import jax.numpy as jnp
import pytest

from uae_jax.planning.flops import count_work
from uae_jax.planning.hlo import Module


def module(function, *shapes, trips=1):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Module(jax.jit(function).lower(*arguments).compile().as_text(), trips), count_work(
        function, arguments, (), trips=trips
    ).flops


def counted(found):
    return sum(use.times * found.flops(use) for use in found.uses())


def layers(x, stack):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, stack)[0]


def test_layers_of_a_scan_are_counted_as_often_as_they_run():
    found, expected = module(layers, (8, 64), (7, 64, 64))
    assert counted(found) == expected == 7 * 2 * 8 * 64 * 64
    products = [use for use in found.uses() if found.flops(use)]
    assert all(use.times == 7 and len(use.loops) == 1 for use in products)


def test_a_loop_whose_end_depends_on_data_runs_as_often_as_it_may():
    def until(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: layers(x, kernel), x)

    found, expected = module(until, (8, 64), (7, 64, 64), trips=5)
    assert counted(found) == expected == 5 * 7 * 2 * 8 * 64 * 64


def test_gradients_of_convolutions_count_as_products():
    def energy(x, kernel):
        return jnp.sum(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2
        )

    found, expected = module(energy, (2, 16, 16, 8), (3, 3, 8, 16))
    assert counted(found) == pytest.approx(expected)


CALLS = """HloModule jit_step

%fused_slice (p0: bf16[36,64,32], p1: s32[]) -> bf16[1,64,32] {
  %p0 = bf16[36,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
}

%fused_update (p0: bf16[8,512,4], p1: bf16[8,1,4], p2: s32[]) -> bf16[8,512,4] {
  %p0 = bf16[8,512,4]{2,1,0} parameter(0)
  %p1 = bf16[8,1,4]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[8,512,4]{2,1,0} dynamic-update-slice(%p0, %p1, %zero, %p2, %zero)
}

%body (carry: (s32[], bf16[36,64,32], bf16[8,512,4])) -> (s32[], bf16[36,64,32], bf16[8,512,4]) {
  %carry = (s32[], bf16[36,64,32]{2,1,0}, bf16[8,512,4]{2,1,0}) parameter(0)
  %at = s32[] get-tuple-element(%carry), index=0
  %stack = bf16[36,64,32]{2,1,0} get-tuple-element(%carry), index=1
  %cache = bf16[8,512,4]{2,1,0} get-tuple-element(%carry), index=2
  %kernel = bf16[1,64,32]{2,1,0} fusion(%stack, %at), kind=kLoop, calls=%fused_slice
  %flat = bf16[64,32]{1,0} bitcast(%kernel)
  %x = bf16[8,64]{1,0} constant({...})
  %y = (bf16[8,32]{1,0}, s8[4194304]{0}) custom-call(%x, %flat), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/while/body/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %new = bf16[8,1,4]{2,1,0} constant({...})
  %filled = bf16[8,512,4]{2,1,0} fusion(%cache, %new, %at), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], bf16[36,64,32]{2,1,0}, bf16[8,512,4]{2,1,0}) tuple(%at, %stack, %filled)
}

%condition (carry: (s32[], bf16[36,64,32], bf16[8,512,4])) -> pred[] {
  %carry = (s32[], /*index=1*/bf16[36,64,32]{2,1,0}, bf16[8,512,4]{2,1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: s32[], b: bf16[36,64,32], c: bf16[8,512,4], q: bf16[2,96,4,64], k: bf16[2,128,2,64]) -> bf16[8,512,4] {
  %a = s32[] parameter(0)
  %b = bf16[36,64,32]{2,1,0} parameter(1)
  %c = bf16[8,512,4]{2,1,0} parameter(2)
  %q = bf16[2,96,4,64]{3,2,1,0} parameter(3)
  %k = bf16[2,128,2,64]{3,2,1,0} parameter(4)
  %start = (s32[], bf16[36,64,32]{2,1,0}, bf16[8,512,4]{2,1,0}) tuple(%a, %b, %c)
  %loop = (s32[], /*index=1*/bf16[36,64,32]{2,1,0}, bf16[8,512,4]{2,1,0}) while(%start), condition=%condition, \
body=%body, metadata={op_name="jit(step)/while"}, backend_config={"known_trip_count":{"n":"36"}}
  %gathered = bf16[8,128,4]{2,1,0} all-gather(%c), channel_id=1, replica_groups=[1,8]<=[8], dimensions={1}
  %mixed = (bf16[2,4,96,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %result = bf16[8,512,4]{2,1,0} get-tuple-element(%loop), index=2
}
"""


def test_library_calls_and_loops_of_a_card_are_read():
    found = Module(CALLS)
    uses = {use.instruction.name: use for use in found.uses()}
    assert list(uses) == ["kernel", "y", "filled", "gathered", "mixed"]
    assert uses["y"].times == 36 and uses["y"].loops == ("jit(step)/while",) and uses["mixed"].times == 1
    assert found.flops(uses["y"]) == 2 * 8 * 64 * 32
    assert found.flops(uses["mixed"]) == 4 * 2 * 4 * 96 * 128 * 64
    assert uses["y"].instruction.target == "__cublas$lt$matmul" and uses["gathered"].instruction.opcode == "all-gather"


def test_traffic_is_that_of_the_layer_and_of_the_update_and_not_of_the_stack():
    found = Module(CALLS)
    traffic = {use.instruction.name: found.traffic(use) for use in found.uses()}
    assert traffic["kernel"] == 2 * 64 * 32 * 2 + 4  # read, written, and its index
    assert traffic["filled"] == 2 * 8 * 4 * 2 + 4
    assert traffic["y"] == (8 * 64 + 64 * 32 + 8 * 32) * 2  # without the library's workspace


STARTS = """HloModule jit_step

%left (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0} parameter(0)
  ROOT %dot = f32[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%right (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0} parameter(0)
  %one = f32[64,64]{1,0} copy(%p)
  ROOT %two = f32[64,64]{1,0} copy(%one)
}

%go (carry: (f32[64,64])) -> pred[] {
  %carry = (f32[64,64]{1,0}) parameter(0)
  %x = f32[64,64]{1,0} get-tuple-element(%carry), index=0
  %all = pred[]{} all-reduce(%x), channel_id=2
  ROOT %more = pred[] not(%all)
}

%pass (carry: (f32[64,64])) -> (f32[64,64]) {
  %carry = (f32[64,64]{1,0}) parameter(0)
  %x = f32[64,64]{1,0} get-tuple-element(%carry), index=0
  %y = f32[64,64]{1,0} copy(%x)
  ROOT %next = (f32[64,64]{1,0}) tuple(%y)
}

%fused (p0: f32[8,512], p1: f32[8,1], p2: s32[]) -> (f32[8,512], f32[8,1]) {
  %p0 = f32[8,512]{1,0} parameter(0)
  %p1 = f32[8,1]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %update = f32[8,512]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
  ROOT %both = (f32[8,512]{1,0}, f32[8,1]{1,0}) tuple(%update, %p1)
}

ENTRY %main (a: f32[64,64], b: pred[], c: f32[8,512], d: f32[8,1], e: s32[]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  %b = pred[] parameter(1)
  %c = f32[8,512]{1,0} parameter(2)
  %d = f32[8,1]{1,0} parameter(3)
  %e = s32[] parameter(4)
  %chosen = f32[64,64]{1,0} conditional(%b, %a, %a), true_computation=%left, false_computation=%right
  %gather = (f32[64,64]{1,0}, f32[512,64]{1,0}) all-gather-start(%a), channel_id=1, dimensions={0}
  %gathered = f32[512,64]{1,0} all-gather-done(%gather)
  %reduce = f32[64,64]{1,0} all-reduce-start(%a), channel_id=3
  %moved = (f32[64,64]{1,0}, f32[64,64]{1,0}, u32[]) copy-start(%a)
  %filled = (f32[8,512]{1,0}, f32[8,1]{1,0}) fusion(%c, %d, %e), kind=kLoop, calls=%fused
  %start = (f32[64,64]{1,0}) tuple(%a)
  %loop = (f32[64,64]{1,0}) while(%start), condition=%go, body=%pass
  ROOT %result = f32[64,64]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_transfers_branches_and_conditions_are_counted_once_each():
    found = Module(STARTS, trips=5)
    uses = {use.instruction.name: use for use in found.uses()}
    assert found.flops(uses["dot"]) == 2 * 64**3 and "two" not in uses  # the branch that costs more
    assert uses["gather"].instruction.bytes == 512 * 64 * 4 and uses["reduce"].instruction.bytes == 64 * 64 * 4
    assert found.traffic(uses["moved"]) == 2 * 64 * 64 * 4
    assert found.traffic(uses["filled"]) == 8 * 4 + 2 * 8 * 4 + 4  # read and written: a column, not the array
    assert (uses["all"].times, uses["y"].times) == (6, 5)  # before every pass, and once more
