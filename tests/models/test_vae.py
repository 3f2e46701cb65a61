"""The auto-encoder against diffusers, its scale, its chunked decoding and its file layout."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from programs import on_devices

from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.autoencoder.blocks import sample_latents
from uae_jax.models.sd3 import vae
from uae_jax.models.sd3.config import VAEConfig
from uae_jax.models.sd3.weights import load_vae, vae_rules
from uae_jax.nn import device
from uae_jax.nn.cpu.images import interleaved

SIZES = {
    "two_levels": dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4),
    "three_levels_no_attention": dict(
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=16,
        mid_block_add_attention=False,
    ),
    "four_levels": dict(block_out_channels=(8, 16, 16, 24), layers_per_block=2, norm_num_groups=8, latent_channels=16),
}


def torch_vae(size: dict, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    levels = len(size["block_out_channels"])
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **size,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def relative_error(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    """A diffusers model, its folder, and the same model through our loader."""
    model = torch_vae(SIZES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder, *load_vae(folder)


def test_encode_equals_diffusers(pair):
    model, _, config, params = pair
    side = config.downsampling
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3 * side, 2 * side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model.encode(torch.tensor(pixels.transpose(0, 3, 1, 2))).latent_dist
    mean, log_variance = jax.jit(vae.encode, static_argnums=0)(config, params, pixels)
    assert relative_error(mean, channels_last(theirs.mean)) <= 1e-4
    assert relative_error(log_variance, channels_last(theirs.logvar)) <= 1e-4


def test_decode_equals_diffusers(pair):
    model, _, config, params = pair
    latents = np.random.default_rng(1).standard_normal((2, 3, 2, config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        theirs = model.decode(torch.tensor(latents.transpose(0, 3, 1, 2) / 1.5305 + 0.0609)).sample
    ours = jax.jit(vae.decode_latents, static_argnums=0)(config, params, latents)
    assert relative_error(ours, channels_last(theirs)) <= 1e-4


def test_export_writes_the_published_files(pair, tmp_path):
    model, folder, config, params = pair
    written = dict(published_tensors(params, vae_rules(config)))
    stored = TensorFolder(folder)
    assert set(written) == stored.names()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, stored.read(name))
    write_tensors(tmp_path, written, stem="diffusion_pytorch_model")
    (tmp_path / "config.json").write_text(json.dumps(config.published()))
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert VAEConfig.from_folder(tmp_path) == config


def small() -> tuple[VAEConfig, dict]:
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    return config, jax.jit(vae.init_params, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.slow
def test_chunked_decoding_equals_decoding_at_once_with_its_gradient():
    config, params = small()
    latents = jax.random.normal(jax.random.key(1), (6, 2, 2, 16))

    def energy(latents, chunk):
        pixels = vae.decode_latents(config, params, latents, chunk)
        return jnp.sum(jnp.square(pixels)), pixels

    results = [jax.value_and_grad(energy, has_aux=True)(latents, chunk) for chunk in (None, 2)]
    for whole, parts in zip(*(jax.tree.leaves(result) for result in results)):
        np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="chunks of 4"):
        vae.decode_latents(config, params, latents, 4)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_interleaved_pictures_are_decoded_as_they_are_alone(size):
    config = VAEConfig(**SIZES[size])
    params = jax.jit(vae.init_params, static_argnums=0)(config, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    latents = jax.random.normal(jax.random.key(2), (6, 3, 2, config.latent_channels))
    latents = latents * jnp.arange(1, 7)[:, None, None, None]  # no two pictures share statistics

    def outcome(decode):
        def energy(latents):
            pixels = decode(latents)
            return jnp.sum(jnp.square(pixels)), pixels

        return jax.jit(jax.value_and_grad(energy, has_aux=True))(latents)

    def in_parts(latents, chunk):
        return vae.decode_latents(config, params, vae.to_model_latents(config, params, latents), chunk)

    alone = outcome(lambda latents: vae.decode(config, params, latents))
    with on_devices(1):
        assert device.on_one_cpu()
        others = [outcome(functools.partial(in_parts, chunk=chunk)) for chunk in (1, 3, 6)]
        others.append(outcome(lambda latents: vae.decode(config, params, latents)))
    for other in others:
        for expected, found in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
            assert relative_error(found, expected) <= 1e-4


@pytest.mark.slow
def test_only_a_single_cpu_interleaves(monkeypatch):
    config, params = small()
    latents, seen = jnp.zeros((4, 2, 2, 16)), []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda *x: seen.append(interleaved()) or decode(*x))
    for devices, chunk in ((1, None), (1, 2), (8, None)):
        with on_devices(devices):
            vae.decode_latents(config, params, latents, chunk)
    assert seen == [4, 2, 1] and interleaved() == 1


@pytest.mark.trap(30)
def test_model_latents_are_shifted_and_scaled_both_ways():
    latents = jax.random.normal(jax.random.key(0), (2, 3, 3, 16))
    scaled = vae.to_model_latents(VAEConfig(), {}, latents)
    np.testing.assert_allclose(scaled, (latents - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(vae.from_model_latents(VAEConfig(), scaled), latents, rtol=1e-5, atol=1e-6)


def test_sampled_latents_have_the_given_moments():
    mean, log_variance = jnp.full((4000,), 2.0), jnp.full((4000,), np.log(0.25))
    draws = sample_latents(jax.random.key(0), mean, log_variance)
    assert abs(float(draws.mean()) - 2.0) < 0.05 and abs(float(draws.std()) - 0.5) < 0.03


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_quant_conv", True),
        ("act_fn", "relu"),
        ("block_out_channels", [10]),
        ("up_block_types", ["AttnUpDecoderBlock2D"]),
        ("layers_per_block", 0),
    ],
)
def test_unsupported_config_is_refused_by_name(tmp_path, field, value):
    config = VAEConfig(block_out_channels=(32,)).published()
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=field):
        VAEConfig.from_folder(tmp_path)


def test_a_picture_that_does_not_divide_is_refused():
    config, params = small()
    with pytest.raises(ValueError, match="multiples of 2"):
        vae.encode(config, params, jnp.zeros((1, 5, 4, 3)))


def test_config_is_hashable():
    assert hash(VAEConfig()) == hash(dataclasses.replace(VAEConfig()))
