"""Z-Image against diffusers and transformers, on random weights in float32, read by our own loader."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_pieces import drawn, encoded, first, last, near, read, rows, velocity
from diffusers import FlowMatchEulerDiscreteScheduler
from qwen_words import TEXT, THINKING, make_tokenizer
from z_image_pieces import write_pipeline

from uae_jax import trees
from uae_jax.models.z_image import decoder as z_image
from uae_jax.models.z_image import transformer
from uae_jax.nn.lora import init_lora

TEXTS = [*TEXT, "open", ""]
# patches of 2 x 2 latents: a multiple of 32 tokens, and not one
SIZES = ((8, 16), (4, 6))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("z_image")
    pipeline = write_pipeline(folder, make_tokenizer(*THINKING), seed=3)
    captioner = make_tokenizer()
    captioner.split_special_tokens = True
    return read(folder, captioner, pipeline)


@pytest.fixture(scope="module")
def contexts(pair):
    ours = encoded(pair, *rows(pair, TEXTS))
    with torch.no_grad():
        theirs, _ = pair.pipeline.encode_prompt(list(TEXTS), do_classifier_free_guidance=False)
    return ours, theirs


@pytest.mark.trap(61)
def test_states_are_those_of_the_pipeline(contexts):
    (states, mask), theirs = contexts
    assert len({len(row) for row in theirs}) > 2
    for ours, kept, row in zip(np.asarray(states), np.asarray(mask), theirs):
        assert kept[: len(row)].all() and not kept[len(row) :].any()
        near(ours[: len(row)], row)


@pytest.mark.trap(64)
@pytest.mark.parametrize("size", SIZES)
def test_one_velocity_of_several_captions_and_noise_levels(pair, contexts, size):
    """With the sign, the time and the padding of the published model, in one batch."""
    (states, mask), theirs = contexts
    latents = np.random.default_rng(0).standard_normal((len(TEXTS), *size, 4)).astype(np.float32)
    sigma = np.linspace(0.05, 1, len(TEXTS)).astype(np.float32)
    ours = velocity(pair, latents, sigma, (states, mask))
    assert ours.dtype == jnp.float32
    with torch.no_grad():
        found = pair.pipeline.transformer(list(last(latents)[:, :, None]), torch.tensor(1 - sigma), theirs).sample
    near(ours, -first(torch.stack(found)[:, :, 0]))


@pytest.mark.trap(63)
def test_a_batch_of_lengths_equals_single_rows(pair, contexts):
    """Learned padding is attended to up to the next multiple of 32 of each row, whatever its neighbours need."""
    (states, mask), _ = contexts
    lengths = np.asarray(mask).sum(1)
    assert len(set(-(-lengths // 32))) > 1
    latents = jnp.asarray(np.random.default_rng(1).standard_normal((len(TEXTS), 4, 6, 4)), jnp.float32)
    sigma = jnp.full(len(TEXTS), 0.4)
    together = velocity(pair, latents, sigma, (states, mask))
    for row in (int(lengths.argmin()), int(lengths.argmax())):
        length = lengths[row]
        alone = states[row : row + 1, :length], mask[row : row + 1, :length]
        near(velocity(pair, latents[row : row + 1], sigma[:1], alone)[0], together[row], 1e-5)


@pytest.mark.trap(63)
def test_the_content_of_padding_does_not_matter(pair, contexts):
    (states, mask), _ = contexts
    latents, sigma = jnp.ones((len(TEXTS), 4, 4, 4)), jnp.full(len(TEXTS), 0.4)
    other = jnp.where(mask[..., None], states, 7.0)
    ours, again = (velocity(pair, latents, sigma, (x, mask)) for x in (states, other))
    np.testing.assert_array_equal(ours, again)


@pytest.mark.trap(67)
@pytest.mark.parametrize("shift, steps", [(6.0, 28), (3.0, 8), (6.0, 1)])
def test_noise_levels_are_the_pipelines_to_the_last_digit(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    ours = z_image.ZImageDecoder.sigmas(types.SimpleNamespace(static_shift=shift), steps, 512, 512, 1.0)
    np.testing.assert_array_equal(ours, scheduler.sigmas.numpy())


@pytest.mark.trap(64)
def test_guided_latents_after_all_steps(pair):
    """Of a whole call of the pipeline, whose guidance scale is one less than ours."""
    texts, (height, width) = list(TEXT[:2]), (16, 12)
    noise = np.random.default_rng(1).standard_normal((2, *pair.decoder.latent_shape(height, width))).astype(np.float32)
    options = dict(height=height, width=width, num_inference_steps=5, guidance_scale=3.0, output_type="latent")
    with torch.no_grad():
        theirs = pair.pipeline(list(texts), latents=last(noise), **options).images
    positive = encoded(pair, *rows(pair, texts))
    around = len(pair.decoder.template.prefix) + len(pair.decoder.template.suffix)
    tokens = jnp.zeros((1, positive[0].shape[1] - around), jnp.int32)
    negative = encoded(pair, tokens, jnp.array([0]))
    ours = drawn(pair, noise, pair.decoder.sigmas(5, height, width, 1.0), positive, negative, 4.0)
    near(ours, first(theirs))


def test_decoded_images_and_encoded_means(pair):
    pixels, network = np.random.default_rng(2).uniform(-1, 1, (2, 16, 12, 3)).astype(np.float32), pair.pipeline.vae
    with torch.no_grad():
        found = network.encode(last(pixels)).latent_dist.mode()
        drawn = network.decode(found).sample
    ours = pair.decoder.to_model_latents(pair.parts, pair.decoder.encode_images(pair.parts, jnp.asarray(pixels))[0])
    near(ours, first((found - network.config.shift_factor) * network.config.scaling_factor))
    near(pair.decoder.decode(pair.parts, ours), first(drawn))


@pytest.mark.trap(69)
def test_patches_have_their_channels_last(pair):
    labelled = np.arange(1 * 4 * 6 * 4.0).reshape(1, 4, 6, 4)
    theirs, _, _ = pair.pipeline.transformer._patchify_image(last(labelled)[0][:, None], 2, 1)
    ours = transformer.patchify(jnp.asarray(labelled))
    np.testing.assert_array_equal(ours[0], theirs.numpy())
    np.testing.assert_array_equal(transformer.unpatchify(ours, 4, 6), labelled)


@pytest.mark.trap(70)
def test_a_new_adapter_reaches_every_attention(pair):
    adapter = init_lora(jax.random.key(0), pair.parts["transformer"], pair.decoder.lora_targets, 2)
    modules = {name.rpartition("/")[0] for name in trees.flatten(adapter)}
    assert modules == {
        f"{stack}/attention/{name}"
        for stack in ("layers", "noise_refiner", "context_refiner")
        for name in ("query", "key", "value", "output")
    }


def test_captions_are_cut_in_front_of_the_suffix(pair):
    template = pair.decoder.template
    ids, mask = pair.decoder.prompt(jnp.full((1, 600), 65, jnp.int32), jnp.array([600]))
    assert ids.shape == (1, 512) and bool(mask.all())
    assert tuple(np.asarray(ids)[0, -len(template.suffix) :]) == template.suffix
