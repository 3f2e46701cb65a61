"""Where parameters and batches lie on a mesh, by rule and by what each device holds."""

import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding, trees
from uae_jax.methods import STAGES
from uae_jax.methods.method import make_method
from uae_jax.methods.stage_settings import SamplerConfig
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config
from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig
from uae_jax.models.sd3 import transformer, vae
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.transformer import ATTENTION_ADAPTER
from uae_jax.nn.constrain import constrain
from uae_jax.nn.lora import init_lora
from uae_jax.sharding import MeshConfig, check_rules, make_mesh, parameter_spec

MEDIUM = TransformerConfig(
    num_layers=24,
    num_attention_heads=24,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
LARGE = TransformerConfig(
    num_layers=38, num_attention_heads=38, pos_embed_max_size=192, dual_attention_layers=(), qk_norm="rms_norm"
)


def mesh(data=2, fsdp=2, tensor=2):
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:8])


def sizes(**axes):
    """A mesh of which only the sizes are known, as large as one likes."""
    return types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | axes)


def whole_model(config: TransformerConfig) -> dict:
    """Shapes of Qwen2.5-VL-3B with one of SD3.5's transformers, adapters, VAE, CLIP ViT-L and DINOv2-L."""
    parts = dict(qwen.abstract_params(Qwen2_5VLConfig(vision=VisionConfig(), text=TextConfig())))
    parts["projector"] = jax.eval_shape(lambda: qwen.init_projector(jax.random.key(0), 2048, 8192, 4096))
    parts |= {"transformer": transformer.abstract_params(config), "vae": vae.abstract_params(VAEConfig())}
    layers = dict(num_hidden_layers=24, num_attention_heads=16, hidden_size=1024, image_size=224, patch_size=14)
    picture = CLIPVisionConfig(**layers, intermediate_size=4096, projection_dim=768)
    parts["encoders"] = {
        "clip": clip.abstract_params(CLIPConfig(picture, CLIPTextConfig())),
        "dinov2": dino.abstract_params(Dinov2Config(**layers)),
    }
    parts["language_lora"] = jax.eval_shape(
        lambda: init_lora(jax.random.key(0), parts["language"], lm.ADAPTER_PATTERN, 32)
    )
    parts["transformer_lora"] = jax.eval_shape(
        lambda: init_lora(jax.random.key(0), parts["transformer"], ATTENTION_ADAPTER, 32)
    )
    return parts | {"pooled": jax.ShapeDtypeStruct((2048,), jnp.float32)}


@pytest.fixture(scope="module", params=[MEDIUM, LARGE], ids=["medium", "large"])
def full_size(request):
    return whole_model(request.param)


def test_one_axis_may_take_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(-1, 2, 2), jax.devices()[:8]).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "axes, message",
    [
        ((3, 1, 1), "does not divide 8 devices"),
        ((2, 2, 1), "needs 4 devices, there are 8"),
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 1, 1), "must be positive"),
        ((-2, 1, 1), "must be at least -1"),
    ],
)
def test_meshes_that_cannot_be_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh(*axes)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        # first matrix of a pair along its output, second along its input, fsdp on the rows of both
        ("language/layers/attention/query/kernel", (4, 256, 512), (None, "fsdp", "tensor")),
        ("language/layers/mlp/down/kernel", (4, 512, 256), (None, ("tensor", "fsdp"), None)),
        ("transformer/blocks_0/attention/context_output/kernel", (2, 256, 256), (None, ("tensor", "fsdp"), None)),
        ("language/embedding/table", (1024, 256), ("tensor", "fsdp")),
        ("transformer/pos_embed/table", (1, 1024, 256), (None, None, "fsdp")),
        ("vae/decoder/conv_in/kernel", (3, 3, 16, 512), (None, None, None, "fsdp")),
        # a dimension that does not divide is left alone; fsdp then goes to the widest that does
        ("language/layers/attention/key/kernel", (4, 512, 255), (None, "fsdp", None)),
        ("language/layers/attention/key/kernel", (4, 511, 256), ("fsdp", None, "tensor")),
        ("language/layers/mlp/down/kernel", (512, 130, 256), ("fsdp", "tensor", None)),
        # what is small is copied, and so are vectors
        ("language/layers/attention/query/kernel", (4, 32, 32), ()),
        ("language/layers/mlp/up/bias", (64, 4096), ()),
    ],
)
def test_parameters_lie_by_role_and_size(name, shape, expected):
    assert parameter_spec(name, shape, mesh()) == PartitionSpec(*expected)


def test_optimizer_slots_copies_and_averages_lie_as_their_parameters():
    name, shape = "language/layers/mlp/up/kernel", (4, 256, 512)
    for other in (f"opt_state/1/0/mu/{name}", f"ema/{name}", "language_policy/layers/mlp/up/kernel"):
        assert parameter_spec(other, shape, mesh()) == parameter_spec(name, shape, mesh())


def test_a_mesh_of_data_alone_copies_all_parameters():
    assert not any(parameter_spec("language/layers/mlp/up/kernel", (4, 256, 512), mesh(8, 1, 1)))


@pytest.mark.parametrize(
    "axes", [dict(fsdp=8), dict(fsdp=64), dict(fsdp=128), dict(fsdp=16, tensor=4), dict(data=2, fsdp=2, tensor=2)]
)
def test_full_size_models_use_every_rule_and_cut_all_that_is_large(full_size, axes):
    check_rules(full_size, sizes(**axes))
    cut, total = 0, 0
    for name, leaf in trees.flatten(full_size).items():
        spec = parameter_spec(name, leaf.shape, sizes(**axes))
        cuts = [int(np.prod([axes[axis] for axis in sharding.axes_of(cut)], dtype=np.int64)) for cut in spec]
        ways = int(np.prod(cuts, dtype=np.int64))
        assert not any(leaf.shape[at] % parts for at, parts in enumerate(cuts)), name
        cut, total = cut + leaf.size / ways, total + leaf.size
    # a device holds its share, and little more
    assert cut < 1.1 * total / (axes.get("fsdp", 1)) and cut < 1.3 * total / (
        axes.get("fsdp", 1) * axes.get("tensor", 1)
    )


def test_a_large_tensor_that_would_be_copied_is_named(full_size):
    with pytest.raises(
        ValueError, match=r"of shape .* would be copied to every device.*set config.mesh.fsdp to a divisor"
    ):
        check_rules(full_size, sizes(fsdp=7))
    check_rules(full_size, sizes(data=64))  # nothing is to be cut


def test_rules_that_match_nothing_and_parameters_without_a_rule_are_named():
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    with pytest.raises(ValueError, match=r"'\.\*/router/kernel' matches nothing"):
        check_rules(tree, mesh(), ((r".*/router/kernel", ()), (r".*", ())))
    with pytest.raises(ValueError, match=r"'\.\*/kernel' matches nothing"):  # only the first match counts
        check_rules(tree, mesh(), ((r".*", ()), (r".*/kernel", ())))
    with pytest.raises(ValueError, match="no sharding rule matches the parameter 'a/kernel'"):
        check_rules(tree, mesh(), ((r".*/bias", ()),))


def test_every_device_holds_its_share():
    tree = {"up": {"kernel": jnp.arange(512 * 256, dtype=jnp.float32).reshape(512, 256)}, "bias": jnp.zeros(3)}
    placed = sharding.shard_tree({"mlp": tree}, mesh())["mlp"]
    assert {shard.data.shape for shard in placed["up"]["kernel"].addressable_shards} == {(256, 128)}
    assert {shard.data.shape for shard in placed["bias"].addressable_shards} == {(3,)}
    np.testing.assert_array_equal(placed["up"]["kernel"], tree["up"]["kernel"])
    made = sharding.make_on(mesh(), lambda t: {"mlp": jax.tree.map(jnp.copy, t)}, placed)["mlp"]
    assert made["up"]["kernel"].sharding == placed["up"]["kernel"].sharding
    np.testing.assert_array_equal(sharding.host_values(made)["up"]["kernel"], tree["up"]["kernel"])


def test_batches_are_cut_over_data_and_fsdp():
    rows = np.arange(8, dtype=np.int32)
    placed = sharding.shard_batch({"sample_id": rows}, mesh())["sample_id"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed, rows)
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 4 devices"):
        sharding.shard_batch({"sample_id": rows[:6]}, mesh())


def on_processes(owners, data, fsdp, tensor):
    """A mesh whose devices belong to the given processes."""
    devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners], object).reshape(
        data, fsdp, tensor
    )
    return types.SimpleNamespace(devices=devices, shape={"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    "owners, axes, slices",
    [
        ((0, 0, 1, 1), (4, 1, 1), [(0, 2), (1, 2)]),
        ((0, 0, 1, 1), (1, 2, 2), [(0, 2), (1, 2)]),
        # the tensor axis spans processes, which then feed the same rows
        ((0, 1, 2, 3), (2, 1, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((0, 0, 1, 1), (1, 1, 4), [(0, 1), (0, 1)]),
        # the rows of a process are not neighbours, as on a grid of TPUs
        ((0, 1, 0, 1), (4, 1, 1), [(0, 2), (1, 2)]),
    ],
)
def test_each_process_feeds_the_rows_of_its_devices(owners, axes, slices):
    found = [sharding.batch_slice(on_processes(owners, *axes), process) for process in sorted(set(owners))]
    assert found == slices


def test_processes_that_share_some_rows_are_refused():
    with pytest.raises(ValueError, match="choose config.mesh.tensor"):
        sharding.batch_slice(on_processes((0, 0, 0, 1, 1, 1), 3, 1, 2), 0)


def grid(kind, sides, host, slices=1):
    """TPUs that are not there: `host` gives the chips of a process along each axis."""
    found = []
    for number in range(slices):
        for at in np.ndindex(sides[::-1]):
            place = (*at[::-1], 0, 0)[:3]
            block = [side // own for side, own in zip(place, host)]
            chip = types.SimpleNamespace(platform="tpu", device_kind=kind, coords=place, core_on_chip=0)
            chip.process_index = int(np.ravel_multi_index((number, *block), (slices, 16, 16, 16)))
            chip.slice_index, chip.id = number, len(found)
            found.append(chip)
    return found


def near(one, other):
    """Whether two chips are neighbours in a grid without rings."""
    return one.slice_index == other.slice_index and sum(abs(a - b) for a, b in zip(one.coords, other.coords)) == 1


def connected(chips):
    """Whether chips reach each other over links among themselves."""
    reached, rest = [chips[0]], list(chips[1:])
    for chip in reached:
        reached += [other for other in rest if near(chip, other)]
        rest = [other for other in rest if other not in reached]
    return not rest


@pytest.mark.parametrize(
    "kind, sides, sizes",
    [
        ("TPU v5 lite", (16, 16), (4, 64, 1)),
        ("TPU v6 lite", (8, 8), (1, 16, 4)),
        ("TPU v6 lite", (8, 8), (2, 8, 4)),
        ("TPU v5", (4, 4, 4), (1, 64, 1)),
        ("TPU v5", (4, 4, 8), (2, 32, 2)),
    ],
)
def test_devices_along_the_innermost_axis_reach_each_other_over_their_own_links(kind, sides, sizes):
    chips = grid(kind, sides, (2, 2, 1))
    placed = sharding._placed(list(sizes), chips)
    assert placed.shape == sizes and {chip.id for chip in placed.flat} == set(range(len(chips)))
    # the innermost axis, over which most is moved; the others get what is left of the grid
    axis = 2 if sizes[2] > 1 else 1
    for group in np.moveaxis(placed, axis, -1).reshape(-1, sizes[axis]):
        assert connected(list(group)), [chip.coords for chip in group]
    # and every process has its own part of the rows
    mesh = types.SimpleNamespace(devices=placed, shape=dict(zip(sharding.AXES, sizes)))
    parts = {chip.process_index: sharding.batch_slice(mesh, chip.process_index) for chip in chips}
    assert {index for index, _ in parts.values()} == set(range(next(iter(parts.values()))[1]))


def test_slices_divide_data_or_else_fsdp():
    chips = grid("TPU v5 lite", (4, 4), (2, 2, 1), slices=2)
    over_data = sharding._placed([2, 16, 1], chips)
    assert [{chip.slice_index for chip in row.flat} for row in over_data] == [{0}, {1}]
    over_fsdp = sharding._placed([1, 32, 1], chips)
    assert [chip.slice_index for chip in over_fsdp.flat] == [0] * 16 + [1] * 16
    both = sharding._placed([2, 32, 1], grid("TPU v5 lite", (4, 4), (2, 2, 1), slices=4))
    assert [{chip.slice_index for chip in row.flat} for row in both] == [{0, 1}, {2, 3}]
    with pytest.raises(ValueError, match="over 2 slices; make config.mesh.data"):
        sharding._placed([1, 1, 32], chips)


@pytest.mark.parametrize(
    "data, fsdp, slices, expected",
    [
        (4, 64, 2, (2, 1)),
        (2, 64, 4, (2, 2)),
        (1, 64, 4, (1, 4)),
        (4, 63, 6, None),
        (4, 6, 6, None),  # rows of a slice would not be consecutive
        (1, 1, 1, (1, 1)),
    ],
)
def test_data_goes_over_slices_first(data, fsdp, slices, expected):
    assert sharding.slices_of(data, fsdp, slices) == expected


def test_a_part_of_a_slice_and_other_devices_lie_in_the_order_of_processes():
    some = [chip for chip in grid("TPU v5 lite", (4, 4), (2, 2, 1)) if chip.id in (0, 1, 5, 7)]
    assert [chip.id for chip in sharding._placed([1, 4, 1], some).flat] == [0, 1, 5, 7]
    placed = mesh().devices
    assert placed.shape == (2, 2, 2) and [device.id for device in placed.flat] == list(range(8))
    cards = [types.SimpleNamespace(platform="gpu", process_index=at // 2, id=7 - at) for at in range(8)]
    assert [card.id for card in sharding._placed([1, 8, 1], cards).flat] == [6, 7, 4, 5, 2, 3, 0, 1]


def test_rows_that_every_process_has_lie_in_their_order_on_any_mesh():
    shuffled = jax.sharding.Mesh(np.array(jax.devices()[:8])[[3, 1, 4, 0, 5, 2, 6, 7]].reshape(2, 4, 1), sharding.AXES)
    rows = {"x": np.arange(16.0).reshape(16, 1), "y": np.arange(8)}
    placed = sharding.shard_rows(rows, shuffled)
    jax.tree.map(np.testing.assert_array_equal, placed, rows)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 1)}


SCATTERED = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from uae_jax import sharding
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = Mesh(np.array(jax.devices())[[0, 2, 1, 3]].reshape(1, 4, 1), sharding.AXES)
index, count = sharding.batch_slice(mesh)
own = sharding.shard_batch({"x": 10 * index + np.arange(4)}, mesh)["x"]
both = sharding.shard_rows({"x": np.arange(8)}, mesh)["x"]
print(index, count, sharding.host_values(own).tolist(), sharding.host_values(both).tolist())
"""


def test_two_processes_with_scattered_rows_place_what_they_loaded(tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    root = str(pathlib.Path(__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))} | {
        "PYTHONPATH": root,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCATTERED, coordinator, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for index, (output, errors) in enumerate(said):
        # rows 0, 1 and 4, 5 lie on the first process: its part of four rows, in order
        expected = f"{index} 2 [0, 1, 10, 11, 2, 3, 12, 13] [0, 1, 2, 3, 4, 5, 6, 7]\n"
        assert output.endswith(expected), errors[-2000:]


def test_activations_are_placed_by_name_where_a_mesh_is_in_use():
    def double(x):
        return constrain(2 * x, "batch", None, "heads")

    x = jnp.arange(8 * 3 * 4, dtype=jnp.float32).reshape(8, 3, 4)
    here = jax.device_put(x, NamedSharding(mesh(), PartitionSpec()))
    assert jax.jit(double)(here).sharding.is_fully_replicated
    for use in (sharding.in_use, jax.set_mesh):
        with use(mesh()):
            y = jax.jit(double)(here)
        assert y.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
        np.testing.assert_array_equal(y, 2 * x)
    with sharding.in_use(mesh()), pytest.raises(KeyError):
        jax.jit(lambda x: constrain(x, "rows"))(here)
    with sharding.in_use(mesh()):  # seven rows do not divide; the compiler decides
        np.testing.assert_array_equal(jax.jit(lambda x: constrain(x, "batch"))(here[:7]), x[:7])


def test_weights_can_be_gathered_over_fsdp_and_stay_cut_over_tensor():
    tree = sharding.shard_tree({"up": {"kernel": jnp.ones((512, 256))}, "norm": {"scale": jnp.ones(256)}}, mesh())
    with sharding.in_use(mesh()):
        gathered = jax.jit(lambda t: sharding.gather_over_fsdp(t, jnp.bfloat16))(tree)
    assert (
        gathered["up"]["kernel"].sharding.spec == PartitionSpec(None, "tensor")
        and gathered["up"]["kernel"].dtype == jnp.bfloat16
    )
    assert gathered["norm"]["scale"].dtype == jnp.float32
    assert sharding.gather_over_fsdp(tree, jnp.bfloat16) is tree


def test_a_step_gathers_the_frozen_transformer_at_its_beginning_where_the_settings_say_so():
    kernel = {"block": {"kernel": jnp.ones((512, 256), jnp.bfloat16)}}
    frozen = sharding.shard_tree({"transformer": kernel, "language": {"layer": kernel}}, mesh())
    for stage in ("gen_for_und", "und_for_gen"):
        for gather in (False, True):
            method = make_method(stage, STAGES[stage].settings(gather_decoder=gather), SamplerConfig(), None)
            with sharding.in_use(mesh()):
                found = jax.jit(method.prepared)(frozen)
            cut = frozen["transformer"]["block"]["kernel"].sharding.spec
            kept = found["transformer"]["block"]["kernel"].sharding.spec
            assert "fsdp" in cut and ("fsdp" in kept) == (not gather)
            assert found["language"]["layer"]["block"]["kernel"].sharding.spec == cut
            assert found["transformer"]["block"]["kernel"].dtype == jnp.bfloat16
