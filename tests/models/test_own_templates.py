"""What all decoders with a text encoder of their own promise of captions and their templates."""

import jax.numpy as jnp
import numpy as np
import pytest
from qwen_words import TEXT, THINKING, make_tokenizer

from uae_jax.models.condition import ConditionTemplate, place_in_template
from uae_jax.models.decoders import FAMILIES, KNOWN, PUBLISHED
from uae_jax.models.language.sampling import EXCLUDED, SamplingConfig, sample_tokens, truncate
from uae_jax.stages import decoders

CAPTIONS = 1000


def captions(seed: int) -> list[str]:
    """Texts of one line: words, numbers and marks of several kinds, without white space at their beginning."""
    rng = np.random.default_rng(seed)
    words = [word for text in TEXT for word in text.split()]
    others = ["5", "1987", "'quoted'", "(small)", "é", "猫", "\U0001f34e", "OPEN", "a-b", "50%", "x\ny", "  "]
    made = [" ".join(rng.choice([*words, *others], rng.integers(1, 24))) for _ in range(CAPTIONS)]
    return [f"{text.strip()}{mark}" for text, mark in zip(made, rng.choice([".", "", "!", '"', "\n"], CAPTIONS))]


@pytest.mark.trap(58)
@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_a_thousand_captions_by_their_ids_are_the_tokens_of_the_whole_text(family):
    tokenizer, texts = make_tokenizer(*THINKING), captions(5)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, ids))
    rows = np.full((CAPTIONS, width), tokenizer.pad_token_id, np.int32)
    for row, own in zip(rows, ids):
        row[: len(own)] = own
    template = decoders.decoder_template(family, tokenizer, "")
    found, mask = place_in_template(template, jnp.asarray(rows), jnp.asarray([len(own) for own in ids]))
    for text, row, kept in zip(texts, np.asarray(found), np.asarray(mask)):
        whole = tokenizer(family.text(tokenizer, text), add_special_tokens=False)["input_ids"]
        assert row[kept].tolist() == whole, text


@pytest.mark.trap(58)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ids_are_those_of_a_chat(name):
    """Their marks stand where the tokenizers' templates have them; the words between are those of Qwen's vocabulary."""
    decoder = PUBLISHED[name].make(dtype="bfloat16", remat="full", lora_alpha=64.0)
    template: ConditionTemplate = decoder.template
    begin, end, newline, answer = 151644, 151645, 198, 77091
    assert template.prefix[-3:] == (begin, 872, newline)
    assert template.suffix[:5] == (end, newline, begin, answer, newline)
    assert template.prefix.count(begin) == template.prefix.count(end) + 1
    assert decoder.states_shape(4096)[0][0] == 512 and decoder.latent_shape(512, 512)[0] in (32, 64)


@pytest.mark.trap(59)
def test_a_banned_id_is_never_sampled_however_likely():
    banned = ((3, 5), (9, 12))
    logits = jnp.zeros((256, 12)).at[:, 3:5].set(50.0).at[:, 9:].set(80.0)
    kept = truncate(logits, SamplingConfig(banned=banned))
    assert kept[0, 3] == np.float32(EXCLUDED)
    for temperature in (0.0, 1.0, 5.0):
        found = np.asarray(sample_tokens(kept, jnp.linspace(0, 0.9999, 256), temperature))
        assert not np.isin(found, [3, 4, 9, 10, 11]).any()


def test_each_kind_is_registered_once():
    assert len(FAMILIES) == len(KNOWN) and sum(len(family.published) for family in KNOWN) == len(PUBLISHED)
