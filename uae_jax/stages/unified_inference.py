"""The inference engine of a folder that holds one unified model, Janus: captions and drawings, a batch at a time."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from PIL import Image

from uae_jax.data.images import to_rgb
from uae_jax.data.janus_inputs import SYSTEM, padded_ids, question_fields
from uae_jax.data.loader import from_signed
from uae_jax.data.qwen_inputs import Fields
from uae_jax.files.paths import to_path
from uae_jax.models.janus import config as configs
from uae_jax.models.language.generate import Completion
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.cpu.compiler import compiler_options
from uae_jax.rollouts.unified import DrawingConfig, pixels, sample_captions, sample_drawings
from uae_jax.stages.inference import Row, batches, drawn_captions, mesh_of, stacked
from uae_jax.stages.inference_config import InferenceConfig
from uae_jax.stages.run_config import CAPTION_PROMPT
from uae_jax.stages.unified_system import load_unified
from uae_jax.stages.weights import INSIDE, ModelConfig, builtin_folder, model_folder

SHORTEST = 64  # padded length of short prompts in tokens; longer ones are padded to a power of two
LONGEST = 8192  # half of the published context
# settings of the built-in model of scenes that the other built-in model has not
SCENES = dict(system_prompt="describe")


class UnifiedInference:
    """`stages.inference.Inference` of one network; each function is compiled once for a shape.

    Args:
      model: the folder of the model, in transformers' layout or the official one.
      config: settings; those of a diffusion sampler are not read.
      devices: the parameters are sharded over these devices; None for the first device.

    Raises:
      FileNotFoundError, ValueError: the folder cannot be read, or the model draws no images of this size.
    """

    @staticmethod
    def knows(folder: str) -> bool:
        """Whether a folder, or the export of a workdir, holds such a model, by its `config.json`."""
        place = (builtin_folder(folder) if folder else None) or to_path(folder)
        inside = (place, *(place / name for name in INSIDE))
        return bool(folder) and any(configs.holds(one) for one in inside if not (one / "llm").is_dir())

    @staticmethod
    def settings(folder: str) -> dict[str, Any]:
        """The official settings, where they differ from those of `InferenceConfig`."""
        config = configs.from_folder(model_folder(folder))
        return dict(size=config.vq.image_size, prompt=CAPTION_PROMPT, system_prompt=SYSTEM, temperature=0.0)

    @staticmethod
    def run_settings(run: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a training run, by its config.json."""
        data, scores = run["data"], run["evaluation"]
        return dict(
            guidance_scale=scores["guidance_scale"],
            max_new_tokens=data["max_caption"],
            prompt=data["caption_prompt"],
            system_prompt=data["caption_system"] or SYSTEM,
            control_tokens=data["control_tokens"],
            batch_size=min(scores["batch_size"], 8),
        )

    def __init__(
        self,
        model: ModelConfig,
        config: InferenceConfig,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (an alias inside of jax)
    ):
        system = load_unified(
            model, image_size=config.size, mesh=mesh_of(devices), control_tokens=config.control_tokens
        )
        self.folder, self.config, self.tokenizer = system.folder, config, system.tokenizer
        self.parts, self.model, self.image_encoders = system.parts, system.model.network, system.encoders
        self._write, self._picture = _programs(self.model, config)

    @property
    def encoders(self) -> Mapping[str, Any]:
        """Parameters of the image encoders that lie beside the model, by name."""
        return self.parts["encoders"]

    def with_guidance(self, scale: float) -> "UnifiedInference":
        """The same model and settings, with another guidance of drawings; parameters are shared."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, guidance_scale=scale)
        other._picture = _programs(self.model, other.config)[1]
        return other

    def image_fields(self, image: np.ndarray | Image.Image) -> Fields:
        """The captioner's inputs for an image of any size.

        Raises:
          ValueError: an image without content.
        """
        return self.question_fields(self.config.prompt, [image])

    def question_fields(self, question: str, images: Sequence[np.ndarray | Image.Image]) -> Fields:
        """The captioner's inputs for a question about one image; the caption is the answer.

        Raises:
          ValueError: another number of images, or an image without content.
        """
        if len(images) != 1:
            raise ValueError(f"Janus answers questions about one image, not {len(images)}")
        size, system = self.model.vision.image_size, self.config.system_prompt
        room = _room(len(self.tokenizer.question_ids(question, system)))
        return question_fields(self.tokenizer, to_rgb(images[0]), size, question, system, room)

    def text_fields(self, text: str) -> Fields:
        """The inputs for a drawing of a text.

        Raises:
          ValueError: a text longer than `LONGEST`.
        """
        ids = self.tokenizer.drawing_ids(text)
        if len(ids) > LONGEST:
            raise ValueError(f"the text {text[:40]!r}... has {len(ids):,} tokens of at most {LONGEST:,}; shorten it")
        return padded_ids(ids, _room(len(ids)))

    def unknown(self, texts: Iterable[str]) -> str:
        """A line that names the words that the vocabulary lacks, or nothing; one of bytes has every word."""
        return self.tokenizer.unknown(texts)

    def captions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
        """Captions of images (`image_fields`) or answers, each batch as soon as it is done."""
        for group in batches(rows, self.config.batch_size, _length):
            said = jax.device_get(self._write(self.parts, stacked(group, self.config.batch_size)))
            for row, ids, mask in zip(group, said.tokens, said.mask):
                yield row, self.tokenizer.decode_caption(ids[mask])

    def drawings(self, rows: Iterable[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        """Images drawn of texts (`text_fields`), uint8 `[S, S, 3]`, each batch as soon as it is done."""
        for group in batches(rows, self.config.batch_size, _length):
            drawn = self._picture(self.parts, stacked(group, self.config.batch_size))
            yield from zip(group, from_signed(jax.device_get(drawn)))

    def reconstructions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str, np.ndarray]]:
        """Caption of each image (`image_fields`), and the drawing of its caption."""
        return drawn_captions(self, rows, self.text_fields)


def _room(length: int) -> int:
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _length(row: Row) -> tuple[int, ...]:
    """Rows of equal length go through one compiled program."""
    return row.fields["prompt_ids"].shape


def _programs(model: configs.JanusConfig, config: InferenceConfig) -> tuple[Any, Any]:
    """The compiled functions: from images to captions, and from texts to images."""
    key, how = jax.random.key(config.seed), DrawingConfig(config.guidance_scale)
    sampling = SamplingConfig(config.temperature, 0, config.top_p)

    def write(parts: Mapping, batch: Mapping) -> Completion:
        return sample_captions(model, parts, batch, key, max_new_tokens=config.max_new_tokens, sampling=sampling)

    def picture(parts: Mapping, batch: Mapping) -> Array:
        drawn = sample_drawings(model, parts, how, batch["prompt_ids"], batch["prompt_mask"], batch["sample_id"], key)
        return pixels(model, parts, how, drawn.tokens)

    options = compiler_options(model.text.dtype)
    return jax.jit(write, compiler_options=options), jax.jit(picture, compiler_options=options)
