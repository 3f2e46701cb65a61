"""The clipped loss of sampled tokens with its settings, for every stream of tokens that a method trains."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from uae_jax.methods.method import Loss
from uae_jax.rl.losses import AGGREGATIONS, KL_ESTIMATORS, token_grpo_loss
from uae_jax.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class TokenLoss(Settings):
    """Settings of GRPO on tokens."""

    aggregation: str = setting("grpo", "how token losses are summed, see losses.token_grpo_loss", choices=AGGREGATIONS)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", low=0, source="arXiv 2402.03300")
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", low=0, source="arXiv 2402.03300")
    dual_clip: float = setting(0.0, "bound of the loss of bad samples, above 1; 0 for none", low=0)
    kl_weight: float = setting(0.02, "weight of the KL to the reference policy, a token", low=0)
    kl_estimator: str = setting("k3", "estimator of that KL", choices=KL_ESTIMATORS, source="arXiv 2402.03300")

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and a dual clip between 0 and 1."""
        yield from super().problems()
        if 0 < self.dual_clip <= 1:
            yield f"dual_clip is {self.dual_clip}; it must be above 1, or 0 for none"


def token_loss(
    settings: TokenLoss,
    log_probs: Float[Array, "*rows t"],
    old: Float[Array, "*rows t"] | None,
    reference: Float[Array, "*rows t"] | None,
    advantage: Float[Array, "*rows"],
    mask: Bool[Array, "*rows t"],
    *,
    entropy: Float[Array, "*rows t"] | None,
    max_tokens: int,
) -> Loss:
    """`losses.token_grpo_loss` as the settings say, of samples in any number of leading axes.

    Args:
      settings: clip range, KL and aggregation.
      log_probs: of the sampled tokens under the policy.
      old: under the policy of the rollout; None where that one is the policy.
      reference: under the reference policy; None without a KL.
      advantage: of each sample.
      mask: of the tokens that count.
      entropy: for the metric; None leaves it out.
      max_tokens: the longest sample.
    """

    def flat(x: Any) -> Any:
        return None if x is None else x.reshape(-1, x.shape[-1])

    return token_grpo_loss(
        flat(log_probs),
        flat(old),
        flat(reference),
        advantage.reshape(-1),
        flat(mask),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip or None,
        kl_weight=settings.kl_weight,
        kl_estimator=settings.kl_estimator,
        aggregation=settings.aggregation,
        max_tokens=max_tokens,
        entropy=None if entropy is None else jax.lax.stop_gradient(flat(entropy)),
    )
