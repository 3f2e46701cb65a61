"""Plans of whole stages: compiled for faked devices, estimated for cards, and the command's answers."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets, unified_ar
from uae_jax import plan as plan_command
from uae_jax import sharding, trees
from uae_jax.models.language.config import TextConfig
from uae_jax.nn.attention import attention
from uae_jax.planning import plan, published
from uae_jax.planning.cards import TARGETS
from uae_jax.planning.chips import GIB, USABLE, parse_topology
from uae_jax.planning.compile import (
    QUICK,
    QUICK_GPU,
    RUN,
    Memory,
    _too_large,
    largest_results,
    plan_mesh,
    resident_bytes,
)
from uae_jax.planning.estimate import estimate_memory
from uae_jax.planning.flops import Count, Work
from uae_jax.planning.hlo_seconds import LATENCY
from uae_jax.planning.links import Received
from uae_jax.planning.plan import Compiling, make_plan, mesh_sizes
from uae_jax.planning.roofline import MeshSizes, Rollout, Updates, gradient_bytes, group_sums, roofline
from uae_jax.planning.system import abstract_system
from uae_jax.planning.table import StagePlan, as_json, text_table
from uae_jax.settings import frozen
from uae_jax.stages.folders.assemble import MAX_PIXELS
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import BUILTIN, load_system

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
MEDIUM, LARGE = "qwen2_5_vl_3b_sd3_5_medium", "qwen2_5_vl_3b_sd3_5_large"


def settings(preset: str, **sections) -> dict:
    return presets.merged(presets.preset(preset, STAGES).to_dict(), sections)


def test_the_shapes_of_a_folder_are_those_of_its_weights():
    config = frozen(RunConfig, settings("tiny"))
    abstract, real = abstract_system(config), load_system(config.model, image_size=32)
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.flatten(abstract.parts).items() if "_lora/" not in name}
    assert shapes == {name: tuple(np.shape(leaf)) for name, leaf in trees.flatten(real.parts).items()}
    assert abstract.model == real.model and abstract.stops == real.stops and abstract.processor == real.processor


@pytest.mark.parametrize("preset, billions", [(MEDIUM, 2.47), (LARGE, 8.15)])
def test_published_sizes_have_the_published_numbers_of_parameters(preset, billions):
    system = abstract_system(frozen(RunConfig, settings(preset)))
    # the published files hold the position table too
    assert trees.parameter_count(system.parts["transformer"]) / 1e9 == pytest.approx(billions, abs=0.01)
    captioner = sum(trees.parameter_count(system.parts[name]) for name in ("vision", "language"))
    assert captioner / 1e9 == pytest.approx(3.75, abs=0.01)
    assert trees.parameter_count(system.parts["vae"]) / 1e6 == pytest.approx(83.8, abs=0.1)
    assert system.spec.max_patches == 18 * 18 and system.spec.max_prompt == 192
    assert published.PROCESSOR.max_pixels == MAX_PIXELS


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="max_prompt is 128, .* needs 161 tokens; set max_prompt to 0"):
        abstract_system(frozen(RunConfig, settings(LARGE, data=dict(max_prompt=128))))
    with pytest.raises(ValueError, match="max_prompt is 8, .* tokens; set max_prompt to 0"):  # of a folder
        abstract_system(frozen(RunConfig, settings("tiny", data=dict(max_prompt=8))))


def test_frozen_parts_are_held_in_bfloat16_once_nothing_trains_them():
    config = frozen(RunConfig, settings(LARGE))
    system = abstract_system(config)
    kinds = {}
    for stage in ("pretrain", "gen_for_und"):
        program = make_program(config, system, system.parts, system.batch, stage)
        kinds[stage] = {
            name: {leaf.dtype.name for leaf in jax.tree.leaves(part)} for name, part in program.frozen.items()
        }
        assert {leaf.dtype.name for leaf in jax.tree.leaves(program.state.params)} == {"float32"}
    assert kinds["pretrain"]["language"] == kinds["gen_for_und"]["transformer"] == {"bfloat16"}
    assert kinds["gen_for_und"]["vae"] == kinds["gen_for_und"]["transformer_lora"] == {"float32"}


@pytest.fixture(scope="module")
def compiled():
    """The cheapest stage of the tiny preset on eight faked devices, whole and with parameters cut."""
    found = {}
    for name, mesh in (("whole", dict(data=8, fsdp=1)), ("cut", dict(data=1, fsdp=8))):
        found[name] = make_plan(settings("tiny", mesh=mesh), "cpu:8", ("pretrain",))
    return found


@pytest.mark.slow
def test_faked_devices_get_a_compiled_plan(compiled):
    (found,), topology, sizes = compiled["whole"]
    assert (
        not found.memory.estimated
        and found.memory.seconds > 0
        and found.memory.temporaries > 0
        and found.fits(topology)
    )
    assert found.memory.peak >= found.memory.arguments + found.memory.temporaries and len(found.memory.largest) == 5
    assert sizes == MeshSizes(8, 1, 1)
    text = text_table([found], topology, sizes, "tiny")
    assert "| pretrain" in text and "largest temporaries" in text and "does not fit" not in text


@pytest.mark.slow
def test_cutting_parameters_makes_the_arguments_of_a_device_smaller(compiled):
    whole, cut = (compiled[name][0][0].memory.arguments for name in ("whole", "cut"))
    assert cut < 0.5 * whole


def test_resident_bytes_are_those_of_the_shards():
    config = frozen(RunConfig, settings("tiny", mesh=dict(data=1, fsdp=8)))
    topology, system = parse_topology("cpu:8"), abstract_system(config)
    program = make_program(config, system, system.parts, system.batch, "pretrain", plan_mesh(config, topology))
    real = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        (program.state, program.frozen, program.batch),
    )
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))
    assert resident_bytes(program) == held + 8  # and the random key


@pytest.fixture
def without_wheels(monkeypatch):
    """As on a host without the CUDA wheels, where the plan of a card is an estimate."""

    def absent(config, topology):
        raise ImportError("the CUDA wheels are not installed")

    monkeypatch.setattr(plan, "plan_mesh", absent)


def test_cards_are_estimated_without_the_wheels_and_the_large_model_needs_more_than_one(without_wheels):
    values = settings(LARGE, mesh=dict(data=1, fsdp=-1), pretrain=dict(micro_batches=64))
    one, eight = (make_plan(values, f"gpu:{count}xH200", ("pretrain",)) for count in (1, 8))
    assert one[0][0].memory.estimated and not one[0][0].fits(one[1]) and eight[0][0].fits(eight[1])
    state = 3 * 4 * one[0][0].trainable  # weights and two moments
    assert one[0][0].memory.arguments > state and eight[0][0].memory.arguments == pytest.approx(
        one[0][0].memory.arguments / 8, rel=0.1
    )
    assert "estimated" in text_table(*one, "large") and "does not fit" in text_table(*one, "large")


def test_a_missing_compiler_of_slices_is_said(monkeypatch, without_wheels):
    with pytest.raises(ImportError, match="not installed"):
        make_plan(settings("tiny", mesh=dict(data=1, fsdp=-1)), "v5e:2x2", ("pretrain",))


CARDS = ROOT / "docs" / "cards.md"
CARDS_PAGE = re.compile(
    r"^### `(.+)`$|^\| (\d\S*x[\w-]+) \| (\w+) \| \d+ \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", re.MULTILINE
)


def compiled_peaks() -> dict[tuple[str, str], dict[str, float]]:
    """GiB of docs/cards.md by preset and number of cards, and by stage: the largest over the kinds of cards."""
    found, preset = {}, ""
    for heading, cards, stage, peak in CARDS_PAGE.findall(CARDS.read_text()):
        preset = heading or preset
        if cards:
            stages = found.setdefault((preset, cards.partition("x")[0]), {})
            stages[stage] = max(stages.get(stage, 0.0), float(peak))
    return found


def test_every_row_of_the_page_fits_its_card():
    shares = [int(share) for share in re.findall(r"\| (\d+) % \|", CARDS.read_text())]
    assert len(shares) > 20 and max(shares) <= 100 * USABLE


def test_the_page_of_cards_has_every_preset_of_a_card():
    of_cards = {name for name in presets.PRESETS if name.partition("@")[2] in ("1xH200", "8xH200", "1x24GB")}
    fitting = set(re.findall(r"^\| `(\S+@\S+)` \| \w+ \| \d+ \| \d+ \| [\d.]+ \|", CARDS.read_text(), re.MULTILINE))
    assert of_cards <= fitting and {preset for preset, _ in compiled_peaks()} <= of_cards


@pytest.mark.parametrize("preset, count", sorted(compiled_peaks()))
def test_estimates_are_at_most_15_percent_above_what_was_compiled_and_never_below(preset, count):
    config = frozen(RunConfig, settings(preset))
    system, sizes = abstract_system(config), mesh_sizes(config, int(count))
    for stage, peak in compiled_peaks()[preset, count].items():
        found = estimate_memory(make_program(config, system, system.parts, system.batch, stage), config, sizes, system)
        assert 0.999 * peak <= found.peak / GIB <= 1.15 * peak, stage


def compiled_together() -> list[tuple[str, str, str, float]]:
    """Preset, number of cards, stage and GiB of the tables that have all presets of a page, but for those of slices."""
    rows = re.compile(r"^\| `(\S+)` \| (\d+)x[\w-]+ \| (\w+) \| ([\d.]+) \| \d+ % \|", re.MULTILINE)
    pages = (ROOT / "docs" / name for name in ("decoders.md", "janus.md"))
    return [(*row[:3], float(row[3])) for page in pages for row in rows.findall(page.read_text())]


@pytest.mark.parametrize("preset, count, stage, peak", compiled_together())
def test_estimates_of_other_models_are_at_most_15_percent_above_what_was_compiled(preset, count, stage, peak):
    values = unified_ar.get_config(preset).to_dict() if stage == "unified_ar" else settings(preset)
    config = frozen(RunConfig, values)
    system, sizes = abstract_system(config), mesh_sizes(config, int(count))
    found = estimate_memory(make_program(config, system, system.parts, system.batch, stage), config, sizes, system)
    assert peak - 0.05 <= found.peak / GIB <= 1.15 * peak  # the page has one decimal


@pytest.mark.parametrize(
    "stage, peak", [("pretrain", 0.60), ("cold_start", 0.21), ("gen_for_und", 0.39), ("und_for_gen", 1.69)]
)
def test_what_is_kept_without_recomputation_is_counted(stage, peak, tmp_path):
    """The built-in model with six layers in its decoder, compiled for one H100 by `uae_jax.plan`.

    Its sizes are far from those that the formulas were fitted to.
    """
    shutil.copytree(BUILTIN, tmp_path / "model")
    place = tmp_path / "model" / "dit" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"num_layers": 6}))
    nft = dict(method="nft", data_captions=0.75, reward=dict(contrast=1.0, contrast_temperature=0.05))
    config = frozen(RunConfig, settings("tiny", model=dict(folder=str(tmp_path / "model")), und_for_gen=nft))
    system = abstract_system(config)
    found = estimate_memory(
        make_program(config, system, system.parts, system.batch, stage), config, MeshSizes(1, 1, 1), system
    )
    assert 0.9 * peak <= found.peak / GIB <= 1.4 * peak


@pytest.mark.parametrize(
    "topology, sections, message",
    [
        ("v9:8x8", {}, "v6e:8x8"),
        ("gpu:6xH200", dict(mesh=dict(data=4, fsdp=1)), "does not fit 6 devices"),
        ("gpu:5xH200", dict(mesh=dict(data=5, fsdp=1)), "must be a multiple of the 5 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(topology, sections, message):
    with pytest.raises(ValueError, match=message):
        make_plan(settings("tiny", **sections), topology)


@pytest.mark.parametrize("name", TARGETS)
def test_cards_are_described_to_the_compiler_or_it_is_said_what_to_install(name):
    config, topology = (
        frozen(RunConfig, settings("tiny", mesh=dict(data=2, fsdp=-1))),
        parse_topology(f"gpu:2x4x{name}"),
    )
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        with pytest.raises(ImportError, match="extra `cuda`"):
            plan_mesh(config, topology)
    else:
        mesh = plan_mesh(config, topology)
        assert (
            mesh.shape == {"data": 2, "fsdp": 4, "tensor": 1}
            and mesh.devices.flat[0].device_kind == topology.chip.device_kind
        )
        assert [device.process_index for device in mesh.devices.flat] == [0] * 4 + [1] * 4
        text = compile_for_cards(mesh)
        assert ("fmha" in text) == (name != "T4") and "__cudnn$conv" in text and "all-reduce" in text


def compile_for_cards(mesh: jax.sharding.Mesh) -> str:
    """The compiled gradient of a convolution, a product and attention, with rows over all devices."""

    def energy(images, matrix, kernel):
        y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        heads = (y.reshape(len(y), 256, 128).astype(jnp.bfloat16) @ matrix).reshape(len(y), 256, 2, 64)
        return attention(heads, heads, heads).astype(jnp.float32).sum()

    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P(("data", "fsdp")), jax.P()))
    shapes = (
        ((mesh.size, 16, 16, 128), jnp.float32, rows),
        ((128, 128), jnp.bfloat16, whole),
        ((3, 3, 128, 128), jnp.float32, whole),
    )
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=at) for shape, dtype, at in shapes]
    with sharding.in_use(mesh):
        return jax.jit(jax.grad(energy, argnums=(1, 2))).lower(*arguments).compile(compiler_options=QUICK_GPU).as_text()


def test_a_mesh_that_leaves_a_large_parameter_whole_is_refused():
    with pytest.raises(ValueError, match="context_key/kernel.*would be copied to every device"):
        make_plan(settings(LARGE, mesh=dict(data=1, fsdp=256)) | dict(stages=("pretrain",)), "gpu:256xH200")


def test_unknown_stages_are_refused():
    with pytest.raises(ValueError, match="the stages are align, pretrain"):
        make_plan(settings("tiny"), "gpu:4xH200", ("train",))


def test_the_roofline_is_bound_by_the_slowest_of_its_terms():
    topology, sizes = parse_topology("v6e:2x2"), MeshSizes(1, 4, 1)
    chip = topology.chip
    second = Count(rest=Work(flops=4 * chip.flops))  # one second of products on four chips
    found = roofline(second, 2 * chip.flops, topology, sizes)
    assert (found.seconds, found.utilisation, found.decoding) == (1.0, 0.5, 0.0)
    size = 3 * chip.memory_bandwidth
    decoding = Count(decoding=Work(weight_bytes=size, gathered_bytes=size))  # read whole by every chip
    found = roofline(decoding, 0.0, topology, sizes)
    # a chip of a square has two of four links
    assert found.memory == 3.0 and found.links == pytest.approx(
        0.75 * 3 * chip.memory_bandwidth / (chip.link_bandwidth / 2)
    )
    assert found.seconds == max(found.memory, found.links)
    once = roofline(decoding, 0.0, topology, sizes, Rollout(1 / 512))
    assert once.links == pytest.approx(found.links / 512) and once.seconds == once.memory == 3.0
    # four chips share a copy, and two of them hold the same key heads
    reads = Count(decoding=Work(weight_bytes=size, other_bytes=4 * chip.memory_bandwidth))
    shared = roofline(reads, 0.0, topology, sizes, Rollout(0.0, ways=4, key_copies=2))
    assert shared.decoding == shared.memory == 0.75 + 2.0 and shared.links == 0.0
    # of two rows a device, eight of the group: an all-reduce of 5 arrays [8, 64] a token, and logits of the own rows
    sums = group_sums(2, 10, 4, TextConfig(vocab_size=128, width=64, layers=2, dtype="bfloat16"))
    assert sums == Received(10 * (2 * 0.75 * 5 * 8 * 64 * 2 + 0.75 * 2 * 128 * 4))
    joined = roofline(reads, 0.0, topology, sizes, Rollout(0.0, ways=4, key_copies=2, sums=sums * 1e7))
    assert joined.links == pytest.approx(sums.links * 1e7 / topology.links) and joined.decoding == joined.links
    assert (
        roofline(second + decoding, 0.0, topology, sizes).seconds == 1 + found.seconds
    )  # sampling and the rest follow each other
    assert (
        roofline(decoding, 0.0, topology, MeshSizes(1, 1, 4)).seconds == 0.75
    )  # cut by tensor, read in quarters, never gathered


def test_gradients_are_summed_over_fsdp_and_their_shards_over_data():
    one, two = parse_topology("v5e:2x4"), parse_topology("2xv5e:2x2")
    size = 8e9
    for sums in (1, 4):
        updates = Updates(size, sums)
        # reduce-scatter alone: the optimizer updates shards
        assert gradient_bytes(updates, one, MeshSizes(1, 8, 1)) == Received(sums * size * 7 / 8)
        # all-reduce of whole gradients: twice
        assert gradient_bytes(updates, one, MeshSizes(8, 1, 1)) == Received(sums * 2 * size * 7 / 8)
        both = gradient_bytes(updates, one, MeshSizes(2, 4, 1))
        assert both == Received(sums * (size * 3 / 4 + 2 * size / 4 / 2))
        # over two slices the shards alone cross the network
        assert gradient_bytes(updates, two, MeshSizes(2, 4, 1)) == Received(sums * size * 3 / 4, sums * size / 4)
        assert gradient_bytes(updates, one, MeshSizes(1, 4, 2)) == Received(sums * size / 2 * 3 / 4)
    bound = roofline(Count(), 0.0, two, MeshSizes(2, 4, 1), updates=Updates(size))
    assert bound.seconds == pytest.approx(size / 4 / two.chip.network_bandwidth) and bound.gradients.links == 6e9


HLO = """HloModule jit_step

%fused_computation (p: f32[8,1024]) -> f32[8,1024] {
  ROOT %huge = f32[4096,4096]{1,0} add(%p, %p), metadata={op_name="jit(step)/inside"}
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[8,8,8]{2,1,0} parameter(0)
  %x = bf16[256,1024]{1,0:T(8,128)(2,1)} fusion(%a), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(step)/while/body/block/mul"}
  %y = f32[16,1024]{1,0:T(8,128)S(1)} add(%x, %x), metadata={op_name="jit(step)/on_chip"}
  ROOT %z = f32[64]{0} add(%x, %x)
}
"""


def test_largest_results_are_those_in_memory():
    assert largest_results(HLO) == ((256 * 1024 * 2, "bf16[256,1024]", "jit(step)/block/mul"), (256, "f32[64]", "add"))


@pytest.mark.parametrize(
    "name, data",
    [("v4:2x2x2", 1), ("v5e:2x4", 1), ("v5p:2x2x2", 1), ("v6e:8x8", 1), ("7x:2x2x1", 1), ("v5e:16x16", 4)]
    + [("2xv5e:4x4", 2), ("2xv6e:8x8", 4)],
)
def test_slices_are_libtpu_s_or_say_what_to_install(name, data):
    config = frozen(RunConfig, settings("tiny", mesh=dict(data=data, fsdp=-1)))
    topology = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(ImportError, match="extra `tpu`"):
            plan_mesh(config, topology)
        return
    mesh = plan_mesh(config, topology)
    assert mesh.size == topology.devices and mesh.devices.flat[0].device_kind == topology.chip.device_kind
    # a process has its own rows; a row of `data` lies in one slice, and its devices fill a box of the slice's grid
    parts = [sharding.batch_slice(mesh, process) for process in {device.process_index for device in mesh.devices.flat}]
    assert sorted(parts) == [(index, len(parts)) for index in range(len(parts))]
    for row in mesh.devices[:, :, 0]:
        assert len({getattr(device, "slice_index", 0) for device in row}) == 1
        places = np.array([(*device.coords, device.core_on_chip) for device in row])
        assert np.prod(np.ptp(places, axis=0) + 1) == len(row)


@pytest.mark.slow
def test_a_run_s_memory_is_that_of_its_own_effort(monkeypatch):
    """Compiled twice, a stage fits by the larger of both."""
    quick, run = Memory(1 * GIB, 6 * GIB, 7 * GIB, seconds=3.0), Memory(1 * GIB, 10.5 * GIB, 11.5 * GIB, seconds=90.0)
    tried = []

    def compiled(program, mesh, effort=QUICK):
        tried.append(effort)
        return (quick, "ENTRY %main () -> f32[] {\n}\n") if effort == QUICK else (run, "")

    monkeypatch.setattr(plan, "compile_program", compiled)
    monkeypatch.setattr(plan, "plan_mesh", lambda config, topology: sharding.make_mesh(config.mesh, jax.devices()[:4]))
    values = settings("tiny", mesh=dict(data=1, fsdp=4))
    (both,), topology, sizes = make_plan(values, "v5e:2x2", ("pretrain",), how=Compiling(run_effort=True))
    assert tried == [QUICK, RUN] and both.memory.peak == 11.5 * GIB and both.memory.temporaries == 6 * GIB
    assert both.memory.run_temporaries == 10.5 * GIB and both.memory.seconds == 93.0 and both.fits(topology)
    assert "| 6.00        | 10.50    | 11.50 | 72 %" in text_table([both], topology, sizes, "tiny")
    (one,), *_ = make_plan(values, "v5e:2x2", ("pretrain",))
    assert one.memory.run_temporaries is None and one.memory.peak == 7 * GIB
    assert "| 6.00        | -        | 7.00 | 44 %" in text_table([one], topology, sizes, "tiny")
    with pytest.raises(ValueError, match="--effort is libtpu's"):
        make_plan(values, "cpu:4", ("pretrain",), how=Compiling(run_effort=True))


def test_counted_and_compiled_bytes_and_the_seconds_of_a_program_are_printed(monkeypatch):
    text = """ENTRY %main (p: f32[512,4096]) -> f32[2048,4096] {
  %p = f32[512,4096]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[2048,4096]{1,0:T(8,128)} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}, \
metadata={op_name="jit(step)/up/dot_general"}
}
"""
    monkeypatch.setattr(plan, "compile_program", lambda program, mesh: (Memory(1.0, 2.0, 3.0), text))
    monkeypatch.setattr(plan, "plan_mesh", lambda config, topology: sharding.make_mesh(config.mesh, jax.devices()[:4]))
    values = settings("tiny", mesh=dict(data=1, fsdp=4))
    plans, topology, sizes = make_plan(values, "v5e:2x2", ("pretrain",))
    printed, size = text_table(plans, topology, sizes, "tiny"), 0.75 * 2048 * 4096 * 4
    assert re.search(r"pretrain, GB received by a device: counted weights [\d.]+, gradients [\d.]+;", printed)
    assert (
        "compiled all-gather 0.03" in printed and "| jit(step)/up/dot_general f32[2048,4096] | 1 | 0.000 |" in printed
    )
    stored = json.loads(as_json(plans, topology, sizes, "tiny"))["stages"][0]
    assert stored["compiled"]["received"] == {"all-gather": {"links": size, "network": 0.0}}
    seconds = stored["compiled"]["seconds"]
    assert seconds["seconds"] == pytest.approx(size / topology.links + LATENCY) and seconds["kinds"]["links"] > 0
    assert stored["time"]["gradients"]["links"] > 0 and stored["time"]["weights"]["links"] > 0


REFUSALS = {
    "total": """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. \
Exceeded hbm capacity by 4.75G.

Largest program allocations in hbm:

  1. Size: 6.00G
     Operator: op_name="jit(step)/attention"
     Shape: f32[16,38,1555,1555]{3,2,1,0:T(8,128)}
     Unpadded size: 5.70G
""",
    "temporaries": "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(42.00G) exceeds available HBM (15.75G).",
}


@pytest.mark.parametrize("kind, temporaries", [("total", 18.5), ("temporaries", 42)])
def test_a_program_that_does_not_fit_is_reported_as_libtpu_says_it(kind, temporaries):
    memory = _too_large(REFUSALS[kind], 2 * GIB, 1.0)
    assert (memory.temporaries / GIB, memory.peak / GIB) == (temporaries, temporaries + 2)
    if kind == "total":
        assert memory.largest == ((6 * GIB, "f32[16,38,1555,1555]{3,2,1,0:T(8,128)}", "jit(step)/attention"),)


def test_other_refusals_are_one_clear_error():
    with pytest.raises(ValueError, match="compiler refused the step: INTERNAL: something"):
        _too_large("INTERNAL: something\nmore", 0.0, 1.0)


def test_json_has_every_figure_and_no_infinity():
    topology, sizes = parse_topology("cpu:2"), MeshSizes(2, 1, 1)
    stage = StagePlan("pretrain", 4, 10, 20, Memory(1.0, 2.0, 3.0), 5.0, 4.0, roofline(Count(), 4.0, topology, sizes))
    stored = json.loads(as_json([stage], topology, sizes, "tiny"))
    assert (
        stored["stages"][0]["memory"]["peak"] == 3.0
        and stored["stages"][0]["fits"]
        and stored["chip"]["memory"] is None
    )


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "uae_jax.plan", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_prints_a_table_writes_json_and_fails_where_a_stage_does_not_fit(tmp_path):
    done = command(
        f"--config=configs/unified_grpo.py:{LARGE}",
        "--topology=gpu:1xH100",
        "--stages=pretrain",
        f"--json={tmp_path}/plan.json",
        "--config.pretrain.micro_batches=256",
    )
    assert done.returncode == 3 and "pretrain does not fit" in done.stdout, done.stderr
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["stages"][0]["memory"]["peak"] > 80 * GIB and stored["preset"] == LARGE


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--config=configs/unified_grpo.py", "--topology=v7:8x8"), "topology is 'v7:8x8'"),
        (("--config=configs/unified_grpo.py:huge", "--topology=cpu:2"), "unknown preset 'huge'"),
        (("--config=configs/bootstrap.py", "--topology=cpu:2"), "no stages to plan"),
        (("--config=unified_gpro", "--topology=cpu:2"), "did you mean unified_grpo?"),
        (
            ("--config=unified_grpo", "--topology=cpu:2", "--config.seed=x"),
            "config.seed is 'x'; it must be of type int",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(plan_command, "prepare_environment", lambda topology: None)  # JAX is imported already
    with pytest.raises(SystemExit) as stop:
        plan_command.main(arguments)
    assert re.fullmatch(f"error: .*{re.escape(message)}.*", stop.value.code)


@pytest.mark.slow
def test_the_command_ends_with_2_where_a_stage_does_not_fit(monkeypatch, capsys, without_wheels):
    monkeypatch.setattr(plan_command, "prepare_environment", lambda topology: None)
    arguments = [f"--config=unified_grpo:{LARGE}", "--stages=pretrain", "--config.pretrain.micro_batches=256"]
    with pytest.raises(SystemExit) as stop:
        plan_command.main([*arguments, "--topology=gpu:1xH100"])
    assert stop.value.code == 3 and "pretrain does not fit" in capsys.readouterr().out
    assert plan_command.main([*arguments, "--topology=gpu:8xH100"]) is None
    assert "does not fit" not in capsys.readouterr().out


def test_the_command_reads_its_arguments_in_another_process():
    done = command("--config=configs/unified_grpo.py", "--topology=v7:8x8")
    assert done.returncode == 1 and "topology is 'v7:8x8'" in done.stderr and "Traceback" not in done.stderr


def test_published_template_is_that_of_the_tokenizer():
    template = published.template()
    assert len(template.prefix) == 14 and len(template.suffix) == 5 and template.length(512) == 531
