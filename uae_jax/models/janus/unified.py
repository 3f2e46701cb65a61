"""What does not change while Janus trains: its sizes, and the tokens around a caption in the prompt of its drawing."""

import dataclasses
from collections.abc import Mapping

from jaxtyping import Array, Bool, Int

from uae_jax.models.condition import ConditionTemplate, place_in_template
from uae_jax.models.janus.config import JanusConfig
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.model import ADAPTER_PATTERN


@dataclasses.dataclass(frozen=True)
class Unified:
    """One network that captions and draws; hashable, so that compiled functions can close over it.

    Attributes:
      network: sizes.
      template: ids around the tokens of a caption in the prompt of its drawing.
    """

    network: JanusConfig
    template: ConditionTemplate

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.network.vq.image_size

    @property
    def lora_targets(self) -> Mapping[str, str]:
        """The linear layers that a new adapter changes, as a pattern for each part that can have one."""
        return {"language": ADAPTER_PATTERN}

    @property
    def text(self) -> TextConfig:
        """Sizes of the language model."""
        return self.network.text

    @property
    def own_encoder(self) -> bool:
        """A caption is read by the network that wrote it."""
        return False

    def drawing_prompts(
        self, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
    ) -> tuple[Int[Array, "n s"], Bool[Array, "n s"]]:
        """The prompts for drawings of captions, right-padded, and their mask.

        Args:
          tokens: captions, right-padded, as the model writes them.
          lengths: tokens without the stop token.
        """
        return place_in_template(self.template, tokens, lengths)
