"""Where parameters and batches lie on a mesh, by rule and by what each device holds."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding, trees
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
        # first matrix of a pair along its output, second along its input, fsdp on what is left
        ("language/layers/attention/query/kernel", (4, 256, 512), (None, "fsdp", "tensor")),
        ("language/layers/mlp/down/kernel", (4, 512, 256), (None, "tensor", "fsdp")),
        ("transformer/blocks_0/attention/context_output/kernel", (2, 256, 256), (None, "tensor", "fsdp")),
        ("language/embedding/table", (1024, 256), ("tensor", "fsdp")),
        ("transformer/pos_embed/table", (1, 1024, 256), (None, None, "fsdp")),
        ("vae/decoder/conv_in/kernel", (3, 3, 16, 512), (None, None, None, "fsdp")),
        # a dimension that does not divide is left alone; fsdp then goes to the widest that does
        ("language/layers/attention/key/kernel", (4, 512, 255), (None, "fsdp", None)),
        ("language/layers/attention/key/kernel", (4, 511, 256), ("fsdp", None, "tensor")),
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
        ways = int(np.prod([axes[axis] for axis in spec if axis], dtype=np.int64))
        assert all(leaf.shape[at] % axes[axis] == 0 for at, axis in enumerate(spec) if axis), name
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
    ],
)
def test_each_process_feeds_the_rows_of_its_devices(owners, axes, slices):
    found = [sharding.batch_slice(on_processes(owners, *axes), process) for process in sorted(set(owners))]
    assert found == slices


def test_a_process_whose_rows_are_scattered_is_refused():
    with pytest.raises(ValueError, match="choose config.mesh.tensor"):
        sharding.batch_slice(on_processes((0, 1, 0, 1), 4, 1, 1), 0)


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
