"""Seconds of compiled programs: text in libtpu's form, whose figures are worked out by hand."""

import dataclasses

import pytest

from uae_jax.planning.chips import parse_topology
from uae_jax.planning.collectives import received_by_kind
from uae_jax.planning.hlo import Module
from uae_jax.planning.hlo_seconds import LATENCY, LINKS, PALLAS, PRODUCTS, VECTOR, program_seconds
from uae_jax.planning.hlo_text import Array

V5E = parse_topology("v5e:2x4")
PEAK, MEMORY, LINK = V5E.chip.flops, V5E.chip.memory_bandwidth, V5E.links


def seconds(text, topology=V5E, trips=1):
    return program_seconds(Module(text, trips), topology)


@pytest.mark.parametrize(
    "shape, layout, expected",
    [
        ((16, 256), "1,0:T(8,128)(2,1)", 16 * 256 * 2),
        ((7, 32), "1,0:T(8,128)(2,1)", 8 * 128 * 2),  # a narrow last axis takes a whole tile
        ((7, 32), "0,1:T(8,128)(2,1)", 32 * 128 * 2),
        ((3, 9, 130), "2,1,0:T(8,128)(2,1)", 3 * 16 * 256 * 2),
        ((300,), "0:T(1024)(128)(2,1)", 1024 * 2),
        ((), ":T(128)", 2),
        ((16, 256), "1,0:T(8,128)(2,1)S(1)", 0),  # on the chip
        ((16, 250), "1,0", 16 * 250 * 2),
    ],
)
def test_tiles_are_moved_whole_and_what_is_on_the_chip_not_at_all(shape, layout, expected):
    assert Array("bf16", shape, layout).moved == expected


SCAN = """HloModule jit_step, is_scheduled=true

%slice (p0: bf16[36,2048,1024], p1: s32[]) -> bf16[2048,1024] {
  %p0 = bf16[36,2048,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,2048,1024}
  ROOT %kernel = bf16[2048,1024]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%product (p0: bf16[8,2048], p1: bf16[36,2048,1024], p2: s32[]) -> bf16[8,1024] {
  %p0 = bf16[8,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[36,2048,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %kernel = bf16[2048,1024]{1,0:T(8,128)(2,1)} fusion(%p1, %p2), kind=kLoop, calls=%slice
  ROOT %y = bf16[8,1024]{1,0:T(8,128)(2,1)} convolution(%p0, %kernel), dim_labels=bf_io->bf
}

%condition (carry: (s32[], bf16[8,2048], bf16[36,2048,1024])) -> pred[] {
  %carry = (s32[], bf16[8,2048], bf16[36,2048,1024]) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %layers = s32[]{:T(128)} constant(36)
  ROOT %less = pred[]{:T(512)} compare(%at, %layers), direction=LT
}

%body (carry: (s32[], bf16[8,2048], bf16[36,2048,1024])) -> (s32[], bf16[8,2048], bf16[36,2048,1024]) {
  %carry = (s32[], bf16[8,2048], bf16[36,2048,1024]) parameter(0)
  %at = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %x = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %stack = bf16[36,2048,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %one = s32[]{:T(128)} constant(1)
  %y = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %stack, %at), kind=kOutput, calls=%product, \
metadata={op_name="jit(step)/layers/while/body/up/dot_general"}
  %twice = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} concatenate(%y, %y), dimensions={1}
  %next = s32[]{:T(128)S(6)} add(%at, %one)
  ROOT %all = (s32[], bf16[8,2048], bf16[36,2048,1024]) tuple(%next, %twice, %stack)
}

ENTRY %main (x: bf16[8,2048], stack: bf16[36,2048,1024]) -> bf16[8,2048] {
  %x = bf16[8,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %stack = bf16[36,2048,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %near = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %start = (s32[], bf16[8,2048], bf16[36,2048,1024]) tuple(%zero, %near, %stack)
  %loop = (s32[], bf16[8,2048], bf16[36,2048,1024]) while(%start), condition=%condition, body=%body, \
metadata={op_name="jit(step)/layers/while"}
  ROOT %result = bf16[8,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_scan_reads_one_layer_of_the_stack_in_each_of_its_runs():
    found = seconds(SCAN)
    layer = 2048 * 1024 * 2 / MEMORY  # far above the time of the products of eight rows
    assert layer > 2 * 8 * 2048 * 1024 / PEAK
    assert found.kinds[PRODUCTS] == pytest.approx(36 * layer)
    assert found.kinds[VECTOR] == pytest.approx(8 * 2048 * 2 / MEMORY, rel=0.01)  # the copy to the chip
    assert found.seconds == pytest.approx(sum(found.kinds.values()))
    assert [(loop.path, loop.runs) for loop in found.loops] == [("jit(step)/layers", 36), ("", 1)]
    assert found.largest[0].path.endswith("up/dot_general") and found.largest[0].runs == 36


def entry(*lines: str, more: str = "") -> str:
    body = "\n  ".join(lines)
    return f"HloModule jit_step\n{more}\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n  {body}\n}}\n"


def test_batched_products_are_convolutions_of_which_only_the_diagonal_counts():
    text = entry(
        "%a = bf16[64,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)",
        "%b = bf16[64,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "ROOT %c = bf16[64,512,128]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), "
        "window={size=64 stride=63 pad=0_0 lhs_dilate=64}, dim_labels=0bf_0io->0bf",
    )
    module = Module(text)
    (use,) = module.uses()
    assert module.flops(use) == 64 * 2 * 512 * 256 * 128
    assert module.traffic(use) == 64 * (512 * 256 + 256 * 128 + 512 * 128) * 2


def test_padding_of_a_window_is_no_input():
    text = entry(
        "%a = f32[2,16,16,8]{3,2,1,0} parameter(0)",
        "%b = f32[3,3,8,4]{3,2,1,0} parameter(1)",
        "ROOT %c = f32[2,16,16,4]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
        "dim_labels=b01f_01io->b01f",
    )
    module = Module(text)
    (use,) = module.uses()
    assert module.flops(use) == 2 * 2 * 8 * 4 * (3 * 16 - 2) ** 2


SQUARE = "f32[4096,4096]{1,0:T(8,128)}"
HALF = "f32[2048,4096]{1,0:T(8,128)}"
PRODUCT = f"%y = {HALF} convolution(%h, %a), dim_labels=bf_io->bf"
GIVEN = (
    "%p = f32[512,4096]{1,0:T(8,128)} parameter(0)",
    f"%a = {SQUARE} parameter(1)",
    f"%h = {HALF} parameter(2)",
)
GATHER = "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"


def test_what_is_started_runs_beside_the_products_until_it_is_awaited():
    started = f"%s = (f32[512,4096], {SQUARE}) all-gather-start(%p), {GATHER}"
    done = f"%g = {SQUARE} all-gather-done(%s)"
    product = 2 * 2048 * 4096**2 / PEAK
    gather = 4096 * 4096 * 4 * 7 / 8 / LINK + LATENCY
    assert gather > product
    found = seconds(entry(*GIVEN, started, PRODUCT, done))
    assert found.seconds == pytest.approx(gather)
    assert found.kinds[PRODUCTS] == pytest.approx(product) and found.kinds[LINKS] == pytest.approx(gather - product)
    assert found.links == pytest.approx(gather)
    # a second one waits for the first, and both for each other
    second = started.replace("%s", "%t")
    found = seconds(entry(*GIVEN, started, second, PRODUCT, done, done.replace("%g", "%i").replace("%s", "%t")))
    assert found.seconds == pytest.approx(2 * gather)
    # without start and end, nothing runs beside it
    alone = f"%g = {SQUARE} all-gather(%p), {GATHER}"
    assert seconds(entry(*GIVEN, alone, PRODUCT)).seconds == pytest.approx(gather + product)


def test_copies_between_memories_run_beside_products_and_gathers():
    moved = f"%s = ({SQUARE[:-1]}S(1)}}, {SQUARE}, u32[]) copy-start(%a)"
    awaited = f"%near = {SQUARE[:-1]}S(1)}} copy-done(%s)"
    copy, product = 4096 * 4096 * 4 / MEMORY, 2 * 2048 * 4096**2 / PEAK
    assert seconds(entry(*GIVEN, moved, PRODUCT, awaited)).seconds == pytest.approx(max(copy, product))
    found = seconds(entry(*GIVEN, moved, awaited))
    assert found.seconds == pytest.approx(copy) and found.kinds[VECTOR] == pytest.approx(copy)


def test_of_a_conditional_the_slowest_branch_counts():
    branch = (
        "%short (p: f32[4096,4096]) -> f32[4096,4096] {\n"
        f"  %p = {SQUARE} parameter(0)\n"
        f"  ROOT %c = {SQUARE} copy(%p)\n}}\n\n"
        "%long (p: f32[4096,4096]) -> f32[4096,4096] {\n"
        f"  %p = {SQUARE} parameter(0)\n"
        f"  ROOT %c = {SQUARE} convolution(%p, %p), dim_labels=bf_io->bf\n}}\n"
    )
    text = entry(
        "%b = pred[] parameter(0)",
        f"%a = {SQUARE} parameter(1)",
        f"ROOT %r = {SQUARE} conditional(%b, %a, %a), true_computation=%short, false_computation=%long",
        more=branch,
    )
    found = seconds(text)
    assert found.seconds == found.kinds[PRODUCTS] == pytest.approx(2 * 4096**3 / PEAK)


def kernel(name: str, attributes: str = "") -> str:
    """A Pallas call as libtpu writes it, with metadata on lines of its own."""
    return entry(
        "%m = s8[1,1,1]{2,1,0} parameter(0)",
        "%q = bf16[16,8192,128]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "%k = bf16[2,4096,128]{2,1,0:T(8,128)(2,1)} parameter(2)",
        f"%{name}.1 = bf16[16,8192,128]{{2,1,0:T(8,128)(2,1)}} custom-call(%m, %q, %k, %k), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{}"\n}}, metadata={op_name="jit(step)/' + name + '/pallas_call"}' + attributes,
        "ROOT %c = bf16[16,8192,128]{2,1,0:T(8,128)(2,1)} copy(%" + name + ".1)",
    )


@pytest.mark.parametrize("name, factor", [("splash_mha_fwd", 4), ("splash_mha_dq", 6), ("splash_mha_dkv", 8)])
def test_splash_attention_takes_its_products_at_the_peak(name, factor):
    found = seconds(kernel(name))
    assert found.kinds[PALLAS] == pytest.approx(factor * 16 * 8192 * 4096 * 128 / PEAK) and not found.unknown
    assert found.kinds[VECTOR] == pytest.approx(2 * 16 * 8192 * 128 * 2 / MEMORY)  # the line behind it is read too


def test_other_kernels_take_what_their_author_says_or_their_bytes():
    said = seconds(kernel("mine", ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"400000000000"}}}'))
    assert said.kinds[PALLAS] == pytest.approx(4e11 / PEAK) and not said.unknown
    unsaid = seconds(kernel("mine"))
    traffic = (2 * 16 * 8192 * 128 + 2 * 2 * 4096 * 128) * 2 + 32 * 128
    assert unsaid.kinds[PALLAS] == pytest.approx(traffic / MEMORY, rel=0.01)
    assert unsaid.unknown == ("jit(step)/mine/pallas_call",)


def test_collectives_inside_of_fusions_are_seen():
    fused = (
        "%both (p: f32[4096,4096]) -> f32[512,4096] {\n"
        f"  %p = {SQUARE} parameter(0)\n"
        "  ROOT %r = f32[512,4096]{1,0:T(8,128)} reduce-scatter(%p), "
        "replica_groups=mesh['a'=8] {'a'}, dimensions={0}, to_apply=%add\n}\n"
    )
    text = entry(
        f"%a = {SQUARE} parameter(0)",
        "ROOT %r = f32[512,4096]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%both",
        more=fused,
    )
    found = seconds(text)
    assert found.kinds[LINKS] == found.seconds == pytest.approx(4096 * 4096 * 4 * 7 / 8 / LINK + LATENCY)


# as libtpu spreads a gather over fusions, by a run's effort: they pass on its buffers, and the second has a product too
SPREAD = (
    f"%s = (f32[512,4096], {SQUARE}) fusion(%p), kind=kCustom, calls=%begin",
    "%q = f32[512,4096] get-tuple-element(%s), index=0",
    f"%b = {SQUARE} get-tuple-element(%s), index=1",
    f"%t = ({HALF}, f32[512,4096], {SQUARE}) fusion(%h, %a, %q, %b), kind=kCustom, calls=%middle",
    "%r = f32[512,4096] get-tuple-element(%t), index=1",
    f"%c = {SQUARE} get-tuple-element(%t), index=2",
    f"%g = {SQUARE} fusion(%r, %c), kind=kCustom, calls=%finish",
)


def spread(*lines: str) -> str:
    chained = f'{GATHER}, channel_id=7, frontend_attributes={{chain_id="1"}}'
    bodies = {
        "begin": (f"%i = {SQUARE} all-gather(%p0), {chained}", f"ROOT %r = (f32[512,4096], {SQUARE}) tuple(%p0, %i)"),
        "middle": (
            f"%i = {SQUARE} all-gather(%p2), {chained}",
            f"%y = {HALF} convolution(%p0, %p1), dim_labels=bf_io->bf",
            f"ROOT %r = ({HALF}, f32[512,4096], {SQUARE}) tuple(%y, %p2, %i)",
        ),
        "finish": (f"ROOT %i = {SQUARE} all-gather(%p0), {chained}",),
    }
    shapes = {
        "begin": ["f32[512,4096]"],
        "middle": [HALF, SQUARE, "f32[512,4096]", SQUARE],
        "finish": ["f32[512,4096]", SQUARE],
    }
    more = ""
    for name, body in bodies.items():
        given = [f"  %p{k} = {shape} parameter({k})" for k, shape in enumerate(shapes[name])]
        more += (
            f"%{name} (p0: f32[1]) -> f32[1] {{\n" + "\n".join([*given, *(f"  {line}" for line in body)]) + "\n}\n\n"
        )
    text = entry(*GIVEN, *lines, more=more)
    return text.replace("%s", "%async-collective-start.1").replace("%g", "%async-collective-done.1")


def test_a_gather_that_is_spread_over_fusions_counts_once_and_runs_beside_their_products():
    product, gather = 2 * 2048 * 4096**2 / PEAK, 4096 * 4096 * 4 * 7 / 8 / LINK + LATENCY
    module = Module(spread(*SPREAD))
    found = program_seconds(module, V5E)
    assert found.seconds == pytest.approx(gather) and found.links == pytest.approx(gather)
    assert found.kinds[PRODUCTS] == pytest.approx(product) and found.kinds[LINKS] == pytest.approx(gather - product)
    assert received_by_kind(module, V5E)["all-gather"].links == pytest.approx(4096 * 4096 * 4 * 7 / 8)
    # its buffers are written by the links: a fusion without a product takes its own bytes alone
    copied = spread(*SPREAD).replace(
        f"%y = {HALF} convolution(%p0, %p1), dim_labels=bf_io->bf", f"%y = {HALF} copy(%p0)"
    )
    assert program_seconds(Module(copied), V5E).kinds[VECTOR] < 4 * 2048 * 4096 * 4 / MEMORY


def test_twice_as_fast_links_halve_the_waits():
    fast = dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, link_bandwidth=2 * V5E.chip.link_bandwidth))
    text = entry("%p = f32[512,4096]{1,0:T(8,128)} parameter(0)", f"ROOT %g = {SQUARE} all-gather(%p), {GATHER}")
    one, two = (seconds(text, topology).seconds - LATENCY for topology in (V5E, fast))
    assert one == pytest.approx(2 * two)


def test_libtpu_s_cycles_replace_the_roofline_where_it_estimates_them():
    config = 'backend_config={"window_config":{"kernel_window_bounds":["16"],"estimated_cycles":"%d"}}'
    product, copy = config % 3_000_000, config % 1_500
    text = SCAN.replace("calls=%product, ", f"calls=%product, {product}, ").replace("copy(%x)", f"copy(%x), {copy}")
    module = Module(text)
    roofline, found = program_seconds(module, V5E), program_seconds(module, V5E, cycles=True)
    assert found.kinds[PRODUCTS] == pytest.approx(36 * 2e-3) and roofline.kinds == seconds(SCAN).kinds
    small = found.kinds[VECTOR] - 1e-6  # what has no cycles keeps the roofline
    assert small == pytest.approx(roofline.kinds[VECTOR] - 8 * 2048 * 2 / MEMORY, abs=1e-12)
    assert [loop.name for loop in found.loops] == ["loop", ""]
