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
    "velocity_gap": ("", "mean distance of replayed velocities from those of sampling (Flow-GRPO)"),
    "velocity_gap_max": ("", "largest distance of replayed velocities from those of sampling"),
    "masked_fraction": ("share", "terms that the trust region leaves out (flow_grpo.trust_region=dppo)"),
    "between_share": ("share", "of the rewards' variance that captions explain; if low, raise images_per_caption"),
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
    "caption_": ("as the metric", "a metric of the captions alone, where a method trains captions and images"),
    "image_": ("as the metric", "a metric of the image tokens alone (unified_ar)"),
    "eval/": ("as the score", "a held-out score while the stage runs, of few images"),
    "held_out/": ("as the score", "a held-out score before and after the stage (TensorBoard and W&B)"),
}
# held-out scores whose names have a part in capitals, or that only some models have -> meaning
MORE_SCORES: dict[str, str] = {
    "fact_recall_KIND": "share of the scene's facts of one kind that the caption states",
    "NAME_guidance_SCALE": "the score NAME, drawn at evaluation.also_guidance_scale",
    "other_ids": "share of captions that the tokenizer would spell in other tokens (decoders with a text encoder)",
}


def known(name: str) -> bool:
    """Whether a metric has a meaning here."""
    return name in METRICS or any(name.startswith(beginning) for beginning in FAMILIES)
