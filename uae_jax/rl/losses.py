"""Policy losses: GRPO for tokens, Flow-GRPO for denoising steps, DiffusionNFT for generated images.

Every loss returns `(sum, count, metrics)`. The loss of a global batch is the total of the sums, over micro-batches and
devices, divided by the total of the counts. Gradients are those of the sum, divided once by the total count. No split
of the batch then changes the result. Metrics are (sum, count) pairs, added up in the same way.

Shape letters: n samples, t caption tokens, w steps of the window, s either of both, d the dimensions of a latent.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

Scalar = Float32[Array, ""]
# (sum, count) of a metric
Pair = tuple[Scalar, Scalar]
Metrics = dict[str, Pair]

AGGREGATIONS = ("grpo", "dr_grpo", "token_mean", "gspo")
KL_ESTIMATORS = ("k1", "k2", "k3")

# exp of this is far outside any clip range, and still finite with its square in float32
_LOG_RATIO_BOUND = 20.0
# of the log-ratio to the reference, in a KL estimate
_KL_BOUND = 10.0


def _ratio(log_ratio: Float32[Array, "n s"]) -> Float32[Array, "n s"]:
    return jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND))


def clipped_surrogate(
    ratio: Float32[Array, "n s"],
    advantage: Float32[Array, "n 1"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float32[Array, "n s"]:
    """`max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))`.

    The gradient vanishes in two of four corners: A > 0 with rho above the range, A < 0 with rho below it. `dual_clip`,
    above 1 (3 in verl), also bounds the loss at `-A dual_clip` for A < 0.
    Source: arXiv 1707.06347, equation 7; arXiv 1912.09729, equation 5 (dual clip).
    """
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
    return loss


def kl_estimate(
    log_prob: Float[Array, "n t"], ref_log_prob: Float[Array, "n t"], estimator: str = "k3"
) -> Float32[Array, "n t"]:
    """Per-token estimate of KL(policy || reference), unbiased for samples of the present policy.

    With `d = ref_log_prob - log_prob`: "k1" is -d, "k2" is d^2 / 2, "k3" is exp(d) - d - 1, which is never negative.
    The value of d is bounded to [-10, 10], but its gradient passes straight through: a token far from the reference is
    still pulled back. Source: GRPO, arXiv 2402.03300, equation 4 (k3).

    Raises:
      ValueError: an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")
    d = jax.lax.stop_gradient(ref_log_prob.astype(jnp.float32)) - log_prob.astype(jnp.float32)
    d = d + jax.lax.stop_gradient(jnp.clip(d, -_KL_BOUND, _KL_BOUND) - d)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d**2
    return jnp.expm1(d) - d


def _ratio_metrics(
    ratio: Float32[Array, "n s"],
    advantage: Float32[Array, "n 1"],
    weight: Float32[Array, "n s"],
    clip_low: float,
    clip_high: float,
) -> Metrics:
    """Clip fractions by side, mean and largest |rho - 1|; weight is the 0/1 mask."""
    ratio = jax.lax.stop_gradient(ratio)
    deviation = jnp.abs(ratio - 1) * weight
    low = (advantage < 0) & (ratio < 1 - clip_low)
    high = (advantage > 0) & (ratio > 1 + clip_high)
    count = weight.sum()
    return {
        "clip_fraction_low": ((low * weight).sum(), count),
        "clip_fraction_high": ((high * weight).sum(), count),
        "ratio_deviation": (deviation.sum(), count),
        "ratio_deviation_max": (deviation.max(), jnp.ones(())),
    }


def gap_metrics(
    name: str, now: Float[Array, "*s"], sampled: Float[Array, "*s"], mask: Bool[Array, "*s"] | None = None
) -> Metrics:
    """How far scored values are from sampled ones: 0 but for rounding, before the first update of a rollout.

    Args:
      name: of the metric.
      now, sampled: what the loss scores, and what was sampled; no gradient flows.
      mask: False leaves an entry out; None takes all.

    Returns:
      `name`, the mean absolute difference, and `name`_max, the largest (averaged over micro-batches).
    """
    gap = jnp.abs(jax.lax.stop_gradient(now).astype(jnp.float32) - jax.lax.stop_gradient(sampled).astype(jnp.float32))
    if mask is not None:
        gap = jnp.where(mask, gap, 0.0)
    count = jnp.float32(gap.size) if mask is None else mask.sum(dtype=jnp.float32)
    return {name: (gap.sum(), count), f"{name}_max": (gap.max(), jnp.ones(()))}


def token_grpo_loss(
    log_prob: Float[Array, "n t"],
    old_log_prob: Float[Array, "n t"] | None,
    ref_log_prob: Float[Array, "n t"] | None,
    advantage: Float[Array, " n"],
    mask: Bool[Array, "n t"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "grpo",
    max_tokens: int | None = None,
    dual_clip: float | None = None,
    entropy: Float[Array, "n t"] | None = None,
) -> tuple[Scalar, Scalar, Metrics]:
    """GRPO on sampled tokens.

    Args:
      log_prob: of the sampled tokens under the policy, at the temperature of sampling; carries the gradient.
      old_log_prob: under the rollout policy; None for the first update of a rollout (ratio exactly 1, gradient
        `A grad log_prob`).
      ref_log_prob: under the reference; None without KL.
      advantage: of each sample.
      mask: True up to and including the first end token.
      clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high] (0.2 / 0.2; DAPO 0.2 / 0.28; for "gspo"
        3e-4 / 4e-4).
      kl_weight: weight of the KL estimate, added per token before the aggregation.
      kl_estimator: see `kl_estimate`.
      aggregation: with L the per-token loss and m the mask,
        "grpo": sum_i (sum_t m L / max(sum_t m, 1)), count n sequences;
        "dr_grpo": sum_it m L, count n * max_tokens (arXiv 2503.20783; not the padded width);
        "token_mean": sum_it m L, count sum_it m (DAPO, arXiv 2503.14476);
        "gspo": one ratio per sequence, exp(mean_t of log-ratios), count n (arXiv 2507.18071).
      max_tokens: the longest completion allowed, for "dr_grpo".
      dual_clip: see `clipped_surrogate`.
      entropy: of each token, for the metric only.

    Returns:
      Sum, count and metrics. With kl_weight 0, ratio 1 and "grpo" the value is 0 for normalised advantages while the
      gradient is not: watch the reward, not the loss. Metrics: clip_fraction_low, clip_fraction_high, ratio_deviation
      (per token; per sequence for "gspo"), ratio_deviation_max (averaged over micro-batches), kl and entropy if given.

    Raises:
      ValueError: an unknown aggregation, "dr_grpo" without `max_tokens`, or a KL weight without a reference.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
    if kl_weight and ref_log_prob is None:
        raise ValueError(f"kl_weight={kl_weight} needs ref_log_prob")
    weight = mask.astype(jnp.float32)
    lengths = jnp.maximum(weight.sum(axis=1), 1)
    # padding is selected away before any arithmetic: an infinity there must not reach a gradient
    log_prob = jnp.where(mask, log_prob.astype(jnp.float32), 0.0)
    old = log_prob if old_log_prob is None else jnp.where(mask, old_log_prob, 0.0)
    log_ratio = log_prob - jax.lax.stop_gradient(old)
    per_sample = jax.lax.stop_gradient(advantage.astype(jnp.float32))[:, None]
    ratio_weight = weight
    if aggregation == "gspo":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / lengths[:, None]
        ratio_weight = jnp.ones_like(per_sample)
    ratio = _ratio(log_ratio)
    loss = clipped_surrogate(ratio, per_sample, clip_low, clip_high, dual_clip)
    metrics = _ratio_metrics(ratio, per_sample, ratio_weight, clip_low, clip_high)
    # the loss of a sequence's ratio is spread over its tokens, whose mean gives it back
    loss = jnp.broadcast_to(loss, mask.shape) if aggregation == "gspo" else loss
    if ref_log_prob is not None:
        kl = kl_estimate(log_prob, jnp.where(mask, ref_log_prob, 0.0), kl_estimator)
        loss = loss + kl_weight * kl
        metrics["kl"] = (jax.lax.stop_gradient(kl).sum(), weight.sum())
    if entropy is not None:
        entropy = jax.lax.stop_gradient(jnp.where(mask, entropy, 0.0))
        metrics["entropy"] = (entropy.sum(), weight.sum())
    total, count = _aggregate(jnp.where(mask, loss, 0.0), weight, lengths, aggregation, max_tokens)
    return total, count, metrics


def _aggregate(
    loss: Float32[Array, "n t"],
    weight: Float32[Array, "n t"],
    lengths: Float32[Array, " n"],
    aggregation: str,
    max_tokens: int | None,
) -> tuple[Scalar, Scalar]:
    """Sum and count of per-token losses that are 0 outside the mask."""
    if aggregation in ("grpo", "gspo"):
        return (loss.sum(axis=1) / lengths).sum(), jnp.float32(loss.shape[0])
    if aggregation == "dr_grpo":
        if max_tokens is None:
            raise ValueError("dr_grpo needs max_tokens, the longest completion allowed")
        return loss.sum(), jnp.float32(loss.shape[0] * max_tokens)
    return loss.sum(), weight.sum()


def flow_grpo_loss(
    log_prob: Float[Array, "n w"],
    old_log_prob: Float[Array, "n w"] | None,
    advantage: Float[Array, " n"],
    *,
    clip_range: float,
    kl: Float[Array, "n w"] | None = None,
    kl_weight: float = 0.0,
    guard: bool = False,
    divergence_limit: float | None = None,
    mean_shift: Float[Array, "n w"] | None = None,
    std: Float[Array, " w"] | None = None,
    dt: Float[Array, " w"] | None = None,
) -> tuple[Scalar, Scalar, Metrics]:
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319), or Flow-DPPO (2606.11025).

    Args:
      log_prob: of the sampled steps, a mean over dimensions; carries the gradient.
      old_log_prob: the same under the rollout policy; None for the first update.
      advantage: of each sample.
      clip_range: the ratio's range is [1 - clip_range, 1 + clip_range]. docs/correctness.md has the rule for another
        resolution. GRPO-Guard's own is 2e-6.
      kl: `gaussian_kl` of each step, or None.
      kl_weight: its weight in the loss.
      guard: with `d = log_prob - old_log_prob`, use `log rho = S (d + mean_shift / (2 S^2))`, and divide the policy
        loss by -dt. The mean of this log rho is 0 under the rollout policy; plain d has mean -KL and meets the lower
        side of the range.
      divergence_limit: a mask in place of the clip (Flow-DPPO): a step is left out where the Gaussian KL to the rollout
        policy, `mean_shift / (2 S^2)`, is at least this, and its ratio has already moved as its advantage wants.
      mean_shift: mean over dimensions of `(mu - mu_old)^2`, with its gradient; for guard and mask.
      std: S of each step; for guard and mask.
      dt: next_sigma - sigma of each step, negative; for guard.

    Returns:
      Sum, count of steps, and metrics as in `token_grpo_loss`, per step.

    Raises:
      ValueError: guard or mask without its arrays, or a KL weight without kl.
    """
    if kl_weight and kl is None:
        raise ValueError(f"kl_weight={kl_weight} needs kl")
    log_prob = log_prob.astype(jnp.float32)
    log_ratio = log_prob - jax.lax.stop_gradient(log_prob if old_log_prob is None else old_log_prob)
    step_length = None
    if guard:
        if mean_shift is None or std is None or dt is None:
            raise ValueError("guard needs mean_shift, std and dt")
        log_ratio = std * log_ratio + mean_shift / (2 * std)
        step_length = -dt
    ratio = _ratio(log_ratio)
    per_sample = jax.lax.stop_gradient(advantage.astype(jnp.float32))[:, None]
    masked = None
    if divergence_limit is None:
        loss = clipped_surrogate(ratio, per_sample, clip_range, clip_range)
    else:
        if mean_shift is None or std is None:
            raise ValueError("divergence_limit needs mean_shift and std")
        far = jax.lax.stop_gradient(mean_shift) / (2 * std**2) >= divergence_limit
        masked = far & (jnp.sign(jax.lax.stop_gradient(ratio) - 1) * jnp.sign(per_sample) > 0)
        loss = jnp.where(masked, 0.0, -per_sample * ratio)
    if step_length is not None:
        loss = loss / step_length
    metrics = _ratio_metrics(ratio, per_sample, jnp.ones_like(ratio), clip_range, clip_range)
    count = jnp.float32(ratio.size)
    if masked is not None:
        metrics["masked_fraction"] = (masked.sum(dtype=jnp.float32), count)
    if kl is not None:
        loss = loss + kl_weight * kl
        metrics["kl"] = (jax.lax.stop_gradient(kl).sum(), count)
    return loss.sum(), count, metrics


def nft_loss(
    velocity: Float[Array, " n *d"],
    old_velocity: Float[Array, " n *d"] | None,
    target: Float[Array, " n *d"],
    sigma: Float[Array, " n"],
    advantage: Float[Array, " n"],
    *,
    strength: float = 1.0,
    advantage_bound: float = 5.0,
    reference: Float[Array, " n *d"] | None = None,
    kl_weight: float = 0.0,
) -> tuple[Scalar, Scalar, Metrics]:
    """DiffusionNFT (arXiv 2509.16117, algorithm 1) on noised generated images, with its self-normalised weight.

    With r = clip(A / advantage_bound, -1, 1) / 2 + 1/2, two implicit policies are matched to the generated image:
    `v_old + b (v - v_old)` with weight r, and `v_old - b (v - v_old)` with weight 1 - r. The squared error of the image
    that each implies is `s^2 mean (v - target)^2`. It is divided by its mean absolute error, without gradient.

    Args:
      velocity: prediction at the noised images; carries the gradient.
      old_velocity: the same by the rollout policy; None for the first update of a rollout.
      target: `flow.velocity_target` of generated image and noise.
      sigma: noise levels.
      advantage: of each sample.
      strength: b.
      advantage_bound: see above. It is also the factor of the policy loss, so that the gradient is that of
        advantage-weighted matching and does not depend on the bound.
      reference: prediction of the reference, or None.
      kl_weight: of the mean squared difference of velocity and reference.

    Returns:
      Sum, count and metrics: `velocity_shift`, the mean squared change since the rollout, and `kl`, the mean squared
      difference from the reference.

    Raises:
      ValueError: a KL weight without a reference.
    """
    _check_reference(kl_weight, reference)
    velocity, target = velocity.astype(jnp.float32), target.astype(jnp.float32)
    old = jax.lax.stop_gradient(velocity if old_velocity is None else old_velocity.astype(jnp.float32))
    share = jnp.clip(jax.lax.stop_gradient(advantage.astype(jnp.float32)) / advantage_bound, -1, 1) / 2 + 0.5
    change = strength * (velocity - old)
    axes = tuple(range(1, velocity.ndim))

    def error(implied: Float32[Array, " n *d"]) -> Float32[Array, " n"]:
        size = sigma * jnp.mean(jnp.abs(jax.lax.stop_gradient(implied) - target), axis=axes)
        return sigma**2 * jnp.mean((implied - target) ** 2, axis=axes) / jnp.maximum(size, 1e-5)

    loss = advantage_bound / strength * (share * error(old + change) + (1 - share) * error(old - change))
    return _with_reference(loss, velocity, old, reference, kl_weight)


def awm_loss(
    velocity: Float[Array, " n *d"],
    old_velocity: Float[Array, " n *d"] | None,
    target: Float[Array, " n *d"],
    sigma: Float[Array, " n"],
    advantage: Float[Array, " n"],
    *,
    advantage_bound: float = 5.0,
    reference: Float[Array, " n *d"] | None = None,
    kl_weight: float = 0.0,
) -> tuple[Scalar, Scalar, Metrics]:
    """Advantage-weighted matching (arXiv 2509.25050): `-A log p` with `log p := -4 s mean((v - target)^2)^(1/4)`.

    The fourth root makes large errors count less. The source multiplies by a ratio to the rollout policy, which is 1
    for the first update of a rollout and left out here.

    Args:
      velocity, old_velocity, target, sigma, advantage, reference, kl_weight: of `nft_loss`.
      advantage_bound: A is clipped to it and divided by it.

    Returns:
      As `nft_loss`.

    Raises:
      ValueError: a KL weight without a reference.
    """
    _check_reference(kl_weight, reference)
    velocity, target = velocity.astype(jnp.float32), target.astype(jnp.float32)
    old = jax.lax.stop_gradient(velocity if old_velocity is None else old_velocity.astype(jnp.float32))
    share = jnp.clip(jax.lax.stop_gradient(advantage.astype(jnp.float32)) / advantage_bound, -1, 1)
    error = jnp.mean((velocity - target) ** 2, axis=tuple(range(1, velocity.ndim)))
    log_prob = -4 * sigma * jnp.maximum(error, 1e-10) ** 0.25
    return _with_reference(-share * log_prob, velocity, old, reference, kl_weight)


def _check_reference(kl_weight: float, reference: Array | None) -> None:
    if kl_weight and reference is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference")


def _with_reference(
    loss: Float32[Array, " n"],
    velocity: Float32[Array, " n *d"],
    old: Float32[Array, " n *d"],
    reference: Float[Array, " n *d"] | None,
    kl_weight: float,
) -> tuple[Scalar, Scalar, Metrics]:
    """Sum, count and metrics of a loss with the KL of velocities."""
    axes, count = tuple(range(1, velocity.ndim)), jnp.float32(len(velocity))
    metrics = {"velocity_shift": (jnp.sum(jnp.mean((velocity - old) ** 2, axis=axes)), count)}
    if reference is not None:
        kl = jnp.mean((velocity - reference.astype(jnp.float32)) ** 2, axis=axes)
        loss = loss + kl_weight * kl
        metrics["kl"] = (jnp.sum(kl), count)
    return jnp.sum(loss), count, jax.lax.stop_gradient(metrics)
