"""Every array of a whole model, read from its folder, equals PyTorch's: caption, condition, guided picture,
similarities.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_folder import CAPTION, CAPTION_PROMPT, GUIDANCE, NEGATIVE_PROMPT, NEW_TOKENS, RANK, STEPS, load

from uae_jax.data import tokenizer as tokens
from uae_jax.data.qwen_inputs import prompt_fields
from uae_jax.diffusion.sampler import sample
from uae_jax.models import condition, uae
from uae_jax.models.encoders import clip, dino
from uae_jax.models.language import model as lm
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.sd3 import vae
from uae_jax.rollouts.captioning import sample_captions
from uae_jax.rollouts.reconstruction import Denoising, decode, encode_condition, predictor

TOLERANCE = 1e-4
ROWS = ((0,), (1,), (0, 1))  # images of each row: two of different size, and both in one row


@pytest.fixture(scope="session")
def theirs(reference):
    return reference.arrays


@pytest.fixture(scope="session")
def system(reference):
    return load(reference.folder)


@pytest.fixture(scope="session")
def base(system):
    """The parts without adapters."""
    return {name: part for name, part in system.parts.items() if not name.endswith("_lora")}


@pytest.fixture(scope="session")
def patches(system, theirs):
    return [system.processor(theirs[f"image_{number}"]) for number in range(2)]


@pytest.fixture(scope="session")
def prompts(system, patches):
    counts = [system.processor.image_tokens(grid) for _, grid in patches]
    return [
        tokens.caption_prompt_ids(system.tokenizer, CAPTION_PROMPT, [counts[image] for image in row]) for row in ROWS
    ]


@pytest.fixture(scope="session")
def batch(system, patches, prompts):
    """The three rows, padded to more than any of them needs."""
    pad = tokens.token_id(system.tokenizer, tokens.IMAGE_PAD)
    most = sum(len(values) for values, _ in patches) + 8
    rows = [
        prompt_fields(ids, [patches[image] for image in row], system.processor, pad, most, len(prompts[-1]) + 3)
        for ids, row in zip(prompts, ROWS)
    ]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "sample_id": np.arange(3, dtype=np.int32)
    }


@pytest.fixture(scope="session")
def write(system):
    @jax.jit
    def captions(parts, batch):
        return sample_captions(
            system.model,
            parts,
            batch,
            jax.random.key(0),
            max_new_tokens=NEW_TOKENS,
            stops=(),
            sampling=SamplingConfig(temperature=0.0),
        ).tokens

    return captions


@pytest.fixture(scope="session")
def context(system):
    """Function from text to its context at exact length."""
    template, config = system.model.template, system.model.captioner

    @jax.jit
    def encode(params, adapter, ids):
        return condition.encode_ids(config, params, adapter, ids, jnp.ones(ids.shape, bool))

    def context_of(parts, text, *, policy):
        ids = [[*template.prefix, *tokens.encode_caption(system.tokenizer, text)[:-1], *template.suffix]]
        params, adapter = uae.captioner_weights(parts, policy=policy)
        return encode(params, adapter, np.array(ids, np.int32))

    return context_of


@pytest.fixture(scope="session")
def pictures(system, base, theirs):
    """First velocity, final latents and picture, from the caption and the negative prompt padded to one length."""
    ids = np.array([tokens.encode_caption(system.tokenizer, CAPTION)[:-1]], np.int32)
    how = Denoising(tuple(map(float, system.schedule.sigmas(STEPS))), GUIDANCE)

    @jax.jit
    def run(parts, ids, noise):
        predict = predictor(
            system.model, parts, how, *encode_condition(system.model, parts, how, ids, jnp.array([ids.shape[1]]))
        )
        final = sample(predict, noise, jnp.asarray(how.sigmas))
        return predict(noise, jnp.asarray(how.sigmas[0])), final, decode(system.model, parts, how, final)

    with jax.default_matmul_precision("highest"):
        found = run(base, ids, channels_last(theirs["latents_init"]))
    return dict(zip(("velocity_first", "latents_final", "decoded"), map(channels_first, found)))


def channels_last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def assert_equal(ours, theirs):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("row", range(3))
def test_pixel_values_and_grids(theirs, patches, row):
    assert_equal(np.concatenate([patches[image][0] for image in ROWS[row]]), theirs[f"pixel_values_{row}"])
    assert [[1, *patches[image][1]] for image in ROWS[row]] == theirs[f"image_grid_thw_{row}"].tolist()


@pytest.mark.parametrize("row", range(3))
def test_caption_prompt_ids(theirs, prompts, row):
    assert [prompts[row]] == theirs[f"caption_prompt_ids_{row}"].tolist()


def test_caption_logits(system, base, theirs, batch):
    config = system.model.captioner
    ours = jax.jit(
        lambda parts, batch: lm.logits(config, parts, qwen.prompt_prefix(config, parts, None, batch).last_hidden)
    )({name: base[name] for name in ("vision", "language")}, batch)
    for row in range(3):
        assert_equal(ours[row], theirs[f"caption_logits_{row}"])


def test_caption_ids(base, theirs, batch, write):
    ours = write(base, batch)
    for row in range(3):
        expected = theirs[f"caption_ids_{row}"].tolist()
        assert len(set(expected)) > 3  # a caption that varies, so that equality says something
        assert ours[row].tolist() == expected


def test_caption_ids_through_the_adapter(system, theirs, batch, write):
    expected = theirs["caption_ids_lora"].tolist()
    assert expected != theirs["caption_ids_0"].tolist()
    assert write(system.parts, batch)[0].tolist() == expected


def test_prompt_embeds(base, theirs, context):
    assert_equal(context(base, CAPTION, policy=False), theirs["prompt_embeds"])


def test_negative_prompt_embeds(base, theirs, context):
    assert_equal(context(base, NEGATIVE_PROMPT, policy=False), theirs["negative_prompt_embeds"])


def test_padding_of_the_shorter_prompt_changes_nothing(system, base, theirs):
    ids = np.array([tokens.encode_caption(system.tokenizer, CAPTION)[:-1]], np.int32)
    how = Denoising((1.0, 0.0), GUIDANCE)
    both = jax.jit(lambda parts, ids: encode_condition(system.model, parts, how, ids, jnp.array([ids.shape[1]])))(
        base, ids
    )
    assert both[0][0].shape == both[1][0].shape
    for (states, mask), name in zip(both, ("prompt_embeds", "negative_prompt_embeds")):
        assert_equal(states[:, : int(mask.sum())], theirs[name])


def test_pooled_prompt_embeds(system, theirs):
    assert_equal(system.parts["pooled"][None], theirs["pooled_prompt_embeds"])


def test_sigmas(system, theirs):
    assert_equal(system.schedule.sigmas(STEPS), theirs["sigmas"])


def test_velocity_first(pictures, theirs):
    assert theirs["prompt_embeds"].shape != theirs["negative_prompt_embeds"].shape  # one of the two was padded
    assert_equal(pictures["velocity_first"], theirs["velocity_first"])


def test_latents_final(pictures, theirs):
    assert_equal(pictures["latents_final"], theirs["latents_final"])


def test_decoded(pictures, theirs):
    assert_equal(pictures["decoded"], theirs["decoded"])


def test_encoded_mean(system, theirs):
    mean, _ = jax.jit(lambda params, pixels: vae.encode(system.model.vae, params, pixels))(
        system.parts["vae"], channels_last(theirs["vae_pixels"])
    )
    assert_equal(channels_first(mean), theirs["encoded_mean"])


@pytest.mark.parametrize(
    ("name", "array", "features"),
    [
        ("clip", "clip_features", clip.image_features),
        ("dinov2", "dinov2_cls", dino.cls_features),
        ("dinov3", "dinov3_cls", dino.cls_features),
    ],
    ids=["clip_features", "dinov2_cls", "dinov3_cls"],
)
def test_image_features(system, theirs, name, array, features):
    pixels = channels_last(theirs[f"{name}_pixels"])
    ours = jax.jit(lambda params, pixels: features(system.encoders[name].config, params, pixels))(
        system.parts["encoders"][name], pixels
    )
    assert_equal(ours, theirs[array])


def test_prompt_embeds_lora(system, theirs, context):
    assert system.model.captioner.text.lora_alpha == 2 * RANK  # the release's folder does not say it
    assert np.abs(theirs["prompt_embeds_lora"] - theirs["prompt_embeds"]).max() > 0.01
    assert_equal(context(system.parts, CAPTION, policy=True), theirs["prompt_embeds_lora"])


def test_velocity_first_lora(system, theirs):
    states = theirs["prompt_embeds"]
    ours = jax.jit(
        lambda parts, x: uae.velocity(
            system.model, parts, x, jnp.ones(1), (states, jnp.ones(states.shape[:2], bool)), policy=True
        )
    )(system.parts, channels_last(theirs["latents_init"]))
    assert_equal(channels_first(ours), theirs["velocity_first_lora"])
