"""Captions, pictures and reconstructions from files: the Python side of `uae_jax.infer`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uae_jax import sharding, trees
from uae_jax.data import tokenizer as tokens
from uae_jax.data.loader import RowBuilder, batch_spec, from_signed
from uae_jax.data.qwen_inputs import prompt_fields
from uae_jax.data.tokenizer import decode_caption
from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.models import condition, uae
from uae_jax.models.qwen2_5_vl.sampling import SamplingConfig
from uae_jax.rl.captioning import sample_captions
from uae_jax.rl.reconstruction import Denoising, draw, sample_keys
from uae_jax.sharding import MeshConfig
from uae_jax.stages.weights import ModelConfig, System, load_system


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """Settings of inference; the defaults are the release's (official demo.py).

    Attributes:
      seed: of captions and noise.
      steps: Euler steps.
      guidance_scale: 1 leaves out the negative prompt.
      size: side of the drawn pictures in pixels.
      temperature, top_p: of caption sampling; temperature 0 is greedy.
      max_new_tokens: longest caption.
      shift, schedule: noise levels (`diffusion.schedule`).
      prompt: what the captioner is asked.
      negative_prompt: what guidance moves away from.
      batch_size: pictures in one compiled call.
      policy_condition: encode captions with the trained captioner, as the release does.
    """

    seed: int = 42
    steps: int = 40
    guidance_scale: float = 5.0
    size: int = 1024
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    shift: float = 3.0
    schedule: str = "diffusers"
    prompt: str = ""
    negative_prompt: str = ""
    batch_size: int = 1
    policy_condition: bool = False


class Inference:
    """A model ready to caption, draw and reconstruct; each function is compiled once for a shape.

    Args:
      model: which folder.
      config: settings.
      devices: over which the parameters are cut; None takes the first one.
    """

    def __init__(self, model: ModelConfig, config: InferenceConfig, devices: Sequence[jax.Device] | None = None):
        self.config = config
        devices = jax.local_devices()[:1] if devices is None else list(devices)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
        self.system: System = load_system(model, image_size=config.size, negative_prompt=config.negative_prompt, mesh=mesh)
        self.parts = self.system.parts
        # a caption that was cut at the limit has no stop token; as a text to draw it gets one
        spec = batch_spec(self.system.tokenizer, self.system.processor, config.size, config.prompt, config.max_new_tokens + 1)
        self.rows = RowBuilder(self.system.tokenizer, self.system.processor, spec, config.prompt)
        self.key = jax.random.key(config.seed)
        sigmas = sigma_schedule(config.steps, config.shift, config.schedule)
        self.denoising = Denoising(tuple(map(float, sigmas)), config.guidance_scale, config.policy_condition)
        sampling = SamplingConfig(config.temperature, 0, config.top_p)

        def write(parts: Mapping, batch: Mapping) -> tuple[Array, Array]:
            said = sample_captions(
                self.system.model, parts, batch, self.key, max_new_tokens=config.max_new_tokens, stops=self.system.stops,
                sampling=sampling)
            return said.tokens, condition.caption_lengths(said.mask, said.finished)

        def picture(parts: Mapping, ids: Array, lengths: Array, sample_ids: Array) -> Array:
            noise = uae.initial_noise(self.system.model, sample_keys(trees.name_key(self.key, "noise"), sample_ids))
            return jnp.clip(draw(self.system.model, parts, self.denoising, ids, lengths, noise), -1, 1)

        self._write, self._picture = jax.jit(write), jax.jit(picture)

    def _batches(self, count: int) -> Iterator[np.ndarray]:
        """Row numbers of each compiled call; the last call repeats its last row."""
        size = self.config.batch_size
        for start in range(0, count, size):
            yield np.minimum(np.arange(start, start + size), count - 1)

    def caption(self, images: Sequence[np.ndarray]) -> Iterator[str]:
        """Captions of pictures uint8 `[H, W, 3]` of any sizes, one after the other.

        Each picture is resized by the captioner's own processor, with its aspect ratio.
        """
        fields = [self._image_row(image) for image in images]
        longest = {name: max(len(row[name]) for row in fields) for name in ("patches", "prompt_ids")}
        for rows in self._batches(len(fields)):
            batch = {name: np.stack([_padded(fields[row], name, longest) for row in rows]) for name in fields[0]}
            batch["sample_id"] = rows.astype(np.int32)
            ids, lengths = jax.device_get(self._write(self.parts, batch))
            for position in range(len(set(rows.tolist()))):
                yield decode_caption(self.system.tokenizer, ids[position][: lengths[position]])

    def _image_row(self, image: np.ndarray) -> dict[str, np.ndarray]:
        processor, tokenizer = self.system.processor, self.system.tokenizer
        patches, grid = processor(image)
        ids = tokens.caption_prompt_ids(tokenizer, self.config.prompt, [processor.image_tokens(grid)])
        pad = tokens.token_id(tokenizer, tokens.IMAGE_PAD)
        return prompt_fields(ids, [(patches, grid)], processor, pad, len(patches), len(ids))

    def generate(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Pictures of texts, uint8 `[S, S, 3]`, one after the other; text i has noise i.

        Raises:
          ValueError: a text is longer than `max_new_tokens`.
        """
        rows = [self.rows.caption_fields(text) for text in texts]
        for text, row in zip(texts, rows):
            if row["caption_truncated"]:
                raise ValueError(f"the text {text[:40]!r}... is longer than {self.config.max_new_tokens} tokens; shorten it or raise --max_new_tokens")
        yield from self._draw(rows)

    def _draw(self, rows: Sequence[Mapping[str, np.ndarray]]) -> Iterator[np.ndarray]:
        for numbers in self._batches(len(rows)):
            ids, mask = (np.stack([rows[row][name] for row in numbers]) for name in ("caption_ids", "caption_mask"))
            lengths = mask.sum(-1, dtype=np.int32) - 1
            pixels = from_signed(jax.device_get(self._picture(self.parts, ids, lengths, numbers.astype(np.int32))))
            yield from pixels[: len(set(numbers.tolist()))]

    def reconstruct(self, images: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Caption and drawing of each picture. A caption whose text has more tokens than were sampled is drawn without its tail."""
        captions = list(self.caption(images))
        yield from zip(captions, self._draw([self.rows.caption_fields(caption) for caption in captions]))


def _padded(row: Mapping[str, np.ndarray], name: str, longest: Mapping[str, int]) -> np.ndarray:
    value = row[name]
    if not value.ndim:
        return value
    length = longest["patches" if name.startswith("patch") else "prompt_ids"]
    fill = -1 if name in ("patch_windows", "patch_images") else 0
    return np.pad(value, [(0, length - len(value))] + [(0, 0)] * (value.ndim - 1), constant_values=fill)


def builtin_settings() -> dict:
    """What differs from the release's settings for the built-in model of 32-pixel scenes."""
    return dict(size=32, steps=20, guidance_scale=1.0, shift=4.0, schedule="single", max_new_tokens=32, temperature=0.7,
                prompt="describe", negative_prompt="", batch_size=8)
