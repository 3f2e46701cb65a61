"""FLUX.2-klein against diffusers and transformers, on random weights in float32, read by our own loader."""

import dataclasses
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_pieces import drawn, encoded, first, last, near, read, rows, velocity, with_leaf
from flux2_pieces import write_pipeline
from qwen_words import TEXT, THINKING, make_tokenizer

from uae_jax import trees
from uae_jax.models.flux2 import decoder as flux2
from uae_jax.models.flux2 import transformer, vae
from uae_jax.models.parts import EIGHT_BITS, SCALES, eight_bits
from uae_jax.stages import decoders

SIZES = ((4, 6), (3, 2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("klein"), make_tokenizer(*THINKING)
    pipeline = write_pipeline(folder, tokenizer, seed=3)
    captioner = make_tokenizer("<tool>", "</tool>")  # other control tokens, the same text
    captioner.split_special_tokens = True
    return read(folder, captioner, pipeline)


@pytest.fixture(scope="module")
def contexts(pair):
    """Ours and theirs of captions of several lengths, with those of the negative prompt."""
    texts = [*TEXT, "open", ""]
    tokens, lengths = rows(pair, texts)
    ids, mask = pair.decoder.prompt(tokens, lengths)
    states = jax.jit(lambda parts, ids, mask: pair.decoder.states(parts, ids, mask))(pair.parts, ids, mask)
    with torch.no_grad():
        theirs, _ = pair.pipeline.encode_prompt(texts, device="cpu")
    return types.SimpleNamespace(ids=ids, mask=mask, ours=states, theirs=theirs, texts=texts)


def test_sampled_ids_in_the_template_are_the_tokens_of_the_complete_text(pair, contexts):
    for row, mask, text in zip(np.asarray(contexts.ids), np.asarray(contexts.mask), contexts.texts):
        turn = [{"role": "user", "content": text}]
        whole = pair.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert row[mask].tolist() == pair.tokenizer(whole)["input_ids"]
        assert len(row) == flux2.LENGTH and set(row[~mask].tolist()) == {pair.tokenizer.pad_token_id}


def test_a_caption_that_is_too_long_is_cut_in_front_of_the_suffix(pair):
    tokens = jnp.full((1, flux2.LENGTH), 65, jnp.int32)
    ids, mask = pair.decoder.prompt(tokens, jnp.array([flux2.LENGTH]))
    template = pair.decoder.template
    assert bool(mask.all()) and tuple(np.asarray(ids)[0, -len(template.suffix) :]) == template.suffix
    assert (np.asarray(ids)[0, len(template.prefix) : -len(template.suffix)] == 65).all()


@pytest.mark.trap(61)
def test_states_are_those_of_the_pipeline_for_padding_too(contexts):
    near(contexts.ours, contexts.theirs)


@pytest.mark.trap(69)
@pytest.mark.parametrize("size", SIZES)
def test_one_velocity_of_several_captions_and_noise_levels(pair, contexts, size):
    rng = np.random.default_rng(0)
    count = len(contexts.texts)
    latents = rng.standard_normal((count, *size, pair.decoder.vae.channels)).astype(np.float32)
    sigma = np.linspace(0.05, 1, count).astype(np.float32)
    context = pair.decoder.context(pair.parts, jnp.asarray(contexts.theirs.numpy()), contexts.mask)
    ours = velocity(pair, latents, sigma, context)
    assert ours.dtype == jnp.float32
    image = last(latents)
    with torch.no_grad():
        theirs = pair.pipeline.transformer(
            hidden_states=pair.pipeline._pack_latents(image),
            encoder_hidden_states=contexts.theirs,
            timestep=torch.tensor(sigma),
            img_ids=pair.pipeline._prepare_latent_ids(image),
            txt_ids=pair.pipeline._prepare_text_ids(contexts.theirs),
        ).sample
    near(ours.reshape(count, -1, latents.shape[-1]), theirs)


@pytest.mark.trap(62)
def test_the_transformer_reads_the_padding(pair, contexts):
    """Whoever masks it, as SD3's, computes something else: black-forest-labs/flux2, issue 59."""
    latents, sigma = jnp.ones((5, 2, 2, 16)), jnp.full(5, 0.5)
    states, mask = pair.decoder.context(pair.parts, contexts.ours, contexts.mask)
    assert bool(mask.all()) and not bool(contexts.mask.all())
    whole = velocity(pair, latents, sigma, (states, mask))
    without = velocity(pair, latents, sigma, (states * contexts.mask[..., None], mask))
    assert float(jnp.abs(whole - without).max()) > 1e-3 * float(jnp.abs(whole).max())


@pytest.mark.trap(67)
@pytest.mark.parametrize("steps, height, width", [(4, 512, 512), (4, 1024, 768), (50, 1024, 1024), (1, 256, 256)])
def test_noise_levels_are_the_pipelines_to_the_last_digit(steps, height, width):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    mu = compute_empirical_mu((height // 16) * (width // 16), steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    decoder = types.SimpleNamespace(cell=16)
    np.testing.assert_array_equal(
        flux2.KleinDecoder.sigmas(decoder, steps, height, width, 3.0), scheduler.sigmas.numpy()
    )


@pytest.mark.trap(67)
def test_the_published_levels_of_four_steps():
    levels = flux2.KleinDecoder.sigmas(types.SimpleNamespace(cell=16), 4, 512, 512, 3.0)
    np.testing.assert_allclose(levels, [1, 0.9581, 0.8840, 0.7175, 0], atol=5e-5)


def test_guided_latents_after_all_steps(pair):
    """Of a whole call of the pipeline, with its own prompt, negative prompt, schedule and guidance."""
    texts, (height, width) = list(TEXT[:2]), (24, 16)
    rng = np.random.default_rng(1)
    shape = pair.decoder.latent_shape(height, width)
    noise = rng.standard_normal((2, *shape)).astype(np.float32)
    with torch.no_grad():
        theirs = pair.pipeline(
            prompt=texts,
            height=height,
            width=width,
            latents=last(noise),
            num_inference_steps=5,
            guidance_scale=4.0,
            output_type="latent",
        ).images
    tokens, lengths = rows(pair, texts)
    decoder, parts = pair.decoder, pair.parts

    positive, negative = encoded(pair, tokens, lengths), encoded(pair, jnp.zeros((1, 1), jnp.int32), jnp.array([0]))
    levels = pair.decoder.sigmas(5, height, width, 3.0)

    latents = drawn(pair, noise, levels, positive, negative, 4.0)
    near(vae.unpatchify(vae.from_model_latents(decoder.vae, parts["vae"], latents)), first(theirs))


def test_a_distilled_model_refuses_guidance(pair):
    distilled = dataclasses.replace(pair.decoder, distilled=True)
    v = jnp.ones((1, 2, 2, 16))
    with pytest.raises(ValueError, match="distilled and needs no guidance; set it to 1"):
        distilled.guide(v, v, 5.0)
    np.testing.assert_array_equal(pair.decoder.guide(v, 3 * v, 1.0), v)


@pytest.mark.trap(68)
def test_decoded_images_and_encoded_means(pair):
    rng = np.random.default_rng(2)
    pixels = rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    network = pair.pipeline.vae
    with torch.no_grad():
        found = network.encode(last(pixels)).latent_dist
        patches = pair.pipeline._patchify_latents(found.mode())
        theirs = (patches - network.bn.running_mean.view(1, -1, 1, 1)) / torch.sqrt(
            network.bn.running_var.view(1, -1, 1, 1) + network.config.batch_norm_eps
        )
        drawn_images = network.decode(found.mode()).sample
        log_variance = pair.pipeline._patchify_latents(found.logvar)
    mean, spread = pair.decoder.encode_images(pair.parts, jnp.asarray(pixels))
    ours = pair.decoder.to_model_latents(pair.parts, mean)
    near(ours, first(theirs))
    near(spread, first(log_variance))
    near(pair.decoder.decode(pair.parts, ours), first(drawn_images))
    near(pair.decoder.decode(pair.parts, ours, 1), first(drawn_images))
    bias = pair.parts["vae"]["decoder"]["conv_out"]["bias"]
    brighter = {"vae": with_leaf(pair.parts["vae"], "decoder/conv_out/bias", bias + 2)}
    near(pair.decoder.decode(brighter, ours), first(drawn_images) + 2)  # not clipped


@pytest.mark.trap(69)
def test_patches_have_their_channels_first(pair):
    labelled = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    theirs = pair.pipeline._patchify_latents(last(labelled))
    np.testing.assert_array_equal(vae.patchify(labelled), np.moveaxis(theirs.numpy(), 1, -1))
    np.testing.assert_array_equal(vae.unpatchify(vae.patchify(labelled)), labelled)


@pytest.mark.trap(68)
def test_statistics_of_the_batch_norm_count(pair):
    x = jnp.ones((1, 2, 2, 16))
    back = vae.from_model_latents(pair.decoder.vae, pair.parts["vae"], pair.decoder.to_model_latents(pair.parts, x))
    np.testing.assert_allclose(back, x, rtol=1e-5)
    assert float(jnp.abs(pair.decoder.to_model_latents(pair.parts, x) - x).max()) > 0.1


@pytest.mark.trap(70)
def test_a_new_adapter_reaches_every_attention(pair):
    from uae_jax.nn.lora import init_lora

    adapter = init_lora(jax.random.key(0), pair.parts["transformer"], pair.decoder.lora_targets, 2)
    modules = {name.rpartition("/")[0] for name in trees.flatten(adapter)}
    sides = [f"{side}{name}" for side in ("", "context_") for name in ("query", "key", "value", "output")]
    assert modules == {f"blocks/attention/{name}" for name in sides} | {
        "single_blocks/fused_in",
        "single_blocks/fused_out",
    }


@pytest.mark.trap(59)
def test_banned_ids_are_no_text(pair):
    banned = {index for start, end in pair.banned for index in range(start, min(end, 400))}
    vocabulary = pair.tokenizer.get_vocab()
    assert vocabulary["<|image_pad|>"] in banned and vocabulary["<think>"] in banned
    assert vocabulary["<|im_end|>"] not in banned and vocabulary["<|endoftext|>"] not in banned
    for text in TEXT:
        assert not banned & set(pair.tokenizer(text)["input_ids"])


@pytest.mark.trap(58)
@pytest.mark.parametrize("change, message", [("vocab", "another vocabulary"), ("merges", "other merges")])
def test_another_tokenizer_is_refused(pair, change, message):
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    if change == "vocab":
        names = list(content["model"]["vocab"])
        content["model"]["vocab"] |= {names[0]: 1, names[1]: 0}
    else:
        content["model"]["merges"] = content["model"]["merges"][::-1]
    other = types.SimpleNamespace(backend_tokenizer=types.SimpleNamespace(to_str=lambda: json.dumps(content)))
    decoders.check_vocabulary(make_tokenizer(), pair.tokenizer, pair.folder)
    with pytest.raises(ValueError, match=message):
        decoders.check_vocabulary(other, pair.tokenizer, pair.folder)


def test_the_parts_are_those_that_the_description_says(pair):
    shapes = jax.tree.map(lambda leaf: leaf.shape, pair.decoder.abstract_parts())
    assert jax.tree.map(lambda leaf: leaf.shape, pair.parts) == shapes
    assert set(pair.parts) == set(pair.decoder.parts)
    assert transformer.abstract_params(pair.decoder.transformer).keys() == pair.parts["transformer"].keys()


@pytest.mark.trap(59)
def test_ids_without_a_token_stay_finite(pair):
    control = pair.tokenizer.get_vocab()["<|image_pad|>"]
    tokens = jnp.array([[control, 10**6, 2**31 - 1, len(pair.tokenizer)]], jnp.int32)
    states, _ = encoded(pair, tokens, jnp.array([4]))
    assert bool(jnp.isfinite(states).all())


@pytest.mark.parametrize(
    "part, field, value, message",
    [
        ("text_encoder", "hidden_size", 16, "joint_attention_dim 24, not 48, three times the width of text_encoder"),
        ("vae", "latent_channels", 8, "in_channels 16, not 32, four times the latent_channels of vae"),
    ],
)
def test_parts_of_different_models_are_named(pair, tmp_path, part, field, value, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(pair.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    said = re.escape(f"{folder / 'transformer' / 'config.json'} has {message}; take all folders from one model")
    with pytest.raises(ValueError, match=said):
        decoders.describe(folder, make_tokenizer(), "", dtype="float32", remat="none", lora_alpha=1.0)


def test_kernels_of_eight_bits_draw_nearly_the_same(pair):
    parts = dict(pair.parts)
    eight_bits(parts)
    assert all(f"{name}{SCALES}" in parts for name in EIGHT_BITS)
    kernels = parts["transformer"]["blocks"]["attention"]
    assert kernels["query"]["kernel"].dtype == jnp.int8 and "kernel" not in kernels["query_norm"]
    decoder, rng = pair.decoder, np.random.default_rng(0)
    ids, mask = decoder.prompt(jnp.asarray([[65, 66, 67]]), jnp.array([3]))
    latents, sigma = jnp.asarray(rng.standard_normal((1, 4, 4, 16)), jnp.float32), jnp.array([0.5])

    @jax.jit
    def velocity(parts):
        context = decoder.context(parts, decoder.states(parts, ids, mask), mask)
        return decoder.velocity(parts, latents, sigma, context)

    exact, rounded = velocity(pair.parts), velocity(parts)
    gap = float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact))
    assert 1e-6 < gap < 0.05
