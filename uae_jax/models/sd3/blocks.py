"""The blocks of the SD3 transformer: two token streams with joint attention (arXiv 2403.03206, section 4, figure 2)."""

import functools

import flax.linen as nn
from jaxtyping import Array, Float

from uae_jax.models.sd3.config import TransformerConfig
from uae_jax.nn.attention import Mask, Stream, joint_attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.mlp import TanhMLP
from uae_jax.nn.modulation import Modulation, gated_sum, modulated_norm
from uae_jax.nn.norms import NormScale

EPSILON = 1e-6


class JointAttention(nn.Module):
    """Attention over image tokens, or over image and context tokens together, each with its own projections.

    Attributes:
      config: sizes.
      context_output: whether the context's result is projected and returned.
    """

    config: TransformerConfig
    context_output: bool = True

    def _stream(self, x: Array, prefix: str, asks: bool = True) -> Stream:
        """Query, key and value of one stream, with the scales of their norms."""
        config = self.config
        heads = (*x.shape[:2], config.num_attention_heads, config.attention_head_dim)
        query, key, value = (
            Dense(config.width, lora_alpha=config.lora_alpha, name=f"{prefix}{name}")(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        scales: list[Array | None] = [None, None]
        if config.qk_norm is not None:
            scales = [NormScale(name=f"{prefix}{name}_norm")(heads[-1]) for name in ("query", "key")]
        return Stream(query if asks else None, key, value, *scales)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p d"], context: Float[Array, "b s d"] | None = None, mask: Mask = Mask()
    ) -> tuple[Float[Array, "b p d"], Float[Array, "b s d"] | None]:
        """Mixes the tokens.

        Args:
          x: image tokens.
          context: context tokens, or None for attention over image tokens only.
          mask: which of the P + S tokens are attended to.

        Returns:
          Image tokens and context tokens; the second None without context or without `context_output`.
        """
        config = self.config
        streams = [self._stream(x, "")]
        if context is not None:
            streams.append(self._stream(context, "context_", asks=self.context_output))
        mixed = joint_attention(streams, mask, EPSILON)

        def output(heads: Array | None, name: str) -> Array | None:
            if heads is None:
                return None
            beside = heads.reshape(*heads.shape[:2], config.width)
            return Dense(config.width, lora_alpha=config.lora_alpha, name=name)(beside)

        own, other = (output(heads, name) for heads, name in zip((*mixed, None), ("output", "context_output")))
        assert own is not None  # image tokens always ask
        return own, other


class Block(nn.Module):
    """One transformer block with adaptive layer norms (arXiv 2403.03206, figure 2b).

    Attributes:
      config: sizes.
      dual: whether image tokens have a second attention of their own (SD3.5 medium).
      last: whether the context is only read; it is then dropped.
    """

    config: TransformerConfig
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b p d"], Float[Array, "b s d"]],
        conditioning: Float[Array, "b d"],
        mask: Mask,
    ) -> tuple[tuple[Float[Array, "b p d"], Float[Array, "b s d"] | None], None]:
        """Updates both streams.

        Args:
          streams: image tokens and context tokens.
          conditioning: already through SiLU.
          mask: see `JointAttention`.

        Returns:
          The new streams (the context None after the last block), and None (what a scan collects).
        """
        config, (x, context) = self.config, (constrain(stream, "batch") for stream in streams)
        modulation = functools.partial(Modulation, config.width, lora_alpha=config.lora_alpha)
        feed_forward = functools.partial(TanhMLP, 4 * config.width, config.lora_alpha)
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = modulation(9 if self.dual else 6, name="modulation")(
            conditioning
        )
        context_parts = modulation(2 if self.last else 6, name="context_modulation")(conditioning)
        # the published last block keeps (scale, shift) in this order, the others (shift, scale, ...)
        context_scale, context_shift = context_parts if self.last else (context_parts[1], context_parts[0])
        update, context_update = JointAttention(config, context_output=not self.last, name="attention")(
            modulated_norm(x, scale, shift), modulated_norm(context, context_scale, context_shift), mask
        )
        if self.dual:
            second_shift, second_scale, second_gate = second
            second_input = modulated_norm(x, second_scale, second_shift)
            x = gated_sum(x, gate, update)
            x = gated_sum(x, second_gate, JointAttention(config, name="image_attention")(second_input)[0])
        else:
            x = gated_sum(x, gate, update)
        x = gated_sum(x, ff_gate, feed_forward(name="feed_forward")(modulated_norm(x, ff_scale, ff_shift)))
        if context_update is None:
            return (x, None), None
        _, _, gate, ff_shift, ff_scale, ff_gate = context_parts
        context = gated_sum(context, gate, context_update)
        update = feed_forward(name="context_feed_forward")(modulated_norm(context, ff_scale, ff_shift))
        return (x, gated_sum(context, ff_gate, update)), None
