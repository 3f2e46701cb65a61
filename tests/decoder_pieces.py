"""What the tests of decoders with a text encoder of their own share: random weights, comparisons, captions."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from uae_jax import trees
from uae_jax.diffusion.sampler import guided_velocity, sample
from uae_jax.stages import decoders

TEXT_WIDTH = 8


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random numbers for every parameter and buffer that counts: pads, norms and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in (*model.named_parameters(), *model.named_buffers()):
            if not leaf.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(leaf.shape, generator=generator)
            if name.endswith("running_var"):
                leaf.copy_(0.5 + noise.square())
            elif "norm" in name and leaf.ndim == 1 and name.endswith("weight"):
                leaf.copy_(1 + 0.3 * noise)
            elif leaf.ndim > 1:
                leaf.copy_(noise / leaf[0].numel() ** 0.5)
            else:
                leaf.copy_(0.3 * noise)
    return model.eval()


def text_encoder(vocabulary: int, layers: int, seed: int) -> torch.nn.Module:
    """A tiny Qwen3, its head tied."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return randomise(Qwen3ForCausalLM(config), seed)


def near(ours, theirs, tolerance: float = 1e-4) -> None:
    """The largest gap, over the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def with_leaf(params: dict, name: str, value) -> dict:
    """The parameters with another value of one leaf."""
    return trees.unflatten(trees.flatten(params) | {name: value})


def first(leaf: torch.Tensor) -> np.ndarray:
    """An image batch of PyTorch, channels last."""
    return np.moveaxis(leaf.detach().numpy(), 1, -1)


def last(leaf: np.ndarray) -> torch.Tensor:
    """The inverse of `first`."""
    return torch.tensor(np.moveaxis(np.asarray(leaf), -1, 1))


def read(folder, captioner: PreTrainedTokenizerBase, pipeline) -> types.SimpleNamespace:
    """A pipeline's folder as a run reads it, beside the pipeline itself."""
    decoder, banned = decoders.describe(folder, captioner, "", dtype="float32", remat="none", lora_alpha=16.0)
    parts = decoders.load_parts(folder, lambda part: None, {})
    return types.SimpleNamespace(
        folder=folder, tokenizer=pipeline.tokenizer, pipeline=pipeline, decoder=decoder, parts=parts, banned=banned
    )


def rows(pair, texts) -> tuple[jax.Array, jax.Array]:
    """Captions as the captioner would have sampled them, and their lengths."""
    ids = [pair.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids))
    padded = [[*row, *[pair.tokenizer.pad_token_id] * (width - len(row))] for row in ids]
    return jnp.asarray(padded, jnp.int32), jnp.asarray([len(row) for row in ids], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _encoded(decoder, parts, tokens, lengths):
    ids, mask = decoder.prompt(tokens, lengths)
    return decoder.context(parts, decoder.states(parts, ids, mask), mask)


def encoded(pair, tokens, lengths):
    """What the transformer reads of captions."""
    return _encoded(pair.decoder, pair.parts, tokens, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _velocity(decoder, parts, latents, sigma, context):
    return decoder.velocity(parts, latents, sigma, context)


def velocity(pair, latents, sigma, context):
    """Of the decoder, compiled."""
    return _velocity(pair.decoder, pair.parts, jnp.asarray(latents), jnp.asarray(sigma), context)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _drawn(decoder, parts, noise, levels, positive, negative, scale):
    def predict(x, sigma):
        return guided_velocity(
            lambda x, s, c: decoder.velocity(parts, x, s, c), x, sigma, positive, negative, scale, guide=decoder.guide
        )

    return sample(predict, noise, levels)


def drawn(pair, noise, levels, positive, negative, scale):
    """Guided latents after all steps."""
    return _drawn(pair.decoder, pair.parts, jnp.asarray(noise), jnp.asarray(levels), positive, negative, scale)
