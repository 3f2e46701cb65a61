"""What both sides of `benchmarks.janus_step` share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """A step of `unified_ar`: images, captions of each, drawings of a caption, longest caption, and the update."""

    images: int = 2
    group: int = 4
    drawings: int = 3
    tokens: int = 48
    guidance: float = 5.0
    kl_weight: float = 0.01
    learning_rate: float = 1e-5
    lora_rank: int = 32


@dataclasses.dataclass(frozen=True)
class Words:
    """Ids: of the caption prompt, around a caption in the prompt of its drawing, and of single tokens."""

    question: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    begin: int
    end: int
    pad: int


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the random model: of the language model, of the image tower, and of the image tokenizer."""

    width: int
    layers: int
    vocabulary: int
    tower: int
    tower_layers: int
    side: int
    codes: int
    multipliers: tuple[int, ...]

    @property
    def patch(self) -> int:
        """Side of a patch and of an image token, in pixels."""
        return 2 ** (len(self.multipliers) - 1)


SIZES = {
    # 64 image tokens, 60 M parameters: the largest of which two cores make a step in a minute
    "mini": Size(512, 8, 8192, 256, 4, 64, 1024, (1, 1, 2, 2)),
    "small": Size(48, 2, 160, 32, 2, 32, 64, (1, 1, 2, 2)),
}
