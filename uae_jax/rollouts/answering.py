"""Answers by log-probabilities: which of a question's options the captioner finds most probable.

Shape letters: b questions, s texts of a question's options, t tokens, k options.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from uae_jax.models import uae
from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.rollouts.captioning import encode_batch_images
from uae_jax.trees import Tree

NO_OPTION = -1  # of a text that is padding


def option_scores(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    batch: Mapping[str, Array],
    tokens: Int[Array, "b s t"],
    mask: Bool[Array, "b s t"],
    counted: Bool[Array, "b s t"],
    option: Int[Array, "b s"],
    options: int,
) -> Float32[Array, "b k"]:
    """Log-probability of every option under the policy: of its text, or of any of its texts.

    A letter is a text of one token, so it is scored at the first position of the answer, from the prompt alone.

    Args:
      model, parts: the model.
      batch: b prompts with images (`data.qwen_inputs.prompt_fields`).
      tokens: of the texts.
      mask: true up to the end of each text.
      counted: the tokens whose probability counts; those before them are given.
      option: that each text stands for, or `NO_OPTION`.
      options: k.

    Returns:
      Logarithms of sums of probabilities; minus infinity for options without a text.
    """
    params, adapter = uae.captioner_weights(parts, policy=True)
    prefix = qwen.prompt_prefix(model.captioner, params, adapter, batch, encode_batch_images(model, parts, batch))
    said = lm.completion_log_probs(model.captioner, params, adapter, prefix, tokens, mask)
    texts = jnp.sum(jnp.where(counted, said.log_probs, 0.0), -1)
    of_option = option[:, None] == jnp.arange(options)[:, None]
    return jax.nn.logsumexp(jnp.where(of_option, texts[:, None], -jnp.inf), axis=-1)


def chosen_option(scores: Float32[Array, "b k"]) -> Int[Array, " b"]:
    """The most probable option; the first of equals."""
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
