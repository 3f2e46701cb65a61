"""One network both ways: two streams of tokens, one reward, and everything else frozen."""

import dataclasses
import types

import janus_pieces as pieces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from janus_pieces import CONFIG

from uae_jax.methods.method import build_step, gradients_of, make_rollout, start_of
from uae_jax.methods.stage_settings import SamplerConfig
from uae_jax.methods.trained import trainable
from uae_jax.methods.unified_ar import UnifiedAr, UnifiedArConfig
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.janus.unified import Unified
from uae_jax.models.language import model as lm
from uae_jax.nn.lora import init_lora
from uae_jax.settings import frozen
from uae_jax.training.optimizer import make_optimizer
from uae_jax.trees import flatten

BATCH, GROUP, IMAGES, WORDS = 4, 2, 3, 5
TEMPLATE = ConditionTemplate((pieces.BOS, 20, 21), (22, pieces.BEGIN), (), pieces.PAD)
SYSTEM = types.SimpleNamespace(model=Unified(CONFIG, TEMPLATE), encoders={}, stops=(pieces.EOS,), scorer=None)
SMALL = dict(
    batch_size=BATCH,
    group_size=GROUP,
    images_per_caption=IMAGES,
    max_new_tokens=WORDS,
    guidance_scale=2.0,
    lora_rank=2,
    score_chunk=3,
    reward=dict(names=(), weights=(), pixel_weight=1.0),
    optimizer=dict(learning_rate=1e-2, warmup_steps=0, max_grad_norm=0.0),
)
KEY = jax.random.key(7)


def method(**changes) -> UnifiedAr:
    return UnifiedAr(frozen(UnifiedArConfig, {**SMALL, **changes}), SamplerConfig(), SYSTEM)


@pytest.fixture(scope="module")
def parts():
    """The model with an adapter that is not zero."""
    found = pieces.small_params()
    zero = init_lora(jax.random.key(1), found["language"], lm.ADAPTER_PATTERN, 2)
    moved = jax.tree.map(lambda leaf: leaf + 0.005 * jax.random.normal(jax.random.key(2), leaf.shape), zero)
    return {**found, "encoders": {}, "language_lora": moved}


@pytest.fixture(scope="module")
def batch():
    ids, mask = pieces.right_padded([pieces.caption_prompts()[0]] * BATCH)
    seen = np.random.default_rng(1).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    words = np.random.default_rng(2).integers(6, 160, (BATCH, WORDS)).astype(np.int32)
    words[:, -1] = pieces.EOS
    captions = dict(caption_ids=words, caption_mask=np.ones((BATCH, WORDS), bool))
    return dict(sample_id=np.arange(BATCH), pixels=seen, prompt_ids=ids, prompt_mask=mask) | captions


def split(parts, name="language_lora"):
    return {name: parts[name]}, {key: value for key, value in parts.items() if key != name}


def stepped(own: UnifiedAr, parts: dict, batch: dict, steps: int = 1):
    """State and metrics after some steps of the compiled step."""
    params = trainable(own.system.model, parts, own.trains(own.settings), own.settings.lora_rank, KEY)
    rest = {name: part for name, part in parts.items() if name not in params}
    optimizer = make_optimizer(own.settings.optimizer, 10)
    step, state = build_step(own, optimizer), start_of(params, optimizer, own.settings)
    for _ in range(steps):
        state, metrics = step(state, rest, {name: batch[name] for name in ("sample_id", *own.reads(own.settings))}, KEY)
    return state, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def rollout(parts, batch):
    """Of two updates, so that old log-probabilities are replayed."""
    own = method(updates_per_rollout=2)
    made = jax.jit(lambda params, rest, rows: make_rollout(own, params, rest, rows, KEY))
    return made(*split(parts), batch)


def test_a_step_trains_both_streams_and_reports_each(parts, batch):
    state, metrics = stepped(method(), parts, batch)
    for stream in ("caption", "image"):
        assert metrics[f"{stream}_grad_norm"] > 1e-3 and metrics[f"{stream}_entropy"] > 0.1
        assert metrics[f"{stream}_kl"] > 0 and metrics[f"{stream}_ratio_deviation_max"] == 0
        assert metrics[f"{stream}_log_prob_gap_max"] < 1e-3  # sampling with a cache, and the replay
    assert metrics["kl"] == max(metrics["caption_kl"], metrics["image_kl"])
    assert metrics["between_share"] < 1 and metrics["image_reward_std"] > 0
    assert state.params.keys() == {"language_lora"}
    moved = jax.tree.map(
        lambda new, old: float(jnp.abs(new - old).max()), state.params["language_lora"], parts["language_lora"]
    )
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.trap(42)
def test_the_ratio_is_one_before_an_update_and_not_after(parts, batch, rollout):
    own, (params, rest) = method(updates_per_rollout=2), split(parts)
    moved = jax.tree.map(lambda leaf: leaf + 0.002, params)
    for name, (_, loss) in own.streams.items():

        @jax.jit
        def deviation(params, update, loss=loss):
            return loss(params, rest, {**rollout, "update": update}, KEY)[2]["ratio_deviation_max"][0]

        assert float(deviation(params, 0)) == 0, name
        assert float(deviation(params, 1)) < 1e-3, name  # old and new by two programs: rounding alone
        assert float(deviation(moved, 1)) > 1e-2, name


def test_shuffled_rewards_are_those_of_the_image_in_another_order(parts, batch):
    def rewards(own):
        made = jax.jit(lambda params, rest, rows: own.rollout(params, rest, rows, KEY))(*split(parts), batch)
        return np.asarray(made["samples"]["reward"])

    real, found = rewards(method()), rewards(method(shuffled_rewards=True))
    assert found.shape == (BATCH, GROUP, IMAGES)
    np.testing.assert_array_equal(np.sort(found.reshape(BATCH, -1)), np.sort(real.reshape(BATCH, -1)))
    assert (found != real).any(axis=(1, 2)).all()


@pytest.mark.trap(55)
def test_advantages_compare_captions_of_an_image_and_drawings_of_a_caption(rollout):
    samples = rollout["samples"]
    assert samples["caption_advantage"].shape == (BATCH, GROUP)
    assert samples["image_advantage"].shape == (BATCH, GROUP, IMAGES)
    np.testing.assert_allclose(samples["caption_advantage"].sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(samples["image_advantage"].sum(-1), 0, atol=1e-5)
    assert float(jnp.abs(samples["image_advantage"]).max()) > 0.5


def test_a_drawing_with_one_image_takes_the_advantage_of_its_caption():
    own = method(images_per_caption=1)
    found, _ = own.advantages(jax.random.uniform(KEY, (3, GROUP, 1)))
    np.testing.assert_array_equal(found["image_advantage"][..., 0], found["caption_advantage"])


@pytest.mark.trap(45)
def test_a_full_drawing_keeps_its_reward_and_one_of_an_endless_caption_does_not(parts):
    """Drawings and captions of as many tokens as there is room for: the penalty is for captions alone."""
    own = method(max_new_tokens=CONFIG.vq.tokens, reward={**SMALL["reward"], "overlong_penalty": 0.25})
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 64, (BATCH * GROUP * IMAGES, CONFIG.vq.tokens)))
    original = jnp.asarray(pieces.pixels(BATCH))
    ended = np.arange(BATCH * GROUP) % 3 > 0

    def rewards(finished):
        completion = types.SimpleNamespace(finished=jnp.asarray(finished))
        return np.asarray(jax.jit(lambda: own.rewards(parts, original, tokens, completion)[0])())

    taken = rewards(np.ones_like(ended)) - rewards(ended)
    expected = 0.25 * ~np.repeat(ended, IMAGES).reshape(BATCH, -1)
    np.testing.assert_allclose(taken, expected, atol=1e-6)


def test_drawings_of_a_caption_differ_and_follow_the_images_number(parts, batch, rollout):
    tokens = np.asarray(rollout["samples"]["image_tokens"])
    assert (tokens[:, :, 0] != tokens[:, :, 1]).any(-1).all()
    ids = np.asarray(rollout["samples"]["drawing_ids"])
    lengths = np.asarray(rollout["samples"]["drawing_mask"]).sum(-1)
    said = np.asarray(rollout["samples"]["tokens"])
    for row, column in np.ndindex(BATCH, GROUP):  # the prompt holds the words of its caption, without the end
        kept = ids[row, column, 3 : lengths[row, column] - 2]
        np.testing.assert_array_equal(kept, said[row, column, : len(kept)])
        assert ids[row, column, lengths[row, column] - 1] == pieces.BEGIN
    order = np.array([2, 0, 3, 1])
    own, (params, rest) = method(updates_per_rollout=2), split(parts)
    again = jax.jit(lambda rows: make_rollout(own, params, rest, rows, KEY)["samples"]["image_tokens"])(
        {name: leaf[order] for name, leaf in batch.items()}
    )
    np.testing.assert_array_equal(again, tokens[order])


@pytest.mark.slow
def test_micro_batches_and_parts_of_a_rollout_change_nothing(parts, batch, rollout):
    params, rest = split(parts)
    own = method(updates_per_rollout=2, caption=dict(aggregation="token_mean"))
    slices = {"samples": rollout["samples"], "shared": {}, "update": 1}
    for name, (_, loss) in own.streams.items():
        whole, in_parts = (
            jax.jit(lambda p, loss=loss, n=n: gradients_of(loss, p, rest, slices, KEY, n)[:2])(params) for n in (1, 4)
        )
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(in_parts)):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=name)
    halves = method(updates_per_rollout=2, rollout_parts=2)
    made = jax.jit(lambda params, rest, rows: make_rollout(halves, params, rest, rows, KEY))(params, rest, batch)
    np.testing.assert_array_equal(made["samples"]["image_tokens"], rollout["samples"]["image_tokens"])
    np.testing.assert_allclose(made["samples"]["image_advantage"], rollout["samples"]["image_advantage"], atol=1e-3)


@pytest.mark.parametrize("aggregation", ["dr_grpo", "token_mean", "gspo"])
def test_other_aggregations_are_those_of_the_losses(parts, batch, rollout, aggregation):
    from uae_jax.rl.losses import token_grpo_loss

    own, (params, rest) = method(image=dict(aggregation=aggregation, kl_weight=0.0)), split(parts)
    samples = {name: leaf for name, leaf in rollout["samples"].items() if name != "image_reference"}
    total, count, _ = jax.jit(lambda p: own.image_loss(p, rest, {"samples": samples, "update": 1}, KEY))(params)
    scores = jax.jit(lambda p: own.score_images({**rest, **p}, samples, trained=True).log_probs)(params)
    rows = BATCH * GROUP * IMAGES
    expected = token_grpo_loss(
        scores.reshape(rows, -1),
        samples["image_old"].reshape(rows, -1),
        None,
        samples["image_advantage"].reshape(rows),
        jnp.ones((rows, CONFIG.vq.tokens), bool),
        clip_low=0.01,
        clip_high=0.01,
        aggregation=aggregation,
        max_tokens=CONFIG.vq.tokens,
    )
    np.testing.assert_allclose((total, count), expected[:2], rtol=1e-5, atol=1e-5)


def test_conditional_scores_are_those_of_the_captions_half(parts, rollout):
    samples = rollout["samples"]
    found = [
        jax.jit(lambda p, own=own: own.score_images(p, samples, trained=True).log_probs)(parts)
        for own in (method(score="conditional"), method(guidance_scale=1.0), method())
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert float(jnp.abs(found[0] - found[2]).max()) > 1e-2


@pytest.mark.trap(57)
@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_kl_of_a_new_policy_is_zero_and_only_it_is_trained(parts, batch, train):
    fresh = {name: part for name, part in parts.items() if name != "language_lora"}
    own = method(train=train)
    assert own.trains(own.settings) == ("language_lora" if train == "lora" else "language_policy",)
    state, metrics = stepped(own, fresh, batch)
    assert metrics["caption_kl"] == metrics["image_kl"] == 0
    assert metrics["image_grad_norm"] > 0 and metrics["caption_grad_norm"] > 0
    if train == "full":
        policy = flatten(state.params["language_policy"])
        still = {name for name, leaf in flatten(fresh["language"]).items() if np.array_equal(leaf, policy[name])}
        assert not {name for name in still if "layers" in name}


@pytest.mark.trap(54)
def test_no_gradient_reaches_what_is_frozen(parts, rollout):
    """Towers, aligners, image tokens' embedding and head, tokenizer: the step differentiates none of them."""
    own, (params, rest) = method(), split(parts)

    def changed(frozen_parts):
        slices = {"samples": rollout["samples"], "shared": {}, "update": 1}
        return gradients_of(own.image_loss, params, frozen_parts, slices, KEY, 1)[0]

    assert jax.eval_shape(changed, rest).keys() == {"language_lora"}
    copies = jax.tree.map(np.asarray, rest)
    stepped(own, parts, {"sample_id": np.arange(BATCH)} | _inputs(own, rollout))
    for name, leaf in flatten(copies).items():
        np.testing.assert_array_equal(leaf, flatten(rest)[name], err_msg=name)


def _inputs(own, rollout):
    ids, mask = pieces.right_padded([pieces.caption_prompts()[0]] * BATCH)
    return dict(pixels=np.zeros((BATCH, 32, 32, 3), np.uint8), prompt_ids=ids, prompt_mask=mask)


def test_no_logits_of_a_whole_sequence_exist(parts, rollout):
    """Neither stream holds `[rows, positions, vocabulary]`; the chunk is 3 positions."""
    own, (params, rest) = method(), split(parts)
    slices = {"samples": rollout["samples"], "shared": {}, "update": 1}
    text, codes = CONFIG.text.vocab_size, CONFIG.vq.codes
    for loss, positions, last in ((own.caption_loss, WORDS, text), (own.image_loss, CONFIG.vq.tokens, codes)):
        traced = jax.make_jaxpr(lambda p, loss=loss: gradients_of(loss, p, rest, slices, KEY, 1))(params)
        assert not {shape for shape in _shapes(traced.jaxpr) if shape[-1:] == (last,) and positions in shape[:-1]}


def _shapes(jaxpr) -> set[tuple[int, ...]]:
    found = {tuple(variable.aval.shape) for equation in jaxpr.eqns for variable in equation.outvars}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found |= _shapes(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.slow
def test_the_supervised_control_learns_the_data(parts, batch):
    own = method(objective="supervised", caption_dropout=0.5)
    first = stepped(own, parts, batch)[1]
    later = stepped(own, parts, batch, steps=6)[1]
    assert later["caption_loss"] < first["caption_loss"] - 0.05 and later["image_loss"] < first["image_loss"] - 0.02
    assert own.needs_captions(own.settings) and not method().needs_captions(method().settings)


def test_settings_that_contradict_each_other_are_told():
    with pytest.raises(ValueError, match="nothing is trained"):
        method(caption=dict(weight=0.0), image=dict(weight=0.0))
    with pytest.raises(ValueError, match="no caption scorer"):
        method(reward=dict(caption_weight=1.0))
    one = method(caption=dict(weight=0.0))
    assert set(one.streams) == {"image"}
    assert dataclasses.replace(one).streams["image"][0] == 1.0
