"""Policy losses: GRPO for tokens, Flow-GRPO for denoising steps, DiffusionNFT for drawings.

Every loss returns `(sum, count, metrics)`. The loss of a global batch is
`sum of sums / sum of counts` over all its micro-batches and devices; take gradients of the sum
and divide by the total count once, and no split of the batch changes the result. Metrics are
(sum, count) pairs, added up in the same way.
"""

import math

import jax
import jax.numpy as jnp

AGGREGATIONS = ("grpo", "dr_grpo", "token_mean", "gspo")
KL_ESTIMATORS = ("k1", "k2", "k3")

# exp of this is far outside any clip range, and still finite with its square in float32.
_LOG_RATIO_BOUND = 20.0


def _ratio(log_ratio):
    return jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND))


def clipped_surrogate(ratio, advantage, clip_low, clip_high, dual_clip=None):
    """`max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))`, shaped as ratio.

    The gradient vanishes in two of four corners: A > 0 with rho above the range, A < 0 with rho
    below it. dual_clip (a number above 1, 3 in verl) also bounds the loss at `-A dual_clip` for
    A < 0. Source: arXiv 1707.06347, equation 7; arXiv 1912.09729, equation 5 (dual clip).
    """
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
    return loss


def kl_estimate(log_prob, ref_log_prob, estimator: str = "k3", bound: float = 10.0):
    """Per-token estimate of KL(policy || reference) on tokens the policy sampled.

    With `d = ref_log_prob - log_prob`: "k1" is -d, "k2" is d^2 / 2, "k3" is exp(d) - d - 1, which
    is never negative. d is bounded to +-bound in value, but its gradient passes straight through,
    so that a token far from the reference is still pulled back. Unbiased only for samples of the
    present policy. Source: GRPO, arXiv 2402.03300, equation 4 (k3).

    Args:
      log_prob, ref_log_prob: any one shape.

    Returns:
      float32 of that shape.

    Raises:
      ValueError: for an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")
    d = jax.lax.stop_gradient(ref_log_prob.astype(jnp.float32)) - log_prob.astype(jnp.float32)
    d = d + jax.lax.stop_gradient(jnp.clip(d, -bound, bound) - d)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d**2
    return jnp.expm1(d) - d


def _ratio_metrics(ratio, advantage, weight, clip_low, clip_high):
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


def gap_metrics(name: str, now, sampled, mask=None) -> dict:
    """How far what a loss scores is from what was sampled: 0 but for rounding while parameters are those of sampling.

    Args:
      name: of the metric.
      now, sampled: any one shape; no gradient flows.
      mask: bool of that shape, False leaves an entry out; None takes all.

    Returns:
      `name`, the mean absolute difference, and `name`_max, the largest (averaged over micro-batches), as (sum, count)
      pairs.
    """
    gap = jnp.abs(jax.lax.stop_gradient(now).astype(jnp.float32) - jax.lax.stop_gradient(sampled).astype(jnp.float32))
    if mask is not None:
        gap = jnp.where(mask, gap, 0.0)
    count = jnp.float32(gap.size) if mask is None else mask.sum(dtype=jnp.float32)
    return {name: (gap.sum(), count), f"{name}_max": (gap.max(), jnp.ones(()))}


def token_grpo_loss(
    log_prob,
    old_log_prob,
    ref_log_prob,
    advantage,
    mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "grpo",
    max_tokens: int | None = None,
    dual_clip: float | None = None,
    entropy=None,
):
    """GRPO on sampled tokens.

    Args:
      log_prob: log-probabilities of the sampled tokens under the policy, at the temperature they
        were sampled with, [N, T]; carries the gradient.
      old_log_prob: the same under the rollout policy [N, T]; None for the first update of a
        rollout (ratio exactly 1, gradient `A grad log_prob`).
      ref_log_prob: under the reference [N, T]; None without KL.
      advantage: [N].
      mask: [N, T], True up to and including the first end token.
      clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high]
        (0.2 / 0.2; DAPO 0.2 / 0.28; for "gspo" 3e-4 / 4e-4).
      kl_weight: weight of the KL estimate, added per token before the aggregation.
      kl_estimator: see `kl_estimate`.
      aggregation: with L the per-token loss, m the mask,
        "grpo": sum_i (sum_t m L / max(sum_t m, 1)), count N sequences;
        "dr_grpo": sum_it m L, count N * max_tokens (arXiv 2503.20783; not the padded width);
        "token_mean": sum_it m L, count sum_it m (DAPO, arXiv 2503.14476);
        "gspo": one ratio a sequence, exp(mean_t of log ratios), count N (arXiv 2507.18071).
      max_tokens: the longest completion allowed, for "dr_grpo".
      dual_clip: see `clipped_surrogate`.
      entropy: optional [N, T], only for the metric.

    Returns:
      (sum float32 [], count float32 [], metrics). With kl_weight 0, ratio 1 and "grpo" the value
      is 0 for normalised advantages while the gradient is not: watch the reward, not the loss.
      Metrics: clip_fraction_low, clip_fraction_high, ratio_deviation (per token; per sequence
      for "gspo"), ratio_deviation_max (averaged over micro-batches), kl and entropy when given.

    Raises:
      ValueError: for an unknown aggregation, "dr_grpo" without max_tokens, or a KL weight without
        a reference.
    """
    _check_token_options(aggregation, max_tokens, kl_weight, ref_log_prob)
    weight = mask.astype(jnp.float32)
    lengths = jnp.maximum(weight.sum(axis=1), 1)
    # Padding is selected away before any arithmetic: an infinity there must not reach a gradient.
    log_prob = jnp.where(mask, log_prob.astype(jnp.float32), 0.0)
    old = log_prob if old_log_prob is None else jnp.where(mask, old_log_prob, 0.0)
    log_ratio = log_prob - jax.lax.stop_gradient(old)
    advantage = jax.lax.stop_gradient(advantage.astype(jnp.float32))[:, None]
    ratio_weight = weight
    if aggregation == "gspo":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / lengths[:, None]
        ratio_weight = jnp.ones_like(advantage)
    ratio = _ratio(log_ratio)
    loss = clipped_surrogate(ratio, advantage, clip_low, clip_high, dual_clip)
    metrics = _ratio_metrics(ratio, advantage, ratio_weight, clip_low, clip_high)
    # A sequence ratio's loss is spread over the tokens, whose mean gives it back.
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


def _check_token_options(aggregation, max_tokens, kl_weight, ref_log_prob):
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
    if aggregation == "dr_grpo" and max_tokens is None:
        raise ValueError("dr_grpo needs max_tokens, the longest completion allowed")
    if kl_weight and ref_log_prob is None:
        raise ValueError(f"kl_weight={kl_weight} needs ref_log_prob")


def _aggregate(loss, weight, lengths, aggregation, max_tokens):
    """(sum, count) of per-token losses [N, T] that are 0 outside the mask."""
    if aggregation in ("grpo", "gspo"):
        return (loss.sum(axis=1) / lengths).sum(), jnp.float32(loss.shape[0])
    if aggregation == "dr_grpo":
        return loss.sum(), jnp.float32(loss.shape[0] * max_tokens)
    return loss.sum(), weight.sum()


def flow_grpo_loss(
    log_prob,
    old_log_prob,
    advantage,
    *,
    clip_range: float,
    kl=None,
    kl_weight: float = 0.0,
    guard: bool = False,
    mean_shift=None,
    std=None,
    dt=None,
    mask=None,
):
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470), or GRPO-Guard (arXiv 2510.22319).

    Args:
      log_prob: mean-over-dimensions log-probabilities of the sampled steps [N, W]; carries the
        gradient.
      old_log_prob: the same under the rollout policy [N, W]; None for the first update.
      advantage: [N].
      clip_range: the ratio's range is [1 - clip_range, 1 + clip_range]; see `clip_range_for`.
        GRPO-Guard's own is 2e-6.
      kl: `gaussian_kl` of each step [N, W], or None.
      kl_weight: its weight in the loss.
      guard: with `d = log_prob - old_log_prob`, use
        `log rho = S (d + mean_shift / (2 S^2))`, whose mean is 0 under the rollout policy (plain
        d has mean -KL and trips the lower side), and divide the policy loss by -dt.
      mean_shift: mean over dimensions of `(mu - mu_old)^2` [N, W], with its gradient; std: S [W];
        dt: next_sigma - sigma [W], negative; all for guard, SDE rules only.
      mask: bool [N] or [N, W]; False leaves a sample or step out of sum and count.

    Returns:
      (sum float32 [], count float32 [] of steps, metrics as in `token_grpo_loss`, per step).

    Raises:
      ValueError: for guard without its three arrays, or a KL weight without kl.
    """
    if guard and (mean_shift is None or std is None or dt is None):
        raise ValueError("guard needs mean_shift, std and dt")
    if kl_weight and kl is None:
        raise ValueError(f"kl_weight={kl_weight} needs kl")
    keep = jnp.ones(log_prob.shape, bool) if mask is None else _step_mask(mask, log_prob.shape)
    weight = keep.astype(jnp.float32)
    log_prob = jnp.where(keep, log_prob.astype(jnp.float32), 0.0)
    old = log_prob if old_log_prob is None else jnp.where(keep, old_log_prob, 0.0)
    log_ratio = log_prob - jax.lax.stop_gradient(old)
    if guard:
        log_ratio = std * log_ratio + jnp.where(keep, mean_shift, 0.0) / (2 * std)
    ratio = _ratio(log_ratio)
    advantage = jax.lax.stop_gradient(advantage.astype(jnp.float32))[:, None]
    advantage = jnp.where(keep, advantage, 0.0)
    loss = clipped_surrogate(ratio, advantage, clip_range, clip_range)
    if guard:
        loss = loss / -dt
    metrics = _ratio_metrics(ratio, advantage, weight, clip_range, clip_range)
    if kl is not None:
        kl = jnp.where(keep, kl, 0.0)
        loss = loss + kl_weight * kl
        metrics["kl"] = (jax.lax.stop_gradient(kl).sum(), weight.sum())
    return loss.sum(), weight.sum(), metrics


def nft_loss(
    velocity,
    old_velocity,
    target,
    sigma,
    advantage,
    *,
    strength: float = 1.0,
    advantage_bound: float = 5.0,
    reference=None,
    kl_weight: float = 0.0,
):
    """DiffusionNFT (arXiv 2509.16117, algorithm 1) on noised drawings, with its self-normalised weight.

    With r = clip(A / advantage_bound, -1, 1) / 2 + 1/2 the implicit policies
    `v_old + b (v - v_old)` and `v_old - b (v - v_old)` are matched to the drawing with weights r
    and 1 - r. The squared error of the image that each implies, `s^2 mean (v - target)^2`, is
    divided by its mean absolute error, without gradient.

    Args:
      velocity: prediction at the noised drawings [N, ...]; carries the gradient.
      old_velocity: the same by the rollout policy; None for the first update of a rollout.
      target: `flow.velocity_target` of drawing and noise [N, ...].
      sigma: noise levels [N].
      advantage: [N].
      strength: b.
      advantage_bound: see above; also the factor of the policy loss, so that its gradient is that
        of advantage-weighted matching and does not depend on the bound.
      reference: prediction of the reference [N, ...], or None.
      kl_weight: of the mean squared difference of velocity and reference.

    Returns:
      (sum float32 [], count float32 [], metrics): `velocity_shift`, the mean squared change since
      the rollout, and `kl`, the mean squared difference from the reference.

    Raises:
      ValueError: a KL weight without a reference.
    """
    if kl_weight and reference is None:
        raise ValueError(f"kl_weight={kl_weight} needs reference")
    velocity, target = velocity.astype(jnp.float32), target.astype(jnp.float32)
    old = jax.lax.stop_gradient(velocity if old_velocity is None else old_velocity.astype(jnp.float32))
    share = jnp.clip(jax.lax.stop_gradient(advantage.astype(jnp.float32)) / advantage_bound, -1, 1) / 2 + 0.5
    change = strength * (velocity - old)
    axes, count = tuple(range(1, velocity.ndim)), jnp.float32(len(velocity))

    def error(implied):
        size = sigma * jnp.mean(jnp.abs(jax.lax.stop_gradient(implied) - target), axis=axes)
        return sigma**2 * jnp.mean((implied - target) ** 2, axis=axes) / jnp.maximum(size, 1e-5)

    loss = advantage_bound / strength * (share * error(old + change) + (1 - share) * error(old - change))
    metrics = {"velocity_shift": (jnp.sum(jnp.mean((velocity - old) ** 2, axis=axes)), count)}
    if reference is not None:
        kl = jnp.mean((velocity - reference.astype(jnp.float32)) ** 2, axis=axes)
        loss = loss + kl_weight * kl
        metrics["kl"] = (jnp.sum(kl), count)
    return jnp.sum(loss), count, jax.lax.stop_gradient(metrics)


def _step_mask(mask, shape):
    mask = jnp.asarray(mask, bool)
    return jnp.broadcast_to(mask[:, None] if mask.ndim == 1 else mask, shape)


def clip_range_for(dimensions: int, reference: float = 1e-4) -> float:
    """The clip range for latents of another size: `reference * sqrt(65536 / dimensions)`.

    The step's log-probability is a mean over D dimensions. When the policy moves by a KL of k a
    dimension, log rho has mean -k and standard deviation sqrt(2 k / D): at equal k the spread,
    and so the range that clips equally often, grows with 1 / sqrt(D). The published 1e-4 belongs
    to D = 16 * 64 * 64 = 65536, a 512 x 512 image.

    Args:
      dimensions: D, the number of latent values of one sample.
      reference: clip range at D = 65536 (1e-4 for all steps, 1e-5 for a short window).

    Returns:
      A positive float. Raises ValueError when dimensions is below 1.
    """
    if dimensions < 1:
        raise ValueError(f"a latent has at least 1 dimension, got {dimensions}")
    return reference * math.sqrt(65536 / dimensions)
