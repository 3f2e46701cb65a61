"""Group-relative advantages: how much better a sample is than the others of its group.

`A_i = (r_i - mean_group) / (s + eps)` (GRPO, arXiv 2402.03300, section 4.1). Only differences
inside a group count, so they are taken exactly: rewards are first centred on the group's largest
one, then on the mean, and a group of equal rewards gets exactly 0.
"""

import jax
import jax.numpy as jnp

SCALES = ("group", "batch", "none")
COMBINATIONS = ("weighted_sum", "normalize_then_sum")

# Rewards closer than this are a tie: float32 rounding, not a preference.
_TIE = 1e-6


def check_group_size(group_size: int) -> None:
    """Raises ValueError when a group is too small to compare anything."""
    if group_size < 2:
        raise ValueError(
            f"GRPO needs at least 2 samples a group: group_size is {group_size}, so every advantage would be 0"
        )


def _grouping(rewards, group_ids, num_groups):
    """Reductions over groups and their inverse: (sum, max, min, spread to samples)."""
    if group_ids is None:
        return (
            lambda x: x.sum(axis=1),
            lambda x: x.max(axis=1),
            lambda x: x.min(axis=1),
            lambda g: jnp.broadcast_to(g[:, None], rewards.shape),
        )
    return (
        lambda x: jax.ops.segment_sum(x, group_ids, num_groups),
        lambda x: jax.ops.segment_max(x, group_ids, num_groups),
        lambda x: jax.ops.segment_min(x, group_ids, num_groups),
        lambda g: g[group_ids],
    )


def _check(rewards, group_ids, num_groups, scale):
    if scale not in SCALES:
        raise ValueError(f"unknown advantage scale {scale!r}: choose one of {', '.join(SCALES)}")
    if group_ids is None and rewards.ndim != 2:
        raise ValueError(f"rewards of shape {rewards.shape} need group ids, or the shape [groups, samples]")
    if group_ids is not None and (rewards.ndim != 1 or num_groups is None):
        raise ValueError("group ids need flat rewards [N] and num_groups")


def _masked_std(centred, valid, ddof):
    """Two-pass standard deviation of all valid entries of a centred array, []."""
    count = valid.sum()
    mean = jnp.where(valid, centred, 0).sum() / jnp.maximum(count, 1)
    squares = jnp.where(valid, centred - mean, 0) ** 2
    return jnp.sqrt(squares.sum() / jnp.maximum(count - ddof, 1))


def group_advantages(
    rewards,
    group_ids=None,
    num_groups: int | None = None,
    *,
    mask=None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    std_floor: float = 1e-3,
    clip: float | None = 5.0,
):
    """Advantages of a batch of groups; host-free, static shapes, no gradient.

    Args:
      rewards: [groups, G], or flat [N] with group_ids.
      group_ids: int [N] in [0, num_groups): which group each sample belongs to, in any order and
        of any size. Use ids of the input (its position in the data), never the caption text.
      num_groups: static number of groups; only with group_ids.
      mask: bool, shaped as rewards; False excludes a sample. Rewards that are not finite (a
        decode that failed) are excluded too. Excluded samples do not move the others and get 0.
      scale: the divisor s: "group" standard deviation (GRPO), "batch" standard deviation of all
        rewards (Flow-GRPO's global std: easy groups are not blown up), "none" for 1
        (Dr. GRPO, arXiv 2503.20783; eps is not added then).
      ddof: 1 as torch.std and TRL, 0 as numpy and flow_grpo.
      eps: added to s.
      std_floor: an s below this is noise: the group (or with "batch", everything) gets 0.
      clip: bound of |A|, or None.

    Returns:
      (advantages float32 shaped as rewards, metrics). Groups whose rewards tie, or with fewer
      than two valid samples, get exactly 0. Metrics map a name to a (sum, count) pair:
      reward_mean over samples, reward_std (of each group) over groups, zero_std_fraction over
      groups, nan_fraction over samples.

    Raises:
      ValueError: for an unknown scale or rewards whose shape does not tell the groups.
    """
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    _check(rewards, group_ids, num_groups, scale)
    group_sum, group_max, group_min, spread = _grouping(rewards, group_ids, num_groups)
    considered = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask, bool)
    valid = considered & jnp.isfinite(rewards)

    count = group_sum(valid.astype(jnp.float32))
    top = group_max(jnp.where(valid, rewards, -jnp.inf))
    bottom = group_min(jnp.where(valid, rewards, jnp.inf))
    top = jnp.where(count > 0, top, 0.0)
    below = jnp.where(valid, rewards - spread(top), 0.0)
    centred = jnp.where(valid, below - spread(group_sum(below) / jnp.maximum(count, 1)), 0.0)
    std = jnp.sqrt(group_sum(centred**2) / jnp.maximum(count - ddof, 1))

    degenerate = (count < 2) | (top - bottom <= _TIE)
    if scale == "group":
        degenerate |= std < std_floor
        divisor = spread(std) + eps
    elif scale == "batch":
        pivot = jnp.where(valid, rewards, -jnp.inf).max()
        batch_std = _masked_std(jnp.where(valid, rewards - pivot, 0.0), valid, ddof)
        degenerate |= batch_std < std_floor
        divisor = batch_std + eps
    else:
        divisor = 1.0
    advantages = jnp.where(valid & ~spread(degenerate), centred / divisor, 0.0)
    if clip is not None:
        advantages = jnp.clip(advantages, -clip, clip)
    present = count > 0
    metrics = {
        "reward_mean": (jnp.where(valid, rewards, 0.0).sum(), valid.sum()),
        "reward_std": (jnp.where(present, std, 0.0).sum(), present.sum()),
        "zero_std_fraction": ((degenerate & present).sum(), present.sum()),
        "nan_fraction": ((considered & ~valid).sum(), considered.sum()),
    }
    return advantages, _as_float(metrics)


def _as_float(metrics):
    return jax.tree.map(lambda x: x.astype(jnp.float32), metrics)


def combine_advantages(
    rewards: dict,
    weights: dict,
    group_ids=None,
    num_groups: int | None = None,
    *,
    method: str = "weighted_sum",
    eps: float = 1e-4,
    clip: float | None = 5.0,
    **options,
):
    """Advantages from several rewards.

    Args:
      rewards: name -> rewards, each as `group_advantages` takes them.
      weights: name -> weight, the same names.
      group_ids, num_groups: as in `group_advantages`.
      method: "weighted_sum" adds the rewards first (Flow-GRPO); a sample with one missing reward
        is excluded. "normalize_then_sum" normalises each reward in its group, adds the weighted
        advantages, and divides by their standard deviation over the batch, so that a reward with
        a small spread still counts (GDPO); a missing reward adds 0.
      eps, clip, options: as in `group_advantages`.

    Returns:
      (advantages float32 shaped as one reward, metrics of (sum, count) pairs; per-reward metrics
      are prefixed with "NAME/").

    Raises:
      ValueError: for an unknown method or names that differ.
    """
    if method not in COMBINATIONS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(COMBINATIONS)}")
    if set(rewards) != set(weights) or not rewards:
        raise ValueError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names")
    each = {
        name: group_advantages(value, group_ids, num_groups, eps=eps, clip=None, **options)
        for name, value in rewards.items()
    }
    metrics = {f"{name}/{key}": pair for name, (_, values) in each.items() for key, pair in values.items()}
    if method == "weighted_sum":
        total = sum(weights[name] * jnp.asarray(value) for name, value in rewards.items())
        advantages, of_total = group_advantages(total, group_ids, num_groups, eps=eps, clip=clip, **options)
        return advantages, metrics | of_total
    total = sum(weights[name] * advantages for name, (advantages, _) in each.items())
    # Each term already sums to 0 over its group, so only the spread is left to divide out.
    mask = options.get("mask")
    count = total.size if mask is None else jnp.maximum(jnp.asarray(mask, bool).sum(), 1)
    advantages = total / (jnp.sqrt((total**2).sum() / count) + eps)
    if clip is not None:
        advantages = jnp.clip(advantages, -clip, clip)
    return advantages, metrics
