"""Flow-GRPO: the transformer learns by the clipped ratios of stochastic denoising steps.

Source: arXiv 2505.05470, with the window of Flow-GRPO-Fast and the options of DanceGRPO (arXiv 2505.07818) and
GRPO-Guard (arXiv 2510.22319). Each caption is denoised G times. The steps inside a window are stochastic, the others
deterministic. Departures:

1. A step's log-probability is a mean over latent values, as in the published code, not a sum.
2. With one update a rollout, the loss takes the sampled velocities for its values, so that the ratio is exactly 1 and
   the half of guidance without gradient is not evaluated again.
3. The gradient is taken one step of the window at a time, with the memory of one step (`rl.step_sums`).
4. With `one_replay`, the drawings of a starting noise part at the one stochastic step. The policy's mean at their
   common state serves all of them, in the rollout, in every update, and in the KL: one evaluation a starting noise, and
   not one a drawing. The gradient is the same (`diffusion.branching`).

5. With `dense_rewards` a step is paid what it adds to the drawing that the ODE would finish (DenseGRPO, arXiv
   2601.20218), normalised over the same step of the group.

Shape letters: N rows of a rollout, W steps of the window, m drawings of a row, `h w C` latents. A row is a drawing, or
with `one_replay` a starting noise with its m drawings.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.diffusion.branching import Branches, finish, sample_branches
from uae_jax.diffusion.sampler import Replay, Trajectory, replay_window, sample_window, window_start
from uae_jax.diffusion.steps import KL_KINDS, CpsStep, DanceStep, SdeStep, gaussian_kl
from uae_jax.methods.method import Loss
from uae_jax.methods.stage_settings import UpdateSettings
from uae_jax.methods.und_for_gen import DecoderMethod, DecoderMethodSettings, UndForGenConfig
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rl.advantages import SCALES, group_advantages
from uae_jax.rl.losses import Metrics, flow_grpo_loss, gap_metrics
from uae_jax.rl.step_sums import sum_over_steps
from uae_jax.rollouts.reconstruction import Context, initial_noise, predictor, sample_keys
from uae_jax.settings import changed, setting

STEP_RULES = {"sde": SdeStep, "dance": DanceStep, "cps": CpsStep}
# what a rollout keeps of each step of the window, [N, W, ...]; outcomes and their log-probabilities [N, W, m, ...]
STEP_FIELDS = (
    "latents",
    "next_latents",
    "velocity",
    "sampled_log_prob",
    "old_log_prob",
    "old_means",
    "reference",
)


@dataclasses.dataclass(frozen=True)
class FlowGrpoConfig(DecoderMethodSettings):
    """Settings of Flow-GRPO; published values where a source is named."""

    updates_per_rollout: int = changed(UpdateSettings, "updates_per_rollout", 2, source="arXiv 2505.05470")
    guidance_scale: float = setting(1.0, "of the rollouts; 1 is without guidance", low=0)
    shared_noise: bool = setting(
        False,
        "one starting noise for the images of a group, which then differ by the window's noise alone (DanceGRPO)",
        source="arXiv 2505.05470",
    )
    one_replay: bool = setting(
        False,
        "the drawings of a starting noise part at the window's only step, and one evaluation there replays them all",
    )
    starts: int = setting(
        1, "starting noises of a group with one_replay; a drawing is compared with those of its own start", low=1
    )
    dense_rewards: bool = setting(
        False,
        "a step is paid what it adds to the reward of the drawing that the ODE finishes from there; a finished drawing "
        "more for each stochastic step",
        source="arXiv 2601.20218",
    )
    step_rule: str = setting("cps", "stochastic step", choices=tuple(STEP_RULES), source="Flow-GRPO-Fast")
    noise_level: float = setting(0.8, "strength of the stochastic step", above=0, source="Flow-GRPO-Fast")
    window: int = setting(3, "stochastic steps", low=1, source="Flow-GRPO-Fast")
    window_low: int = setting(0, "first step at which the window may begin", low=0)
    window_high: int = setting(5, "step before which the window ends; the last step is never trained", low=1)
    clip_range: float = setting(1e-5, "the ratio is clipped to 1 +- clip_range", above=0, source="Flow-GRPO-Fast")
    # training without guidance is scored with guidance too; that needs a KL of velocities, which 0 does not give
    kl_weight: float = setting(
        4e-4, "weight of the KL to the reference policy", low=0, source="flow_grpo issues 198 and 204"
    )
    kl_kind: str = setting("velocity", "how that KL is measured, see diffusion.steps", choices=KL_KINDS)
    trust_region: str = setting(
        "clip", "what bounds an update: the clipped ratio, or the mask of Flow-DPPO", choices=("clip", "dppo")
    )
    # 1e-5 at 65,536 latent values; the same nats over fewer values are a greater mean (docs/correctness.md)
    divergence_limit: float = setting(
        1e-5,
        "KL to the rollout policy, a mean over latent values, from which dppo masks",
        above=0,
        source="arXiv 2606.11025",
    )
    grpo_guard: bool = setting(False, "ratio normalisation and step weights of GRPO-Guard", source="arXiv 2510.22319")
    advantage_scale: str = setting("batch", "what advantages are divided by", choices=SCALES, source="arXiv 2505.05470")

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and a guard without a Gaussian log-probability."""
        yield from super().problems()
        if self.grpo_guard and self.step_rule == "cps":
            yield "grpo_guard needs the Gaussian log-probability of step_rule 'sde' or 'dance', not 'cps'"
        if self.trust_region == "dppo" and (self.step_rule == "cps" or self.grpo_guard):
            yield "trust_region 'dppo' needs the ratio of step_rule 'sde' or 'dance', without grpo_guard"
        if self.one_replay and self.window != 1:
            yield f"one_replay is on and window is {self.window}; drawings share the state of one step: set window to 1"
        if self.one_replay and self.dense_rewards:
            yield "dense_rewards changes nothing with one_replay, whose drawings share the state before the only step"
        if self.shuffled_rewards and self.dense_rewards:
            yield "shuffled_rewards is a control of rewards of whole drawings; set dense_rewards to False"
        if self.starts > 1 and not self.one_replay:
            yield f"starts is {self.starts}; several starting noises of a group need one_replay"

    def stage_problems(self, stage: UndForGenConfig) -> Iterator[str]:
        """A window that does not fit into the stage's denoising steps."""
        last = stage.sampler_steps - 1
        if self.window_low > self.window_high - self.window or self.window_high > last:
            yield (
                f"window is {self.window} steps in [{self.window_low}, {self.window_high}]; it does not fit into the "
                f"first {last} of {stage.sampler_steps} denoising steps; the last step is never trained"
            )
        if stage.group_size % self.starts or stage.group_size < 2 * self.starts:
            yield (
                f"starts is {self.starts}; the {stage.group_size} drawings of a group must divide into as many parts "
                "of two or more"
            )

    def rows_of(self, group_size: int) -> int:
        """A row is a starting noise with its drawings where these share a replay."""
        return self.starts if self.one_replay else group_size

    def compared_of(self, group_size: int) -> int:
        """The drawings of one starting noise where these share a replay."""
        return group_size // self.starts if self.one_replay else group_size

    @property
    def keeps_means(self) -> bool:
        """Whether the loss compares the means of the policy with those of the rollout."""
        return self.grpo_guard or self.trust_region == "dppo"

    @property
    def kept_steps(self) -> int:
        """Latents that a rollout keeps of an image."""
        return self.window

    @property
    def rule(self) -> SdeStep | DanceStep | CpsStep:
        """The stochastic step."""
        return STEP_RULES[self.step_rule](self.noise_level)


@dataclasses.dataclass(frozen=True)
class FlowGrpo(DecoderMethod):
    """The method; a `methods.method.Method`."""

    Settings: ClassVar[type] = FlowGrpoConfig

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Captions, stochastic trajectories, rewards, and what the reference would have done.

        Args:
          params: trained parts of the model; frozen: the other parts.
          batch: B images with prompts (`data.loader`).
          key: of this step.

        Returns:
          `samples` with leading axis N, `shared` (step numbers of the window, negative context), and `metrics`.
        """
        parts, own, model = jax.lax.stop_gradient({**frozen, **params}), self.own, self.system.model
        sample_ids, rows = batch["sample_id"], self.settings.samples_per_image
        positive, negative, caption_metrics = self.contexts(parts, batch, key)
        shared_noise = rows == 1 or (own.shared_noise and not own.one_replay)
        noise = initial_noise(model, trees.name_key(key, "noise"), sample_ids, rows, shared=shared_noise)
        start = window_start(trees.name_key(key, "window"), own.window_low, own.window_high, own.window)
        keys = sample_keys(trees.name_key(key, "steps"), sample_ids, self.settings.group_size)
        samples, final, indices = self.play(parts, positive, negative, noise, start, keys)
        reward, metrics = self.rewards(parts, batch["pixels"], final)
        reward = self.paid(reward, sample_ids, key)
        if own.dense_rewards:
            predict = predictor(model, parts, self.denoising, positive, negative)
            reward = self.dense(parts, batch["pixels"], predict, samples, indices, reward)
        samples |= {"reward": reward.reshape(len(noise), -1) if own.one_replay else reward}
        shared = {"sigma_indices": indices, "negative": negative}
        context = {"context": positive[0], "context_mask": positive[1]}
        samples |= self.compared(parts, samples | context, shared)
        if self.replay:
            metrics |= gap_metrics("log_prob_gap", samples["old_log_prob"], samples["sampled_log_prob"])
        rollout = {"samples": constrain_rows(samples), "shared": shared, "metrics": metrics | caption_metrics}
        return self.keep_contexts(rollout, positive)

    def play(
        self,
        parts: Mapping,
        context: Context,
        negative: Context | None,
        noise: Float[Array, "n h w c"],
        start: Array,
        keys: Array,
    ) -> tuple[dict[str, Array], Float[Array, "drawings h w c"], Array]:
        """Draws the rows of a rollout.

        Args:
          parts: the model.
          context: of the rows; negative: of the negative prompt, or None.
          noise: initial latents of the rows.
          start: the first stochastic step.
          keys: one a drawing, those of a row together.

        Returns:
          What is kept of the rows, `STEP_FIELDS`; the final latents of all drawings; and the window's step numbers.
        """
        how, rule = self.denoising, self.own.rule
        sigmas, predict = jnp.asarray(how.sigmas), predictor(self.system.model, parts, how, context, negative)
        if not self.own.one_replay:
            trajectory = sample_window(predict, noise, sigmas, rule, start, self.own.window, keys)
            return kept(trajectory), trajectory.final, trajectory.sigma_indices
        keys = keys.reshape(len(noise), -1)
        members = constrain_rows(jax.tree.map(lambda leaf: leaf.repeat(keys.shape[1], axis=0), context))
        predict_members = predictor(self.system.model, parts, how, members, negative)
        branches = sample_branches(predict, predict_members, noise, sigmas, rule, start, keys)
        return kept_branches(branches), branches.final, start[None]

    def dense(
        self,
        parts: Mapping,
        original: Float[Array, "b H W 3"],
        predict: Callable[[Array, Array], Array],
        samples: Mapping,
        indices: Array,
        reward: Float[Array, " n"],
    ) -> Float[Array, "n steps_and_one"]:
        """Rewards `[N, W + 1]` of what the ODE makes of the state before each step, and of the drawings at last."""

        def finished(step: tuple[Array, Array]) -> Array:
            final = finish(predict, step[0], jnp.asarray(self.denoising.sigmas), step[1])
            return self.rewards(parts, original, final)[0]

        before = jax.lax.map(finished, (samples["latents"].swapaxes(0, 1), indices))
        return jnp.concatenate([before, reward[None]]).T

    @property
    def advantages(self) -> Callable[[Array], tuple[dict[str, Array], Metrics]] | None:
        """Advantages of a method's own, of `dense_rewards`; None leaves those of whole drawings."""
        return self.dense_advantages if self.own.dense_rewards else None

    def dense_advantages(self, reward: Float[Array, "n steps_and_one"]) -> tuple[dict[str, Array], Metrics]:
        """Advantages `[N, W]` of each step over the same step of its group; metrics are of the drawings."""
        group, scale = self.settings.compared_samples, self.own.advantage_scale
        gained = jnp.diff(reward, axis=1).T.reshape(self.own.window, -1, group)
        found = jax.vmap(lambda step: group_advantages(step, scale=scale)[0])(gained)
        _, metrics = group_advantages(reward[:, -1].reshape(-1, group), scale=scale)
        metrics = {"reward" if name == "reward_mean" else name: pair for name, pair in metrics.items()}
        return {"advantage": found.reshape(self.own.window, -1).T}, metrics

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The clipped loss of a window's steps; sum, count and metrics as `losses.flow_grpo_loss`.

        Without replay and guidance, metrics compare velocities and log-probabilities with those of sampling.
        """
        samples, shared = constrain_rows(self.with_contexts(rollout)), rollout["shared"]
        fields = (*STEP_FIELDS, "advantage") if self.own.dense_rewards else STEP_FIELDS
        steps: dict[str, Array] = {name: samples[name].swapaxes(0, 1) for name in fields if name in samples}
        steps["sigma_indices"] = shared["sigma_indices"]

        def step_loss(params: Mapping, step: Mapping) -> tuple[Array, tuple[Array, Mapping]]:
            one = {name: value[:, None] for name, value in step.items() if name in fields}
            index = {"sigma_indices": step["sigma_indices"][None]}
            total, count, metrics = self.step_loss({**frozen, **params}, {**samples, **one}, {**shared, **index})
            return total, (count, metrics)

        total, (count, metrics) = sum_over_steps(step_loss, params, steps)
        largest = {name: (metrics[name][0].max(), metrics[name][1][0]) for name in metrics if name.endswith("_max")}
        return total, count.sum(), jax.tree.map(jnp.sum, metrics) | largest

    def step_loss(self, parts: Mapping, samples: Mapping, shared: Mapping) -> Loss:
        """`loss` of the one step, W = 1, that `samples` and `shared` hold."""
        own, advantage = self.own, samples["advantage"].reshape(-1)
        if self.replay:
            now, gaps = self.replayed(parts, samples, shared, trained=True), {}
        else:
            now, gaps = self.replayed_unchanged(parts, samples, shared)
        members = len(advantage) // len(samples["latents"])

        def each(of_rows: Float[Array, "n 1"]) -> Float[Array, "drawings 1"]:
            return of_rows.repeat(members, axis=0)

        kl = each(step_kl(own.kl_kind, now, samples["reference"])) if own.kl_weight else None
        bounds, old = {}, samples.get("old_log_prob")
        if own.keeps_means:
            means = now.means.swapaxes(0, 1)
            before = samples["old_means"] if self.replay else jax.lax.stop_gradient(means)
            shift = each(jnp.mean(jnp.square(means - before), axis=(2, 3, 4)))
            bounds = {"guard": own.grpo_guard, "mean_shift": shift, "std": now.stds, "dt": now.dts}
            bounds |= {"divergence_limit": own.divergence_limit} if own.trust_region == "dppo" else {}
        total, count, metrics = flow_grpo_loss(
            now.log_probs.reshape(-1, 1),
            None if old is None else old.reshape(-1, 1),
            advantage,
            clip_range=own.clip_range,
            kl=kl,
            kl_weight=own.kl_weight,
            **bounds,
        )
        return total, count, metrics | gaps

    def compared(self, parts: Mapping, samples: Mapping, shared: Mapping) -> dict[str, Array]:
        """What the loss compares with: the reference's steps for the KL, and the replayed old log-probabilities."""
        found = {}
        if self.replay:
            old = self.replayed(parts, samples, shared, trained=True)
            found["old_log_prob"] = old.log_probs.swapaxes(0, 1)
            if self.own.keeps_means:
                found["old_means"] = old.means.swapaxes(0, 1)
        if self.own.kl_weight:
            reference = self.replayed(parts, samples, shared, trained=False)
            values = reference.velocities if self.own.kl_kind == "velocity" else reference.means
            found["reference"] = values.swapaxes(0, 1)
        return found

    def replayed(self, parts: Mapping, samples: Mapping, shared: Mapping, *, trained: bool) -> Replay:
        """The window's steps by the policy or the reference: log-probabilities `[W, N]`, means `[W, N, h, w, C]`.

        With `one_replay` the log-probabilities are `[W, N, m]`.
        """
        predict = predictor(
            self.system.model,
            parts,
            self.denoising,
            (samples["context"], samples["context_mask"]),
            shared["negative"],
            policy=trained,
            stop_negative_gradient=True,
        )
        return self.scored_by(predict, samples, shared)

    def replayed_unchanged(self, parts: Mapping, samples: Mapping, shared: Mapping) -> tuple[Replay, dict]:
        """`replayed` of one step, W = 1, by the very parameters that sampled it, with the gap to sampling.

        The value is the sampled velocity. The gradient is that of the positive half of guidance times its scale; the
        negative half has none. The metrics compare where there is no guidance, and are empty otherwise.
        """
        how, sampled = self.denoising, samples["velocity"][:, 0]
        context, unguided = (samples["context"], samples["context_mask"]), dataclasses.replace(how, guidance_scale=1.0)
        predict = predictor(self.system.model, parts, unguided, context, None)
        velocity = predict(samples["latents"][:, 0], jnp.asarray(how.sigmas)[shared["sigma_indices"][0]])
        fixed = jax.lax.stop_gradient(velocity)
        now = self.scored_by(lambda *_: sampled + how.guidance_scale * (velocity - fixed), samples, shared)
        if how.guidance_scale != 1:
            return now, {}
        implied = self.scored_by(lambda *_: fixed, samples, shared).log_probs.swapaxes(0, 1)
        gaps = gap_metrics("velocity_gap", fixed, sampled)
        return now, gaps | gap_metrics("log_prob_gap", implied, samples["sampled_log_prob"])

    def scored_by(self, predict: Callable[[Array, Array], Array], samples: Mapping, shared: Mapping) -> Replay:
        """The window's steps as a velocity function scores them."""
        return replay_window(
            predict,
            samples["latents"].swapaxes(0, 1),
            samples["next_latents"].swapaxes(0, 1),
            shared["sigma_indices"],
            jnp.asarray(self.denoising.sigmas),
            self.own.rule,
        )


def kept(trajectory: Trajectory) -> dict[str, Array]:
    """What a rollout keeps of N trajectories: leaves `[N, W, ...]`."""
    return {
        "latents": trajectory.latents.swapaxes(0, 1),
        "next_latents": trajectory.next_latents.swapaxes(0, 1),
        "velocity": trajectory.velocities.swapaxes(0, 1),
        "sampled_log_prob": trajectory.log_probs.T,
    }


def kept_branches(branches: Branches) -> dict[str, Array]:
    """What a rollout keeps of rows that part at one step: leaves `[N, 1, ...]`, of outcomes `[N, 1, m, ...]`."""
    names = ("latents", "velocity", "next_latents", "sampled_log_prob")
    return {name: leaf[:, None] for name, leaf in zip(names, branches)}


def step_kl(kind: str, now: Replay, reference: Float[Array, "n steps *d"]) -> Float[Array, "n steps"]:
    """KL of each step `[N, W]` to a reference `[N, W, h, w, C]`, of means or, for `velocity`, of velocities."""

    def one(mean: Array, velocity: Array, std: Array, dt: Array, other: Array) -> Array:
        if kind == "velocity":
            return gaussian_kl(mean, mean, std, "velocity", velocity=velocity, velocity_ref=other)
        return gaussian_kl(mean, other, std, kind, dt=dt)

    return jax.vmap(one)(now.means, now.velocities, now.stds, now.dts, reference.swapaxes(0, 1)).T
