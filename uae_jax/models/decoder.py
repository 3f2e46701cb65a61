"""The interface of a decoder: what stages, rewards and the sampler know of the model that draws images of captions.

A decoder is a frozen description; its parameters are parts of the model's dictionary (`models.uae`). Each convention of
a published model, such as its template, the sign of its velocity or the order of its patches, ends behind it.

Shape letters: n captions, t caption tokens, s tokens of caption and template, d width of the states, b images,
`h w c` latents.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from jaxtyping import Array, Bool, Float, Float32, Int
from numpy import ndarray

from uae_jax.hf.inventory import Table
from uae_jax.hf.rules import Rule
from uae_jax.models.condition import ConditionTemplate

Parts = Mapping[str, Any]
# what the transformer reads, and which of it counts; the negative prompt's has batch 1
Context = tuple[Float[Array, "#n s d"], Bool[Array, "#n s"]]


class TransformerSizes(Protocol):
    """What others need to know of a diffusion transformer's configuration."""

    @property
    def lora_alpha(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def joint_attention_dim(self) -> int: ...
    @property
    def alive(self) -> float: ...
    def published(self) -> dict[str, Any]: ...


class Decoder(Protocol):
    """A decoder; hashable, so that compiled functions can close over it.

    Attributes:
      transformer: sizes of the diffusion transformer, the part `transformer`.
      vae: sizes of the auto-encoder, the part `vae`.
      template: ids around a caption.
      conditions: those of `rollouts.conditions` that it can read.
      lora_targets: pattern of the transformer's modules that a new adapter changes (`nn.lora.init_lora`).
      parts: names of its own parts, those of the captioner left out.
      cell: side in pixels of what one image token stands for; sides of images are multiples of it.
      most_cells: largest number of them a side; 0 for any.
    """

    conditions: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]

    @property
    def lora_targets(self) -> str: ...
    @property
    def transformer(self) -> TransformerSizes: ...
    @property
    def vae(self) -> Any: ...
    @property
    def template(self) -> ConditionTemplate: ...
    @property
    def cell(self) -> int: ...
    @property
    def most_cells(self) -> int: ...

    def prompt(
        self, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
    ) -> tuple[Int[Array, "n s"], Bool[Array, "n s"]]:
        """Ids of captions in their template, and which of them are no padding.

        Args:
          tokens: right-padded captions.
          lengths: their tokens without the stop token.
        """
        ...

    def states_shape(self, caption_tokens: int) -> tuple[tuple[int, int], str]:
        """(S, D) of `states` for captions of at most so many tokens, and their precision."""
        ...

    def states(
        self, parts: Parts, ids: Int[Array, "n s"], mask: Bool[Array, "n s"], *, policy: bool = False
    ) -> Float[Array, "n s d"]:
        """What the frozen text encoder makes of a prompt.

        Args:
          parts: the model's dictionary.
          ids, mask: of `prompt`.
          policy: whether the trained captioner encodes, where `conditions` has that.
        """
        ...

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """What the transformer reads, from states that may have been stored; what is trained of the way is here."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image."""
        ...

    def velocity(
        self,
        parts: Parts,
        latents: Float[Array, "b h w c"],
        sigma: Float[Array, " b"],
        context: Context,
        *,
        policy: bool = True,
    ) -> Float32[Array, "b h w c"]:
        """Noise minus data in float32, whatever the published model predicts.

        Args:
          parts: the model's dictionary.
          latents: noisy, in the scale of the diffusion model.
          sigma: noise levels in [0, 1].
          context: of `context`.
          policy: the trained transformer, or the reference (adapter off).
        """
        ...

    def guide(
        self, positive: Float32[Array, "b h w c"], negative: Float32[Array, "b h w c"], scale: float
    ) -> Float32[Array, "b h w c"]:
        """The guided velocity of those of caption and negative prompt; scale 1 is that of the caption."""
        ...

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[ndarray, " levels"]:
        """The `steps + 1` noise levels from 1 to 0 with which diffusers draws images of this size in pixels.

        Args:
          steps: velocity evaluations.
          height, width: of the images.
          shift: the setting, for decoders whose published shift is a static one that runs may choose.
        """
        ...

    def encode_images(
        self, parts: Parts, pixels: Float[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the latents of images in [-1, 1], before `to_model_latents`."""
        ...

    def to_model_latents(self, parts: Parts, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Samples of `encode_images` in the scale of the diffusion model."""
        ...

    def decode(
        self, parts: Parts, latents: Float[Array, "b h w c"], chunk: int | None = None
    ) -> Float[Array, "b height width 3"]:
        """Images of the diffusion model's latents, about [-1, 1], not clipped; `chunk` of them at once."""
        ...

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of its parts, without computing anything."""
        ...

    def transformer_rules(self) -> list[Rule]:
        """The table of the transformer's published tensors; those of its adapters follow from it."""
        ...


def check_condition(decoder: Decoder, condition: str) -> None:
    """Checks that a decoder can read what the settings say.

    Raises:
      ValueError: it cannot; the message names the choices.
    """
    if condition not in decoder.conditions:
        raise ValueError(
            f"condition is {condition!r}, but this decoder has a text encoder of its own; use "
            f"{' or '.join(decoder.conditions)}"
        )


@dataclasses.dataclass(frozen=True)
class Component:
    """A folder with weights of a published pipeline.

    Attributes:
      part: its name in the model's dictionary.
      config: reads its `config.json`.
      table: of all its published tensors, from its config.
      read: of those that the decoder reads, where these are fewer.
      stem: of the names of its weight files.
      module: of the Python class that its adapters are for, as peft writes it.
    """

    part: str
    config: Callable[..., Any]
    table: Callable[[Any], Table]
    read: Callable[[Any], Table] | None = None
    stem: str = "diffusion_pytorch_model"
    module: str = ""

    def read_table(self, config: Any) -> Table:
        """The table of what is loaded."""
        return (self.read or self.table)(config)


@dataclasses.dataclass(frozen=True)
class Published:
    """Sizes of published weights, so that a run can be planned before any download.

    Attributes:
      make: `(dtype=, remat=, lora_alpha=) -> Decoder`.
      hub: id of the weights on the Hub.
      licence: of the weights.
    """

    make: Callable[..., Decoder]
    hub: str
    licence: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of published decoder with a text encoder of its own: how its folder is read.

    Attributes:
      name: for messages.
      pipeline: class of diffusers, as `model_index.json` names it.
      describe: `(folder, template, dtype=, remat=, lora_alpha=) -> Decoder`, of the ids around a caption and a run's
        settings; FileNotFoundError or ValueError where a config is absent, not supported, or does not fit the others.
      text: `(tokenizer, caption) -> text`, the decoder's prompt.
      components: folders with weights, by name.
      defaults: settings of inference of a pipeline's folder (`stages.inference_config`).
      published: sizes by the name that `config.model.sizes` has behind the captioner's.
      negative: the negative prompt where the settings have none.
      length: tokens of all rows with their padding; 0 where padding is masked.
      most: tokens of a row at most; 0 for any number.
    """

    name: str
    pipeline: str
    describe: Callable[..., Decoder]
    text: Callable[[Any, str], str]
    components: Mapping[str, Component]
    defaults: Callable[[pathlib.Path], dict[str, Any]]
    published: Mapping[str, Published]
    negative: str = ""
    length: int = 0
    most: int = 0


def chat_text(tokenizer: Any, caption: str, **options: Any) -> str:
    """A caption in the tokenizer's own chat template, as a user's turn, with the header of the answer."""
    turn = [{"role": "user", "content": caption}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **options)
