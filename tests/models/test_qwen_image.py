"""Qwen-Image against diffusers and transformers, on random weights in float32, read by our own loader."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_pieces import drawn, encoded, first, last, near, read, rows, velocity, with_leaf
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from qwen_image_pieces import SCHEDULER, write_pipeline
from qwen_words import TEXT, make_tokenizer

from uae_jax import trees
from uae_jax.hf.rules import Rule
from uae_jax.models.qwen_image import decoder as qwen_image
from uae_jax.models.qwen_image import transformer
from uae_jax.nn.lora import init_lora
from uae_jax.stages import decoders

TEXTS = [*TEXT, "open", " "]
SIZES = ((4, 8), (6, 2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, captioner = tmp_path_factory.mktemp("qwen_image"), make_tokenizer()
    pipeline = write_pipeline(folder, make_tokenizer(), seed=3)
    captioner.split_special_tokens = True
    return read(folder, captioner, pipeline)


@pytest.fixture(scope="module")
def contexts(pair):
    ours = encoded(pair, *rows(pair, TEXTS))
    with torch.no_grad():
        theirs, mask = pair.pipeline.encode_prompt(list(TEXTS))
    return ours, (theirs, mask)


@pytest.mark.trap(61)
def test_states_are_those_of_the_pipeline(contexts):
    (states, mask), (theirs, theirs_mask) = contexts
    np.testing.assert_array_equal(mask, theirs_mask.bool().numpy())
    near(jnp.where(mask[..., None], states, 0), theirs)


@pytest.mark.trap(60)
def test_dropped_tokens_still_count_in_the_encoder(pair, contexts):
    """They are dropped after encoding: another prefix changes the states behind it."""
    tokens, lengths = rows(pair, TEXTS)
    ids, mask = pair.decoder.prompt(tokens, lengths)
    other = pair.decoder.states(pair.parts, ids.at[:, 3].add(1), mask)
    assert float(jnp.abs(other - contexts[0][0])[np.asarray(contexts[0][1])].max()) > 1e-3


@pytest.mark.trap(65)
@pytest.mark.parametrize("size", SIZES)
def test_one_velocity_of_several_captions_and_noise_levels(pair, contexts, size):
    (states, mask), (theirs, theirs_mask) = contexts
    latents = np.random.default_rng(0).standard_normal((len(TEXTS), *size, 4)).astype(np.float32)
    sigma = np.linspace(0.05, 1, len(TEXTS)).astype(np.float32)
    ours = velocity(pair, latents, sigma, (states, mask))
    assert ours.dtype == jnp.float32
    packed = pair.pipeline._pack_latents(last(latents), len(TEXTS), 4, *size)
    with torch.no_grad():
        found = pair.pipeline.transformer(
            hidden_states=packed,
            timestep=torch.tensor(sigma),
            encoder_hidden_states=theirs,
            encoder_hidden_states_mask=theirs_mask,
            img_shapes=[[(1, size[0] // 2, size[1] // 2)]] * len(TEXTS),
        ).sample
    near(transformer.patchify(ours), found)


@pytest.mark.trap(65)
def test_the_content_and_width_of_padding_do_not_matter(pair, contexts):
    (states, mask), _ = contexts
    latents, sigma = jnp.ones((len(TEXTS), 4, 4, 4)), jnp.full(len(TEXTS), 0.4)
    ours = velocity(pair, latents, sigma, (states, mask))
    other = jnp.pad(jnp.where(mask[..., None], states, 7.0), ((0, 0), (0, 5), (0, 0)), constant_values=3.0)
    again = velocity(pair, latents, sigma, (other, jnp.pad(mask, ((0, 0), (0, 5)))))
    near(again, ours, 1e-5)


@pytest.mark.trap(67)
@pytest.mark.parametrize("steps, height, width", [(10, 512, 512), (50, 1024, 768), (2, 256, 256)])
def test_noise_levels_are_the_pipelines_to_the_last_digit(steps, height, width):
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    mu = calculate_shift((height // 16) * (width // 16), 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    found = qwen_image.QwenImageDecoder.sigmas(
        types.SimpleNamespace(cell=16, shift=qwen_image.Shift()), steps, height, width, 3.0
    )
    np.testing.assert_array_equal(found, scheduler.sigmas.numpy())


@pytest.mark.trap(67)
def test_the_published_levels_of_ten_steps():
    decoder = types.SimpleNamespace(cell=16, shift=qwen_image.Shift())
    levels = qwen_image.QwenImageDecoder.sigmas(decoder, 10, 512, 512, 3.0)
    np.testing.assert_allclose(levels[[0, 1, 2, -3, -2, -1]], [1, 0.929, 0.8515, 0.1833, 0.02, 0], atol=5e-4)


@pytest.mark.trap(66)
def test_guided_latents_after_all_steps(pair):
    """With the published guidance: each patch has the length of the caption's velocity."""
    texts, (height, width) = list(TEXT[:2]), (32, 48)
    shape = pair.decoder.latent_shape(height, width)
    noise = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    packed = pair.pipeline._pack_latents(last(noise), 2, 4, *shape[:2])
    options = dict(height=height, width=width, num_inference_steps=5, true_cfg_scale=4.0, output_type="latent")
    with torch.no_grad():
        theirs = pair.pipeline(texts, negative_prompt=[" "] * 2, latents=packed, **options).images
    template = pair.decoder.template
    positive = encoded(pair, *rows(pair, texts))
    tokens = np.zeros((1, rows(pair, texts)[0].shape[1]), np.int32)
    tokens[0, : len(template.negative)] = template.negative
    negative = encoded(pair, jnp.asarray(tokens), jnp.array([len(template.negative)]))

    ours = drawn(pair, noise, pair.decoder.sigmas(5, height, width, 1.0), positive, negative, 4.0)
    near(transformer.patchify(ours), theirs)


@pytest.mark.trap(66)
def test_guidance_of_one_is_the_captions_velocity(pair):
    v = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 4)), jnp.float32)
    np.testing.assert_allclose(pair.decoder.guide(v, -v, 1.0), v, rtol=1e-6)
    guided = pair.decoder.guide(v, jnp.ones_like(v), 4.0)
    lengths = [jnp.linalg.norm(transformer.patchify(x), axis=-1) for x in (v, guided)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    whole = jnp.linalg.norm(v, axis=-1), jnp.linalg.norm(guided, axis=-1)
    assert not np.allclose(*whole, rtol=1e-2)  # of a patch, not of each latent


@pytest.mark.trap(68)
def test_decoded_images_and_encoded_means(pair):
    pixels, network = np.random.default_rng(2).uniform(-1, 1, (2, 32, 16, 3)).astype(np.float32), pair.pipeline.vae
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (network.config.latents_mean, network.config.latents_std)
    )
    with torch.no_grad():
        found = network.encode(last(pixels)[:, :, None]).latent_dist.mode()[:, :, 0]
        drawn = network._decode(found[:, :, None]).sample[:, :, 0]
    ours = pair.decoder.to_model_latents(pair.parts, pair.decoder.encode_images(pair.parts, jnp.asarray(pixels))[0])
    near(ours, first((found - mean) / std))
    images = pair.decoder.decode(pair.parts, ours)
    near(jnp.clip(images, -1, 1), first(drawn.clamp(-1, 1)))
    bias = pair.parts["vae"]["decoder"]["conv_out"]["bias"]
    brighter = {"vae": with_leaf(pair.parts["vae"], "decoder/conv_out/bias", bias + 2)}
    near(pair.decoder.decode(brighter, ours), images + 2)  # theirs are clamped, ours must not be


@pytest.mark.trap(68)
def test_only_the_last_frame_of_a_kernel_counts(pair, tmp_path):
    """Garbage in all other time slices, and in the convolutions over time, changes nothing."""
    state, seen = pair.pipeline.vae.state_dict(), 0
    before = {name: leaf.clone() for name, leaf in state.items()}
    with torch.no_grad():
        for name, leaf in state.items():
            if "time_conv" in name:
                leaf.fill_(9.0)
            elif leaf.ndim == 5 and leaf.shape[2] == 3:
                leaf[:, :, :2] = 9.0
                seen += 1
    pair.pipeline.save_pretrained(tmp_path)
    pair.pipeline.vae.load_state_dict(before)
    again = decoders.load_parts(tmp_path, lambda part: None, {}, ("vae",))["vae"]
    jax.tree.map(np.testing.assert_array_equal, again, pair.parts["vae"])
    assert seen > 10


def test_a_kernel_is_written_back_with_zeros_before_its_last_frame():
    rule = Rule("conv/kernel", "conv.weight", "last_frame", torch_shape=(4, 3, 3, 3, 3))
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 4)).astype(np.float32)
    whole = rule.to_theirs(kernel)
    assert whole.shape == rule.torch_shape and not whole[:, :, :2].any()
    np.testing.assert_array_equal(rule.to_ours(whole), kernel)


@pytest.mark.trap(69)
def test_patches_have_their_channels_first(pair):
    labelled = np.arange(1 * 4 * 6 * 4.0).reshape(1, 4, 6, 4)
    ours = transformer.patchify(jnp.asarray(labelled))
    np.testing.assert_array_equal(ours, pair.pipeline._pack_latents(last(labelled), 1, 4, 4, 6).numpy())
    np.testing.assert_array_equal(transformer.unpatchify(ours, 4, 6), labelled)


@pytest.mark.trap(70)
def test_a_new_adapter_reaches_every_attention_and_the_last_texts_get_no_gradient(pair, contexts):
    base, decoder = pair.parts["transformer"], pair.decoder
    adapter = init_lora(jax.random.key(0), base, decoder.lora_targets, 2)
    names = {name.removeprefix("blocks/attention/") for name in trees.flatten(adapter)}
    sides = [f"{side}{name}" for side in ("", "context_") for name in ("query", "key", "value", "output")]
    assert names == {f"{module}/{leaf}" for module in sides for leaf in "ab"}
    latents = jnp.asarray(np.random.default_rng(1).standard_normal((len(TEXTS), 4, 4, 4)), jnp.float32)

    def loss(adapter):
        adapted = types.SimpleNamespace(decoder=decoder, parts={"transformer": base, "transformer_lora": adapter})
        return jnp.sum(velocity(adapted, latents, jnp.full(len(TEXTS), 0.5), contexts[0]) ** 2)

    found = jax.grad(loss)(adapter)["blocks"]["attention"]
    dead = {name for name in found if not np.asarray(found[name]["b"])[-1].any()}
    assert dead == {"context_query", "context_output"}
    assert all(np.asarray(found[name]["b"])[0].any() for name in found)
