"""What both sides of `benchmarks.unified_step` are given: sizes, hyperparameters and arrays, without jax or torch."""

import dataclasses
import json
import pathlib

import numpy as np

STAGES = ("gen_for_und", "und_for_gen")
PHASES = ("sampling", "condition", "denoising", "decoding", "reward", "update")
PREFILL = "first_token"  # the part of `sampling` before its loop over tokens
INFERENCE = ("captions", "pictures")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; the hyperparameters are those of the preset `mini`.

    Attributes:
      images, group: pictures of a step, and captions or drawings of each.
      tokens: new tokens of every caption; none ends earlier.
      steps: Euler steps; guidance_scale: above 1, so that there is a negative prompt.
      lora_rank: of the adapter that a step trains; its alpha is twice that.
      image_size: side of the pictures.
      dtype: of activations and frozen weights, `float32` or `bfloat16`; auto-encoder, reward and adapters are float32.
      window, noise_level: stochastic steps of `und_for_gen`.
      caption_temperature, flow_temperature: of sampling in the two stages.
      caption_kl, flow_kl: weights of the divergence from the reference.
      caption_clip, flow_clip: ranges of the ratio.
      learning_rate: of AdamW, with `weight_decay` and clipping of the global norm to `max_grad_norm`.
    """

    images: int = 2
    group: int = 4
    tokens: int = 64
    steps: int = 6
    guidance_scale: float = 5.0
    lora_rank: int = 32
    image_size: int = 256
    dtype: str = "float32"
    window: int = 3
    noise_level: float = 0.7
    caption_temperature: float = 1.0
    flow_temperature: float = 0.7
    caption_kl: float = 0.02
    flow_kl: float = 0.04
    caption_clip: float = 0.2
    flow_clip: float = 1e-5
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    def __post_init__(self):
        """Raises ValueError for sizes that cannot be timed."""
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; choose float32 or bfloat16")
        if self.guidance_scale <= 1:
            raise ValueError(f"guidance_scale is {self.guidance_scale}; the benchmark times guidance, give more than 1")
        if self.group < 2 or min(self.images, self.tokens, self.lora_rank) < 1:
            raise ValueError(f"need a group of at least 2 and positive sizes, not {self}")
        if not 1 <= self.window < self.steps:
            raise ValueError(f"{self.steps} steps have no room for a window of {self.window}; give more steps")

    @property
    def rows(self) -> int:
        """N, captions or drawings of a step."""
        return self.images * self.group


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Settings and arrays, by name; written once, read by each side.

    `pixels`, `patches`, `patch_positions`, `prompt_ids`, `prompt_mask` and the other fields of a batch `[B, ...]`;
    `caption_tokens` int32 `[N, T]`; `prefix`, `suffix`, `negative` ids of the condition, the negative as long as a
    caption, so that neither side has padding; `noise` `[N, h, w, C]`; `pooled` `[Dp]`; `sigmas` `[steps + 1]`; `stops`
    ids.
    """

    settings: Settings
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def save(self, folder: pathlib.Path) -> None:
        """Writes `settings.json` and `inputs.npz`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(self.settings)))
        np.savez(folder / "inputs.npz", **self.arrays)

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Inputs":
        """What `save` wrote."""
        with np.load(folder / "inputs.npz") as stored:
            return cls(Settings(**json.loads((folder / "settings.json").read_text())), dict(stored))
