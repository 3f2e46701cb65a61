"""The diffusion transformer against diffusers, its padding, initialisation and file layout."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from uae_jax import trees
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.sd3 import transformer as sd3
from uae_jax.models.sd3.config import TransformerConfig
from uae_jax.models.sd3.weights import load_transformer, transformer_rules
from uae_jax.nn.attention.entry import MULTIPLES

BASE = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=6,
    dual_attention_layers=(),
    qk_norm="rms_norm",
)
SIZES = {
    "plain": BASE,
    "dual_in_two_runs": {**BASE, "num_layers": 5, "dual_attention_layers": (0, 1, 3)},
    "dual_last_block": {**BASE, "num_layers": 2, "dual_attention_layers": (1,)},
    "without_qk_norm": {**BASE, "qk_norm": None, "sample_size": 6},
    "patch_of_one": {**BASE, "patch_size": 1, "pos_embed_max_size": 9, "num_layers": 1},
}


def torch_transformer(size: dict) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(config: TransformerConfig, rows: int = 4, columns: int = 6, tokens: int = 5) -> tuple:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return (
        normal(2, rows, columns, config.in_channels),
        np.array([873.25, 3.0], np.float32),
        normal(2, tokens, config.joint_attention_dim),
        normal(2, config.pooled_projection_dim),
    )


def torch_velocity(model, latents, timestep, context, pooled) -> np.ndarray:
    with torch.no_grad():
        velocity = model(
            hidden_states=torch.tensor(latents.transpose(0, 3, 1, 2)),
            timestep=torch.tensor(timestep),
            encoder_hidden_states=torch.tensor(context),
            pooled_projections=torch.tensor(pooled),
        ).sample
    return velocity.numpy().transpose(0, 2, 3, 1)


def relative_error(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours, np.float32) - theirs)) / np.max(np.abs(theirs)))


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    """A diffusers model, its folder, and the same model through our loader."""
    model = torch_transformer(SIZES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder, *load_transformer(folder)


@pytest.fixture(scope="module")
def random_model():
    """A small model with random values everywhere: a scan of two dual blocks and the last block."""
    config = TransformerConfig(**{k: v for k, v in BASE.items() if k != "caption_projection_dim"})
    config = dataclasses.replace(config, dual_attention_layers=(0, 1))
    shapes, rng = trees.flatten(sd3.abstract_params(config)), np.random.default_rng(0)
    return config, trees.unflatten(
        {name: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) for name, leaf in shapes.items()}
    )


@functools.partial(jax.jit, static_argnums=0)
def velocity(config, params, *arguments):
    return sd3.Transformer(config).apply({"params": params}, *arguments)


@functools.partial(jax.jit, static_argnums=0)
def energy_gradient(config, params, *arguments):
    return jax.grad(lambda params: jnp.sum(jnp.square(velocity(config, params, *arguments))))(params)


def test_velocity_equals_diffusers(pair):
    model, _, config, params = pair
    arguments = inputs(config)
    assert relative_error(velocity(config, params, *arguments), torch_velocity(model, *arguments)) <= 1e-4


def test_export_writes_the_published_files(pair, tmp_path):
    model, folder, config, params = pair
    written = dict(published_tensors(params, transformer_rules(config)))
    stored = TensorFolder(folder)
    assert set(written) == stored.names()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, stored.read(name))
    write_tensors(tmp_path, written, stem="diffusion_pytorch_model")
    (tmp_path / "config.json").write_text(json.dumps(config.published()))
    again = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert TransformerConfig.from_folder(tmp_path) == config


def test_position_table_equals_diffusers(pair):
    model, _, config, _ = pair
    np.testing.assert_allclose(sd3.position_table(config), model.pos_embed.pos_embed.numpy(), rtol=0, atol=1e-7)


@pytest.mark.trap(26)
def test_masked_padding_equals_exact_length(random_model):
    config, params = random_model
    latents, timestep, context, pooled = inputs(config)
    padded = np.concatenate([context, np.full((2, 3, context.shape[-1]), 7.0, np.float32)], axis=1)
    mask = np.arange(8) < np.array([[5], [4]])
    both = velocity(config, params, latents, timestep, padded, pooled, mask)
    exact = velocity(config, params, latents, timestep, context, pooled)
    shorter = velocity(config, params, latents, timestep, context[:, :4], pooled)
    np.testing.assert_allclose(both[0], exact[0], atol=1e-5)
    np.testing.assert_allclose(both[1], shorter[1], atol=1e-5)
    # without a mask padding changes the image, as in the official code
    assert relative_error(velocity(config, params, latents, timestep, padded, pooled), np.asarray(exact)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_the_length_that_a_device_prefers_changes_neither_velocity_nor_gradient(random_model, masked, monkeypatch):
    config, params = random_model
    # 6 image and 5 context tokens, and 16 where lengths are multiples of 16
    given = tuple(map(jnp.asarray, inputs(config)))
    mask = jnp.arange(5) < jnp.array([[5], [3]]) if masked else None

    def outcome():
        def energy(params, context):
            found = sd3.Transformer(config).apply({"params": params}, *given[:2], context, given[3], mask)
            return jnp.sum(found**2), found

        # a function of its own each time: what was traced for the other length is not used again
        return jax.jit(lambda *x: jax.grad(energy, argnums=(0, 1), has_aux=True)(*x))(params, given[2])

    exact = outcome()
    monkeypatch.setitem(MULTIPLES, "cpu", 16)
    padded, kept = sd3.padded_context(jnp.asarray(given[2]), mask, 6)
    assert padded.shape[1] == 10 and kept.valid.shape == (2, 16) and kept.valid.sum() == (20 if masked else 22)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max())), outcome(), exact)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(random_model):
    config, params = random_model
    plain = trees.flatten(energy_gradient(config, params, *inputs(config)))
    # the last block's context is read but not updated: its queries reach nothing, and neither does the buffer
    idle = {name for name in plain if name.startswith("last_block/attention/context_query")} | {sd3.BUFFERS}
    assert {name for name, leaf in plain.items() if not np.any(leaf)} == idle
    for remat in ("full", "dots"):
        again = trees.flatten(energy_gradient(dataclasses.replace(config, remat=remat), params, *inputs(config)))
        for name, leaf in plain.items():
            np.testing.assert_allclose(again[name], leaf, rtol=1e-4, atol=1e-4 * float(np.max(np.abs(leaf))))


def test_bfloat16_is_near_float32_and_returns_float32(random_model):
    config, params = random_model
    arguments = inputs(config)
    exact = np.asarray(velocity(config, params, *arguments))
    rough = velocity(dataclasses.replace(config, dtype="bfloat16"), params, *arguments)
    assert rough.dtype == jnp.float32
    assert 1e-6 < relative_error(rough, exact) < 0.1


def test_initial_velocity_is_zero_and_initialisation_is_reproducible():
    config = TransformerConfig(**{k: v for k, v in BASE.items() if k != "caption_projection_dim"})
    config = dataclasses.replace(config, dual_attention_layers=(0, 1))
    initialise = jax.jit(sd3.init_params, static_argnums=0)
    params = initialise(config, jax.random.key(3))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, sd3.abstract_params(config)
    )
    assert not np.any(velocity(config, params, *inputs(config)))
    for first, second in zip(jax.tree.leaves(params), jax.tree.leaves(initialise(config, jax.random.key(3)))):
        np.testing.assert_array_equal(first, second)
    layers = params["blocks_0"]["attention"]["query"]["kernel"]
    assert np.any(layers[0] != layers[1])


@pytest.mark.parametrize(
    "field, value",
    [
        ("qk_norm", "layer_norm"),
        ("caption_projection_dim", 8),
        ("dual_attention_layers", [5]),
        ("pos_embed_max_size", None),
    ],
)
def test_unsupported_config_is_refused_by_name(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, field: value}))
    with pytest.raises(ValueError, match=field):
        TransformerConfig.from_folder(tmp_path)


def test_latents_that_do_not_fit_are_refused(random_model):
    config, params = random_model
    with pytest.raises(ValueError, match="multiples of 2"):
        sd3.Transformer(config).apply({"params": params}, *map(jnp.asarray, inputs(config, rows=5)))
    with pytest.raises(ValueError, match="pos_embed_max_size is 6"):
        sd3.Transformer(config).apply({"params": params}, *map(jnp.asarray, inputs(config, rows=14)))
