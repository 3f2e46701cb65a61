"""What each metric and score means, with its unit; the reference of the site is made of this."""

# metric of `metrics.jsonl` -> (unit, meaning); of the RL stages where nothing else is said
METRICS: dict[str, tuple[str, str]] = {
    "loss": ("", "what the optimizer lowers; of policy gradients it is near 0 and says little"),
    "grad_norm": ("", "norm of the gradient before clipping"),
    "skipped_updates": ("share", "updates without a finite loss and gradient, which were left out"),
    "outlier_updates": ("share", "updates that were left out for their gradient norm (guard.gradient_ratio)"),
    "reward": ("cosine", "mean reward of the rollout, with what is taken off or added to the similarity"),
    "reward_std": ("cosine", "mean standard deviation of rewards inside a group; nothing is learnt where it is 0"),
    "zero_std_fraction": ("share", "groups whose samples have equal rewards"),
    "nan_fraction": ("share", "rewards that are not numbers, and count as none"),
    "unique_fraction": ("share", "captions of a group that differ from each other"),
    "caption_tokens": ("tokens", "mean length of the sampled captions"),
    "truncated_fraction": ("share", "captions without an end at the longest length"),
    "repetition": ("share", "sequences of four tokens that repeat an earlier one of the caption"),
    "entropy": ("nats", "mean entropy of the next token"),
    "kl": ("nats a token, or a latent value", "distance of the policy to the reference"),
    "clip_fraction_low": ("share", "terms whose ratio was clipped from below"),
    "clip_fraction_high": ("share", "terms whose ratio was clipped from above"),
    "ratio_deviation": ("", "mean distance of the ratio from 1; 0 at the first update of a rollout"),
    "ratio_deviation_max": ("", "largest distance of the ratio from 1"),
    "log_prob_gap": ("nats", "mean distance of scored log-probabilities from those of sampling"),
    "log_prob_gap_max": ("nats", "largest distance of scored log-probabilities from those of sampling"),
    "velocity_shift": ("", "mean square of the change of velocities against the reference (DiffusionNFT)"),
    "gradient_cosine": ("cosine", "of the gradients of two halves of an update (flow_grpo.gradient_noise)"),
    "gradient_signal": ("", "product of these two gradients, which estimates the squared norm of the true one"),
    "noise_scale": ("samples", "batch at which noise and signal of the gradient are equal"),
    "perf/step_seconds": ("seconds", "median time of a step"),
    "perf/data_wait": ("share", "time that steps waited for data"),
    "perf/mfu": ("share", "operations of the model against the devices' peak, on known chips"),
}
# beginnings of names that carry one of an open list -> (unit, meaning)
FAMILIES: dict[str, tuple[str, str]] = {
    "reward_": ("cosine", "one term of the reward, such as that of one encoder"),
    "eval/": ("as the score", "a held-out score while the stage runs, of few images"),
    "held_out/": ("as the score", "a held-out score before and after the stage (TensorBoard and W&B)"),
}


def known(name: str) -> bool:
    """Whether a metric has a meaning here."""
    return name in METRICS or any(name.startswith(beginning) for beginning in FAMILIES)
