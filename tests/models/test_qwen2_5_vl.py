"""What sampling and scoring of captions must agree on, by identity, on a random model of a few thousand parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from uae_jax import trees
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig, sample_tokens, truncate
from uae_jax.models.qwen2_5_vl import model
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig
from uae_jax.nn.attention.entry import MULTIPLES
from uae_jax.nn.lora import init_lora, merge_adapter

CONFIG = Qwen2_5VLConfig(
    vision=VisionConfig(
        depth=2, width=16, heads=2, mlp_width=24, out_width=32, patch_size=2, full_attention_blocks=(1,)
    ),
    text=TextConfig(vocab_size=60, width=32, layers=2, heads=4, key_heads=2, mlp_width=48, mrope_section=(2, 1, 1)),
    image_token_id=58,
    pad_token_id=0,
    stop_token_ids=(1,),
)
LENGTHS, GROUP, NEW, TEMPERATURE = (9, 6), 3, 8, 0.7
STOPS = tuple(range(1, 12))  # many, so that rows end at different steps


def shaken(params: dict) -> dict:
    """No bias at zero and no norm at one; larger table and kernels, so that the distributions are not flat."""

    def shake(name, leaf):
        return 2.0 * leaf + 0.1 * jax.random.normal(trees.name_key(jax.random.key(3), name), leaf.shape)

    return trees.map_with_name(shake, params)


@pytest.fixture(scope="module")
def params():
    return shaken(jax.jit(lambda key: model.init_params(CONFIG, key))(jax.random.key(0)))


@pytest.fixture(scope="module")
def adapter(params):
    zero = init_lora(jax.random.key(1), params["language"], lm.ADAPTER_PATTERN, rank=2)
    return trees.map_with_name(
        lambda name, leaf: leaf + 0.01 * jax.random.normal(trees.name_key(jax.random.key(2), name), leaf.shape), zero
    )


def prompts(width: int = 9) -> dict:
    """Two prompts of unequal length, one image of two embeddings in each; the second row's patches are padded."""
    ids = np.zeros((2, width), np.int32)
    rng = np.random.default_rng(0)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(12, 58, length)
        ids[row, 1 : 3 - row] = CONFIG.image_token_id
    mask = np.arange(width) < np.asarray(LENGTHS)[:, None]
    groups = np.array([[0] * 8, [0] * 4 + [-1] * 4], np.int32)
    return {
        "prompt_ids": jnp.asarray(ids),
        "prompt_mask": jnp.asarray(mask),
        "prompt_positions": jnp.broadcast_to(jnp.arange(width)[None, :, None], (2, width, 3)),
        "prompt_next": jnp.asarray(LENGTHS, jnp.int32) + 2,
        "patches": jnp.asarray(rng.standard_normal((2, 8, CONFIG.vision.patch_width)), jnp.float32),
        "patch_positions": jnp.asarray(rng.integers(0, 4, (2, 8, 2)), jnp.int32),
        "patch_windows": jnp.asarray(groups),
        "patch_images": jnp.asarray(groups),
    }


@functools.partial(jax.jit, static_argnames=("config", "group", "stop_ids", "sampling", "length"))
def sample(
    params,
    adapter,
    batch,
    keys,
    config=CONFIG,
    group=GROUP,
    stop_ids=STOPS,
    sampling=SamplingConfig(TEMPERATURE),
    length=NEW,
):
    prefix = model.prompt_prefix(config, params, adapter, batch)
    return generate(
        config, params, adapter, prefix, keys, max_new_tokens=length, stop_ids=stop_ids, sampling=sampling, group=group
    )


@functools.partial(jax.jit, static_argnames=("config", "chunk", "entropy"))
def score(params, adapter, batch, tokens, mask, config=CONFIG, chunk=3, entropy=False):
    prefix = model.prompt_prefix(config, params, adapter, batch)
    return lm.completion_log_probs(
        config, params, adapter, prefix, tokens, mask, temperature=TEMPERATURE, chunk=chunk, with_entropy=entropy
    )


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def scores_and_gradient(params, adapter, batch, tokens, mask, config=CONFIG, chunk=3):
    def total(params):
        log_probs = score(params, adapter, batch, tokens, mask, config, chunk).log_probs
        return log_probs.sum(), log_probs

    gradient, log_probs = jax.grad(total, has_aux=True)(params)
    return log_probs, gradient


@pytest.fixture(scope="module")
def rollout(params, adapter):
    return sample(params, adapter, prompts(), jax.random.split(jax.random.key(7), 2 * GROUP))


def assert_close(ours, theirs, tolerance=1e-5):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = max(float(jnp.abs(value).max()), 1e-3)
        assert float(jnp.abs(ours[name] - value).max()) <= tolerance * scale, name


@pytest.mark.trap(3)
def test_decoding_with_a_cache_equals_teacher_forcing_at_every_position(params, adapter, rollout):
    lengths = rollout.mask.sum(1)
    assert len(set(lengths.tolist())) > 1 and rollout.finished.any()  # rows end at different steps
    scores = score(params, adapter, prompts(), rollout.tokens, rollout.mask)
    np.testing.assert_allclose(scores.log_probs, rollout.log_probs, atol=2e-5, rtol=1e-5)


@pytest.mark.trap(5)
def test_mask_ends_with_the_first_stop_token(rollout):
    for tokens, mask, finished in zip(rollout.tokens.tolist(), rollout.mask.tolist(), rollout.finished.tolist()):
        stops = [index for index, token in enumerate(tokens) if token in STOPS and mask[index]]
        length = stops[0] + 1 if stops else NEW
        assert mask == [index < length for index in range(NEW)]
        assert finished == bool(stops)
        assert tokens[length:] == [CONFIG.pad_token_id] * (NEW - length)


@pytest.mark.trap(5)
def test_tokens_after_the_end_change_nothing(params, adapter, rollout):
    other = jnp.where(rollout.mask, rollout.tokens, 37)
    assert (other != rollout.tokens).any()
    expected = score(params, adapter, prompts(), rollout.tokens, rollout.mask).log_probs
    np.testing.assert_array_equal(score(params, adapter, prompts(), other, rollout.mask).log_probs, expected)


@pytest.mark.trap(2)
def test_a_later_token_does_not_move_earlier_scores_and_a_token_moves_its_own(params, adapter, rollout):
    full, tokens = jnp.ones_like(rollout.mask), jax.random.randint(jax.random.key(5), rollout.tokens.shape, 12, 50)
    before = score(params, adapter, prompts(), tokens, full).log_probs
    changed = tokens.at[:, 4].add(5)
    after = score(params, adapter, prompts(), changed, full).log_probs
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    moved = jnp.abs(after - before)
    assert (moved[:, 4] > 1e-3).all() and (moved[:, 5:].max(1) > 1e-3).all()


@pytest.mark.trap(4)
def test_padding_of_the_prompt_changes_neither_scores_nor_gradient(params, adapter, rollout):
    arguments = (rollout.tokens, rollout.mask)
    narrow, wide = prompts(9), prompts(14)
    wide["prompt_ids"] = jnp.where(wide["prompt_mask"], wide["prompt_ids"], CONFIG.image_token_id)
    wide["prompt_ids"] = wide["prompt_ids"].at[:, :9].set(jnp.where(narrow["prompt_mask"], narrow["prompt_ids"], 58))
    assert_close(
        scores_and_gradient(params, adapter, wide, *arguments),
        scores_and_gradient(params, adapter, narrow, *arguments),
        1e-4,
    )
    alone = {name: value[1:] for name, value in narrow.items()}
    alone |= {
        name: value[:, : LENGTHS[1]] for name, value in alone.items() if name.startswith("prompt") and value.ndim > 1
    }
    alone |= {name: value[:, :4] for name, value in alone.items() if name.startswith("patch")}
    scores = score(params, adapter, alone, rollout.tokens[GROUP:], rollout.mask[GROUP:])
    assert_close(scores.log_probs, score(params, adapter, narrow, *arguments).log_probs[GROUP:])


def test_the_length_that_a_device_prefers_changes_no_state_of_a_text(params, adapter, monkeypatch):
    ids, mask = jnp.arange(14).reshape(2, 7) + 12, jnp.arange(7) < jnp.array([[7], [4]])
    exact = lm.text_hidden_states(CONFIG, params, adapter, ids, mask)
    monkeypatch.setitem(MULTIPLES, "cpu", 16)
    found = lm.text_hidden_states(CONFIG, params, adapter, ids, mask)
    assert found.shape == exact.shape == (2, 7, 32)
    np.testing.assert_allclose(found[mask], exact[mask], atol=1e-5)


@pytest.mark.slow
def test_sharing_a_prompt_in_a_group_equals_repeating_it(params, adapter, rollout):
    repeated = {name: jnp.repeat(value, GROUP, axis=0) for name, value in prompts().items()}
    arguments = (rollout.tokens, rollout.mask)
    assert_close(
        scores_and_gradient(params, adapter, repeated, *arguments),
        scores_and_gradient(params, adapter, prompts(), *arguments),
        1e-4,
    )
    grouped = score(
        params, adapter, prompts(), rollout.tokens.reshape(2, GROUP, NEW), rollout.mask.reshape(2, GROUP, NEW)
    )
    assert_close(grouped.log_probs.reshape(-1, NEW), score(params, adapter, prompts(), *arguments).log_probs)
    again = sample(params, adapter, repeated, jax.random.split(jax.random.key(7), 2 * GROUP), group=1)
    np.testing.assert_array_equal(again.tokens, rollout.tokens)


def test_scores_and_gradient_through_the_prefix_equal_one_plain_forward_pass(params, adapter):
    ids = jnp.asarray([[20, 31, 42, 13, 25, 36, 47, 18, 29, 30]])
    prompt = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": jnp.ones((1, 4), bool),
        "prompt_next": jnp.asarray([4]),
        "prompt_positions": lm.text_positions(jnp.zeros(1, jnp.int32), 4),
    }

    def plain(language):
        whole = {**params, "language": language}
        hidden = lm.text_hidden_states(CONFIG, whole, adapter, ids, jnp.ones((1, 10), bool))[:, 3:9]
        log_probs = jax.nn.log_softmax(lm.logits(CONFIG, whole, hidden) / TEMPERATURE)
        return jnp.take_along_axis(log_probs, ids[:, 4:, None], -1).sum()

    def split(language):
        return score(
            {**params, "language": language}, adapter, prompt, ids[:, 4:], jnp.ones((1, 6), bool)
        ).log_probs.sum()

    value, expected = jax.jit(jax.value_and_grad(plain))(params["language"])
    ours, gradients = jax.jit(jax.value_and_grad(split))(params["language"])
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    assert_close(gradients, expected, 1e-4)


@pytest.mark.trap(6)
def test_rows_do_not_depend_on_when_the_loop_ends(params, adapter, rollout):
    early = int(np.argmin(rollout.mask.sum(1)))
    assert rollout.mask[early].sum() < NEW
    one = {name: value[early // GROUP][None] for name, value in prompts().items()}
    keys = jax.random.split(jax.random.key(7), 2 * GROUP)[early : early + 1]
    alone = sample(params, adapter, one, keys, group=1)  # ends early
    np.testing.assert_array_equal(alone.tokens[0], rollout.tokens[early])
    np.testing.assert_array_equal(alone.mask[0], rollout.mask[early])
    full = sample(params, adapter, one, keys, group=1, stop_ids=())  # runs to the end
    length = int(alone.mask.sum())
    np.testing.assert_array_equal(full.tokens[0, :length], alone.tokens[0, :length])
    assert full.mask.all() and not full.finished.any()


@pytest.mark.trap(13)
def test_zero_adapter_is_the_base_bit_for_bit_and_merging_changes_nothing(params, adapter, rollout):
    arguments = (prompts(), rollout.tokens, rollout.mask)
    zero = init_lora(jax.random.key(1), params["language"], lm.ADAPTER_PATTERN, rank=2)
    assert len(trees.flatten(zero)) == 14
    base = score(params, None, *arguments).log_probs
    np.testing.assert_array_equal(score(params, zero, *arguments).log_probs, base)
    adapted = score(params, adapter, *arguments).log_probs
    assert float(jnp.abs(adapted - base).max()) > 1e-2
    merged = {**params, "language": merge_adapter(params["language"], adapter, CONFIG.text.lora_alpha)}
    assert_close(score(merged, None, *arguments).log_probs, adapted, 1e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_and_chunks_change_nothing(params, adapter, rollout, remat):
    arguments = (params, adapter, prompts(), rollout.tokens, rollout.mask)
    recomputed = scores_and_gradient(*arguments, config=CONFIG.using(remat=remat), chunk=NEW)
    assert_close(recomputed, scores_and_gradient(*arguments), 1e-4)


def test_entropy_is_that_of_the_distribution(params, adapter, rollout):
    batch = prompts()
    entropy = score(params, adapter, batch, rollout.tokens, rollout.mask, entropy=True).entropy
    hidden = model.prompt_prefix(CONFIG, params, adapter, batch).last_hidden
    probabilities = np.asarray(jax.nn.softmax(lm.logits(CONFIG, params, hidden) / TEMPERATURE), np.float64)
    np.testing.assert_allclose(entropy[::GROUP, 0], stats.entropy(probabilities, axis=-1), rtol=1e-4)
    assert (entropy[~rollout.mask] == 0).all()


@pytest.mark.trap(7)
@pytest.mark.parametrize("vocabulary", [17, 1200])
def test_sampled_frequencies_follow_the_scored_distribution(vocabulary):
    logits = 2.0 * jax.random.normal(jax.random.key(0), (vocabulary,))
    draws, width = 40_000, 17
    uniforms = jax.random.uniform(jax.random.key(1), (draws,))
    tokens = np.asarray(
        jax.jit(
            lambda u: jax.lax.map(
                lambda v: sample_tokens(jnp.broadcast_to(logits, (1000, vocabulary)), v, TEMPERATURE),
                u.reshape(-1, 1000),
            )
        )(uniforms)
    ).ravel()
    probabilities = np.exp(np.asarray(jax.nn.log_softmax(logits / TEMPERATURE), np.float64))
    expected = np.bincount(np.arange(vocabulary) % width, weights=probabilities, minlength=width)  # counts large enough
    observed = np.bincount(tokens % width, minlength=width)
    assert stats.chisquare(observed, expected / expected.sum() * draws).pvalue > 1e-3
    wrong = np.bincount(np.arange(vocabulary) % width, weights=np.asarray(jax.nn.softmax(logits)), minlength=width)
    assert stats.chisquare(observed, wrong / wrong.sum() * draws).pvalue < 1e-6  # the test sees another temperature


def test_inverse_distribution_function_at_its_ends_takes_possible_tokens():
    logits = jnp.full((2, 1500), -1e30).at[:, 3].set(0.0).at[:, 700].set(-1.0)
    tokens = sample_tokens(logits, jnp.asarray([0.0, 1 - 2.0**-24]), 1.0)
    assert tokens.tolist() == [3, 700]
    assert sample_tokens(logits, jnp.zeros(2), 0.0).tolist() == [3, 3]


@pytest.mark.trap(7)
def test_truncation_keeps_the_most_probable_and_is_refused_for_training():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    assert (truncate(logits, SamplingConfig(top_k=2)) > -1e29).tolist() == [[False, True, False, True]]
    assert (truncate(logits, SamplingConfig(top_p=0.75)) > -1e29).tolist() == [[False, True, True, True]]
    assert (truncate(logits, SamplingConfig(top_p=0.65)) > -1e29).tolist() == [[False, True, False, True]]
    assert SamplingConfig(0.7).for_training() == SamplingConfig(0.7)
    for sampling in (SamplingConfig(top_k=2), SamplingConfig(top_p=0.9), SamplingConfig(temperature=0.0)):
        with pytest.raises(ValueError, match="training"):
            sampling.for_training()
    with pytest.raises(ValueError, match="top_p"):
        SamplingConfig(top_p=0.0)


@pytest.mark.slow
def test_a_frozen_head_has_the_same_scores_and_gradient_by_the_adapter(params, adapter, rollout):
    @functools.partial(jax.jit, static_argnums=0)
    def scores_and_gradient_by_adapter(frozen_head):
        def total(adapter):
            prefix = model.prompt_prefix(CONFIG, params, adapter, prompts())
            scores = lm.completion_log_probs(
                CONFIG,
                params,
                adapter,
                prefix,
                rollout.tokens,
                rollout.mask,
                temperature=TEMPERATURE,
                chunk=3,
                with_entropy=True,
                frozen_head=frozen_head,
            )
            return (scores.log_probs**2).sum(), scores

        return jax.grad(total, has_aux=True)(adapter)

    (gradient, scores), (expected, reference) = map(scores_and_gradient_by_adapter, (True, False))
    assert_close(dict(scores._asdict()), dict(reference._asdict()))
    assert_close(gradient, expected, tolerance=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.trap(8)
def test_scores_are_float32_over_a_large_vocabulary_with_bfloat16_activations():
    vocabulary, width = 151_936, 16
    rng = np.random.default_rng(0)
    table = rng.standard_normal((vocabulary, width)).astype(np.float32)
    hidden = jnp.asarray(rng.standard_normal((1, 4, width)), jnp.bfloat16)
    text = TextConfig(
        vocab_size=vocabulary, width=width, heads=2, key_heads=1, mrope_section=(2, 1, 1), dtype="bfloat16"
    )
    config = Qwen2_5VLConfig(text=text, vision=VisionConfig(out_width=width))
    params = {"language": {"embedding": {"table": jnp.asarray(table)}}}
    tokens = jnp.asarray([[3, 100_000, 151_935, 7]])
    scores = lm.score_tokens(config, params, hidden, tokens, chunk=2)
    exact_table = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float64)
    exact = np.asarray(hidden[0], np.float64) @ exact_table.T
    exact -= np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True)) + exact.max(-1, keepdims=True)
    assert scores.log_probs.dtype == jnp.float32
    np.testing.assert_allclose(scores.log_probs[0], exact[np.arange(4), tokens[0]], atol=1e-4)


def test_bfloat16_stays_near_float32(rollout):
    # Parameters as initialised: in the shaken model, rounding the weights alone already moves scores by half a nat.
    params = jax.jit(lambda key: model.init_params(CONFIG, key))(jax.random.key(0))
    arguments = (params, None, prompts(), rollout.tokens, jnp.ones_like(rollout.mask))
    half = score(*arguments, config=CONFIG.using(dtype="bfloat16")).log_probs
    assert half.dtype == jnp.float32
    difference = np.abs(half - score(*arguments).log_probs)
    assert 0 < difference.max() < 0.03 and difference.mean() < 0.01


def test_number_of_keys_and_sizes_are_checked(params):
    prefix = model.prompt_prefix(CONFIG, params, None, prompts())
    with pytest.raises(ValueError, match="6 completions"):
        generate(
            CONFIG, params, None, prefix, jax.random.split(jax.random.key(0), 5), max_new_tokens=2, stop_ids=(), group=3
        )
    with pytest.raises(ValueError, match="mrope_section"):
        Qwen2_5VLConfig(text=TextConfig(mrope_section=(1, 2, 3)))
    with pytest.raises(ValueError, match="remat"):
        CONFIG.using(remat="some")


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "base"])
def test_the_form_that_gpus_decode_with_samples_the_same_captions(params, adapter, adapted):
    """With an adapter of some modules alone, too: those without one keep their kernel."""
    lora = (
        {
            "layers": {
                "attention": {name: adapter["layers"]["attention"][name] for name in ("query", "value", "output")},
                "mlp": adapter["layers"]["mlp"],
            }
        }
        if adapted
        else None
    )
    prefix = model.prompt_prefix(CONFIG, params, lora, prompts())

    def captions(packed):
        return generate(
            CONFIG,
            params,
            lora,
            prefix,
            jax.random.split(jax.random.key(7), 2 * GROUP),
            max_new_tokens=NEW,
            stop_ids=STOPS,
            sampling=SamplingConfig(TEMPERATURE),
            group=GROUP,
            packed=packed,
        )

    scanned, packed = captions(False), captions(True)
    np.testing.assert_array_equal(packed.tokens, scanned.tokens)
    np.testing.assert_allclose(packed.log_probs, scanned.log_probs, atol=2e-5)
    scores = lm.completion_log_probs(CONFIG, params, lora, prefix, packed.tokens, packed.mask, temperature=TEMPERATURE)
    np.testing.assert_allclose(packed.log_probs, scores.log_probs, atol=2e-5)
