"""Understanding for generation: the transformer learns to draw captions by Flow-GRPO (arXiv 2509.09666, section 3;
2505.05470).

The captioner, frozen, writes one caption of each of B images (a share of them may keep the data set's own); the
transformer draws it G times with stochastic steps inside a window; the reward is the similarity of drawing and image.
Shape letters: W steps of the window.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax import trees
from uae_jax.diffusion.sampler import Replay, Trajectory, replay_window, sample_window, window_start
from uae_jax.diffusion.steps import CpsStep, DanceStep, SdeStep, gaussian_kl
from uae_jax.models import uae
from uae_jax.models.qwen2_5_vl.sampling import SamplingConfig
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rl.advantages import check_group_size
from uae_jax.rl.captioning import caption_metrics, drawn_captions, sample_captions
from uae_jax.rl.losses import flow_grpo_loss, gap_metrics
from uae_jax.rl.reconstruction import (
    Context,
    Denoising,
    decode,
    encode_condition,
    initial_noise,
    predictor,
    sample_keys,
)
from uae_jax.rl.rewards import Encoder, RewardConfig, reward_advantages
from uae_jax.rl.step_sums import sum_over_steps

# what a rollout keeps of each step of the window, [N, W, ...]
STEP_FIELDS = ("latents", "next_latents", "velocity", "sampled_log_prob", "old_log_prob", "old_means", "reference")
STEP_RULES = {"sde": SdeStep, "dance": DanceStep, "cps": CpsStep}


@dataclasses.dataclass(frozen=True)
class FlowPolicy:
    """Everything of the stage that is not an array.

    Attributes:
      model, denoising, encoders, reward, stops, group_size, advantage_scale: as in `caption_policy.CaptionPolicy`.
      temperature, max_new_tokens: of the frozen captioner; temperature 0 is greedy.
      data_captions: share of the images, in [0, 1], whose caption is the data set's own instead of the captioner's.
      shared_noise: one initial noise for the drawings of a group, which then differ by the window's noise alone: what
        the advantage measures is what the loss trains (DanceGRPO, arXiv 2505.07818); Flow-GRPO draws one for each.
      step_rule, noise_level: stochastic step (`sde`, `dance`, `cps`) and its strength.
      window, window_low, window_high: W stochastic steps, beginning in [low, high - W] of the schedule.
      clip_range, kl_weight, guard: see `losses.flow_grpo_loss`.
      kl_kind: `gaussian`, `gaussian_nodt` or `velocity`.
      replay: score the rollout again for the old log-probabilities; not needed when each rollout has one update.
      gather_weights: see `captioning.sample_captions`.

    Raises:
      ValueError: a group of one, an unknown step rule, a window that does not fit, or a share outside [0, 1].
    """

    model: uae.UAE
    denoising: Denoising
    encoders: tuple[Encoder, ...]
    reward: RewardConfig
    stops: tuple[int, ...]
    group_size: int
    temperature: float
    max_new_tokens: int
    data_captions: float = 0.0
    shared_noise: bool = False
    step_rule: str = "sde"
    noise_level: float = 0.7
    window: int = 2
    window_low: int = 0
    window_high: int = 5
    advantage_scale: str = "batch"
    clip_range: float = 1e-4
    kl_weight: float = 0.0
    kl_kind: str = "gaussian_nodt"
    guard: bool = False
    replay: bool = False
    gather_weights: bool = False

    def __post_init__(self):
        check_group_size(self.group_size)
        if not 0 <= self.data_captions <= 1:
            raise ValueError(f"data_captions is {self.data_captions}; it is a share, from 0 to 1")
        if self.step_rule not in STEP_RULES:
            raise ValueError(f"step_rule is {self.step_rule!r}; choose one of {', '.join(STEP_RULES)}")
        if self.guard and self.step_rule == "cps":
            raise ValueError("guard needs the Gaussian log-probability of step_rule 'sde' or 'dance', not 'cps'")
        last = len(self.denoising.sigmas) - 2
        if not 0 <= self.window_low <= self.window_high - self.window or self.window_high > last or self.window < 1:
            raise ValueError(
                f"a window of {self.window} steps in [{self.window_low}, {self.window_high}] does not fit into the "
                f"first {last} of "
                f"{last + 1} steps; the last step is never trained"
            )

    @property
    def rule(self) -> SdeStep | DanceStep | CpsStep:
        """The stochastic step."""
        return STEP_RULES[self.step_rule](self.noise_level)


def rollout(policy: FlowPolicy, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
    """Captions, stochastic trajectories, rewards, advantages, and what the reference policy would have done.

    Args:
      policy: the stage.
      params: trainable parts of the model.
      frozen: the other parts.
      batch: B images with prompts (`data.loader`).
      key: of this step.

    Returns:
      `samples` with leading axis B * G, `shared` (step numbers of the window, negative context), and `metrics`.
    """
    parts, group, how = jax.lax.stop_gradient({**frozen, **params}), policy.group_size, policy.denoising
    completion = sample_captions(
        policy.model,
        parts,
        batch,
        key,
        max_new_tokens=policy.max_new_tokens,
        stops=policy.stops,
        sampling=SamplingConfig(policy.temperature),
        gather_weights=policy.gather_weights,
    )
    positive, negative = encode_condition(
        policy.model, parts, how, *drawn_captions(policy.data_captions, completion, batch, key)
    )
    positive = constrain_rows(jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), positive))
    noise = initial_noise(
        policy.model, trees.name_key(key, "noise"), batch["sample_id"], group, shared=policy.shared_noise
    )
    start = window_start(trees.name_key(key, "window"), policy.window_low, policy.window_high, policy.window)
    trajectory = sample_window(
        predictor(policy.model, parts, how, positive, negative),
        noise,
        jnp.asarray(how.sigmas),
        policy.rule,
        start,
        policy.window,
        sample_keys(trees.name_key(key, "steps"), batch["sample_id"], group),
    )
    pixels = decode(policy.model, parts, how, trajectory.final)
    advantage, metrics = reward_advantages(
        policy.reward, policy.encoders, parts["encoders"], batch["pixels"], pixels, group, policy.advantage_scale
    )
    samples, shared = stored(trajectory, positive, negative, advantage).values()
    samples |= scored(policy, parts, samples, shared)
    if policy.replay:
        metrics |= gap_metrics("log_prob_gap", samples["old_log_prob"], samples["sampled_log_prob"])
    metrics |= caption_metrics(completion, 1)
    return {"samples": constrain_rows(samples), "shared": shared, "metrics": metrics}


def stored(trajectory: Trajectory, positive: Context, negative: Context | None, advantage: Array) -> dict[str, dict]:
    """What a rollout keeps for its updates: `samples` with leading axis B * G, and what they share."""
    samples = {
        "latents": trajectory.latents.swapaxes(0, 1),
        "next_latents": trajectory.next_latents.swapaxes(0, 1),
        "velocity": trajectory.velocities.swapaxes(0, 1),
        "sampled_log_prob": trajectory.log_probs.T,
        "context": positive[0],
        "context_mask": positive[1],
        "advantage": advantage.reshape(-1),
    }
    return {"samples": samples, "shared": {"sigma_indices": trajectory.sigma_indices, "negative": negative}}


def replay(policy: FlowPolicy, parts: Mapping, samples: Mapping, shared: Mapping, *, trained: bool) -> Replay:
    """The window's steps scored by the policy or the reference: log-probabilities `[W, N]`, means `[W, N, h, w, C]`."""
    predict = predictor(
        policy.model,
        parts,
        policy.denoising,
        (samples["context"], samples["context_mask"]),
        shared["negative"],
        policy=trained,
        stop_negative_gradient=True,
    )
    return _scored_by(policy, predict, samples, shared)


def _replay_unchanged(policy: FlowPolicy, parts: Mapping, samples: Mapping, shared: Mapping) -> tuple[Replay, dict]:
    """`replay` of one step, W = 1, by the very parameters that sampled it, and how far it is from sampling.

    The value is then the velocity that was sampled with, and the gradient is that of the positive half of guidance
    times its scale: the negative half, which has none, is not evaluated again. So the metrics compare the velocities,
    and the log-probabilities that they imply, where there is no guidance; with guidance there is nothing to compare.
    """
    how, sampled = policy.denoising, samples["velocity"][:, 0]
    predict = predictor(
        policy.model,
        parts,
        dataclasses.replace(how, guidance_scale=1.0),
        (samples["context"], samples["context_mask"]),
        None,
    )
    velocity = predict(samples["latents"][:, 0], jnp.asarray(how.sigmas)[shared["sigma_indices"][0]])
    fixed = jax.lax.stop_gradient(velocity)
    now = _scored_by(policy, lambda *_: sampled + how.guidance_scale * (velocity - fixed), samples, shared)
    if how.guidance_scale != 1:
        return now, {}
    implied = _scored_by(policy, lambda *_: fixed, samples, shared).log_probs.T
    return now, gap_metrics("velocity_gap", fixed, sampled) | gap_metrics(
        "log_prob_gap", implied, samples["sampled_log_prob"]
    )


def _scored_by(
    policy: FlowPolicy, predict: Callable[[Array, Array], Array], samples: Mapping, shared: Mapping
) -> Replay:
    return replay_window(
        predict,
        samples["latents"].swapaxes(0, 1),
        samples["next_latents"].swapaxes(0, 1),
        shared["sigma_indices"],
        jnp.asarray(policy.denoising.sigmas),
        policy.rule,
    )


def scored(policy: FlowPolicy, parts: Mapping, samples: Mapping, shared: Mapping) -> dict[str, Array]:
    """What the loss compares with: the reference's steps for the KL and, replayed by the function that the loss uses,
    the old log-probabilities."""
    found = {}
    if policy.replay:
        old = replay(policy, parts, samples, shared, trained=True)
        found["old_log_prob"] = old.log_probs.T
        if policy.guard:
            found["old_means"] = old.means.swapaxes(0, 1)
    if policy.kl_weight:
        reference = replay(policy, parts, samples, shared, trained=False)
        found["reference"] = (reference.velocities if policy.kl_kind == "velocity" else reference.means).swapaxes(0, 1)
    return found


def _kl(policy: FlowPolicy, now: Replay, reference: Array) -> Array:
    """KL of each step `[N, W]`; `reference` is `[N, W, h, w, C]`."""

    def one(mean: Array, velocity: Array, std: Array, dt: Array, other: Array) -> Array:
        if policy.kl_kind == "velocity":
            return gaussian_kl(mean, mean, std, "velocity", velocity=velocity, velocity_ref=other)
        return gaussian_kl(mean, other, std, policy.kl_kind, dt=dt)

    return jax.vmap(one)(now.means, now.velocities, now.stds, now.dts, reference.swapaxes(0, 1)).T


def loss(
    policy: FlowPolicy, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array
) -> tuple[Array, Array, dict]:
    """The clipped loss of a window's steps; sum, count and metrics as `losses.flow_grpo_loss`.

    Without replay and guidance the metrics say how far velocities and log-probabilities are from those of sampling.
    """
    del key
    samples, shared = constrain_rows(rollout["samples"]), rollout["shared"]
    steps = {name: samples[name].swapaxes(0, 1) for name in STEP_FIELDS if name in samples}
    steps["sigma_indices"] = shared["sigma_indices"]

    def step_loss(params: Mapping, step: Mapping) -> tuple[Array, tuple[Array, dict]]:
        own = {name: value[:, None] for name, value in step.items() if name in STEP_FIELDS}
        index = {"sigma_indices": step["sigma_indices"][None]}
        total, count, metrics = _window_loss(policy, {**frozen, **params}, {**samples, **own}, {**shared, **index})
        return total, (count, metrics)

    total, (count, metrics) = sum_over_steps(step_loss, params, steps)
    largest = {name: (metrics[name][0].max(), metrics[name][1][0]) for name in metrics if name.endswith("_max")}
    return total, count.sum(), jax.tree.map(jnp.sum, metrics) | largest


def _window_loss(policy: FlowPolicy, parts: Mapping, samples: Mapping, shared: Mapping) -> tuple[Array, Array, dict]:
    """`loss` of the one step that `samples` and `shared` hold; without replay there has been no update since it was
    sampled.
    """
    if policy.replay:
        now, gaps = replay(policy, parts, samples, shared, trained=True), {}
    else:
        now, gaps = _replay_unchanged(policy, parts, samples, shared)
    kl = _kl(policy, now, samples["reference"]) if policy.kl_weight else None
    guard = {}
    if policy.guard:
        means = now.means.swapaxes(0, 1)
        old = samples["old_means"] if policy.replay else jax.lax.stop_gradient(means)
        guard = {
            "guard": True,
            "mean_shift": jnp.mean(jnp.square(means - old), axis=(2, 3, 4)),
            "std": now.stds,
            "dt": now.dts,
        }
    log_probs = now.log_probs.T
    total, count, metrics = flow_grpo_loss(
        log_probs,
        samples.get("old_log_prob"),
        samples["advantage"],
        clip_range=policy.clip_range,
        kl=kl,
        kl_weight=policy.kl_weight,
        **guard,
    )
    return total, count, metrics | gaps
