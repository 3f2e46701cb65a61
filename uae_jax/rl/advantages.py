"""Group-relative advantages: how much better a sample is than the others of its group.

`A_i = (r_i - mean_group) / (s + eps)` (GRPO, arXiv 2402.03300, section 4.1). Only differences inside a group count, and
they are exact: rewards are centred on the group's largest one, then on the mean. A group of equal rewards gets exactly
0. Shape letters: b groups (images), g samples of a group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from uae_jax.rl.losses import Metrics

SCALES = ("group", "batch", "none")

# rewards closer than this are a tie: float32 rounding, not a preference
_TIE = 1e-6
# a standard deviation below this is noise
_STD_FLOOR = 1e-3
# added to the divisor
_EPS = 1e-4
# bound of |A|
_BOUND = 5.0


def _batch_std(rewards: Float32[Array, "b g"], valid: Bool[Array, "b g"]) -> Float32[Array, ""]:
    """Standard deviation of all valid rewards, in two passes, with ddof 1."""
    centred = jnp.where(valid, rewards - jnp.where(valid, rewards, -jnp.inf).max(), 0.0)
    count = valid.sum()
    mean = jnp.where(valid, centred, 0).sum() / jnp.maximum(count, 1)
    squares = jnp.where(valid, centred - mean, 0) ** 2
    return jnp.sqrt(squares.sum() / jnp.maximum(count - 1, 1))


def group_advantages(rewards: Float[Array, "b g"], *, scale: str = "group") -> tuple[Float32[Array, "b g"], Metrics]:
    """Advantages of a batch of groups, in [-5, 5]; no gradient flows.

    Args:
      rewards: one row per group. Non-finite rewards (a decoding that failed) are excluded: they do not move the others
        and get 0.
      scale: the divisor s: "group" for the group's standard deviation (GRPO); "batch" for that of all rewards
        (Flow-GRPO), which does not enlarge the advantages of easy groups; "none" for 1 without eps (Dr. GRPO,
        arXiv 2503.20783). Standard deviations have ddof 1, as torch.std and TRL; one below 0.001 is noise and gives 0.

    Returns:
      Advantages, and metrics: reward_mean over samples, reward_std (of each group) over groups, zero_std_fraction over
      groups, nan_fraction over samples. Groups of ties, or with fewer than two finite rewards, get exactly 0.

    Raises:
      ValueError: an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown advantage scale {scale!r}: choose one of {', '.join(SCALES)}")
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.float32))
    valid = jnp.isfinite(rewards)

    count = valid.astype(jnp.float32).sum(axis=1, keepdims=True)
    present = count > 0
    top = jnp.where(present, jnp.where(valid, rewards, -jnp.inf).max(axis=1, keepdims=True), 0.0)
    bottom = jnp.where(valid, rewards, jnp.inf).min(axis=1, keepdims=True)
    below = jnp.where(valid, rewards - top, 0.0)
    mean_below = below.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid, below - mean_below, 0.0)
    std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1))

    degenerate = (count < 2) | (top - bottom <= _TIE)
    divisor = 1.0
    if scale == "group":
        degenerate |= std < _STD_FLOOR
        divisor = std + _EPS
    elif scale == "batch":
        batch_std = _batch_std(rewards, valid)
        degenerate |= batch_std < _STD_FLOOR
        divisor = batch_std + _EPS
    advantages = jnp.clip(jnp.where(valid & ~degenerate, centred / divisor, 0.0), -_BOUND, _BOUND)
    samples, groups = jnp.float32(rewards.size), present.sum(dtype=jnp.float32)
    metrics = {
        "reward_mean": (jnp.where(valid, rewards, 0.0).sum(), count.sum()),
        "reward_std": (jnp.where(present, std, 0.0).sum(), groups),
        "zero_std_fraction": ((degenerate & present).sum(dtype=jnp.float32), groups),
        "nan_fraction": ((~valid).sum(dtype=jnp.float32), samples),
    }
    return advantages, metrics


def nested_advantages(
    rewards: Float[Array, "b g k"], *, scale: str = "group"
) -> tuple[Float32[Array, "b g"], Float32[Array, "b g k"], Metrics]:
    """Advantages of captions, and of the images that are drawn of each.

    A caption is worth the mean reward of its images, and is compared with the other captions of its group. An image is
    compared with the other images of its caption. One image a caption has nothing to be compared with, and takes the
    advantage of its caption (T2I-R1, arXiv 2505.00703).

    Args:
      rewards: of K images of each of G captions of B originals. A caption without a finite reward is left out.
      scale: see `group_advantages`.

    Returns:
      Advantages of captions and of images; and metrics: those of `group_advantages` for captions, `image_reward_std`,
      the deviation among the images of a caption, and `between_share`, the part of the rewards' variance within a
      group that captions explain. A low share says that a caption's mean is mostly noise: raise K.

    Raises:
      ValueError: an unknown scale.
    """
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.float32))
    valid = jnp.isfinite(rewards)
    count = valid.sum(-1)
    means = jnp.where(valid, rewards, 0.0).sum(-1) / jnp.maximum(count, 1)
    of_captions, metrics = group_advantages(jnp.where(count > 0, means, jnp.nan), scale=scale)
    groups, captions, images = rewards.shape
    if images == 1:
        return of_captions, jnp.where(valid, of_captions[..., None], 0.0), metrics
    of_images, own = group_advantages(rewards.reshape(-1, images), scale=scale)
    squares = jnp.where(valid, jnp.square(rewards - means[..., None]), 0.0)
    within = squares.sum((1, 2)) / jnp.maximum(jnp.maximum(count - 1, 0).sum(1), 1)
    # the variance of captions' means holds the noise of their images
    known = count > 0
    centre = jnp.where(known, means, 0.0).sum(1, keepdims=True) / jnp.maximum(known.sum(1, keepdims=True), 1)
    spread = jnp.where(known, jnp.square(means - centre), 0.0).sum(1) / jnp.maximum(known.sum(1) - 1, 1)
    between = spread - within / images  # an estimate without bias, which may be below 0
    more = {
        "image_reward_std": own["reward_std"],
        "image_zero_std_fraction": own["zero_std_fraction"],
        "between_share": (between.sum(), (between + within).sum()),
    }
    return of_captions, of_images.reshape(groups, captions, images), metrics | more
