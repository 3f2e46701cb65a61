"""The inference engine: rows of images or texts to captions and generated images, a batch at a time.

Images of many sizes share few compiled programs: each image is padded to one of a few lengths (`image_room`), and a
batch has images of one length. Padding is masked, so that a caption does not depend on its batch.
"""

import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from uae_jax import sharding, trees
from uae_jax.data import tokenizer as tokens
from uae_jax.data.loader import RowBuilder, batch_spec, from_signed
from uae_jax.data.questions import placed_images, question_inputs
from uae_jax.data.qwen_inputs import Fields, prompt_fields
from uae_jax.data.tokenizer import decode_caption, unknown_note
from uae_jax.models import condition, uae
from uae_jax.models.language.generate import Completion
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.cpu.compiler import compiler_options
from uae_jax.rollouts.captioning import sample_captions
from uae_jax.rollouts.reconstruction import Denoising, caption_states, draw, draw_from, noise_levels, sample_keys
from uae_jax.sharding import MeshConfig
from uae_jax.stages.inference_config import InferenceConfig
from uae_jax.stages.weights import ModelConfig, System, load_system

ROOMS = 4  # number of padded lengths of images; each length needs a compiled program
SHORTEST_QUESTION = 64  # padded length of short questions in tokens


class Row(NamedTuple):
    """One input.

    Attributes:
      index: returned with the result, because results come out of order.
      sample_id: folded into the random keys.
      fields: arrays of `Inference.image_fields` or `Inference.text_fields`.
    """

    index: int
    sample_id: int
    fields: Fields


def image_room(image_tokens: int, largest: int) -> int:
    """The padded length of an image in tokens: `largest`, or `largest` halved up to three times.

    Args:
      image_tokens: of the image.
      largest: of the processor's largest image; doubled for long strips, which may have more tokens.
    """
    room = largest
    while room < image_tokens:
        room *= 2
    for _ in range(ROOMS - 1):
        half = -(-room // 2)
        if half < image_tokens:
            break
        room = half
    return room


def batches(rows: Iterable[Row], size: int, kind: Callable[[Row], Hashable]) -> Iterator[list[Row]]:
    """Batches of `size` rows of one kind, each as soon as it is full; at the end the incomplete batches."""
    waiting: dict[Hashable, list[Row]] = {}
    for row in rows:
        group = waiting.setdefault(kind(row), [])
        group.append(row)
        if len(group) == size:
            yield waiting.pop(kind(row))
    yield from waiting.values()


class Inference:
    """A model for captions, image generation and reconstruction; each function is compiled once for a shape.

    Args:
      model: the folder of the model.
      config: settings.
      devices: the parameters are sharded over these devices; None for the first device.

    Raises:
      FileNotFoundError, ValueError: the folder cannot be read (`stages.weights`), or the model cannot draw with these
        settings (`models.uae.check_drawing`).
    """

    def __init__(
        self,
        model: ModelConfig,
        config: InferenceConfig,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (an alias inside of jax)
    ):
        self.config = config
        self.system: System = load_system(
            model,
            image_size=config.size,
            negative_prompt=config.negative_prompt,
            mesh=mesh_of(devices),
            control_tokens=config.control_tokens,
        )
        self.parts = self.system.parts
        # before a benchmark has begun its folder with settings that cannot draw
        uae.check_drawing(self.system.model, config.guidance_scale, config.condition)
        processor, tokenizer = self.system.processor, self.system.tokenizer
        # a caption truncated at the limit has no stop token, but as a text for the decoder it gets one
        spec = batch_spec(
            tokenizer, processor, config.size, config.prompt, config.max_new_tokens + 1, system=config.system_prompt
        )
        self.rows = RowBuilder(tokenizer, processor, spec, config.prompt, config.system_prompt)
        self.largest = max(1, processor.max_pixels // (processor.patch_size * processor.merge_size) ** 2)
        self.text_length = len(self._prompt_ids(0))
        self._write, self._picture, self._rebuild = _programs(self.system, config)

    @property
    def folder(self) -> pathlib.Path:
        """Where the model came from."""
        return self.system.folder

    @property
    def encoders(self) -> Mapping[str, trees.Tree]:
        """Parameters of the image encoders in that folder, by the names of their own folders."""
        return self.parts["encoders"]

    def image_fields(self, image: np.ndarray | Image.Image) -> Fields:
        """The captioner's inputs for an image of any size, padded to its `image_room`.

        The captioner's image processor resizes the image and keeps its aspect ratio.

        Raises:
          ValueError: no content, or an aspect ratio above 200.
        """
        processor, tokenizer = self.system.processor, self.system.tokenizer
        patches, grid = processor(image)
        count = processor.image_tokens(grid)
        ids = self._prompt_ids(count)
        pad, room = tokens.token_id(tokenizer, tokens.IMAGE_PAD), image_room(count, self.largest)
        return prompt_fields(
            ids, [(patches, grid)], processor, pad, room * processor.merge_size**2, self.text_length + room
        )

    def _prompt_ids(self, image_tokens: int) -> list[int]:
        config = self.config
        return tokens.caption_prompt_ids(
            self.system.tokenizer, config.prompt, [image_tokens], system=config.system_prompt
        )

    def question_fields(self, question: str, images: Sequence[np.ndarray | Image.Image]) -> Fields:
        """The captioner's inputs for a question after one or more images; the caption is the answer.

        `<image 2>` in the question places an image (`data.questions.placed_images`). The images are padded together to
        an `image_room`, the text to a power of two.

        Raises:
          ValueError: no image, an image without content, or an aspect ratio above 200.
        """
        processor, tokenizer = self.system.processor, self.system.tokenizer
        ids, seen = question_inputs(tokenizer, processor, placed_images(question, images))
        count = sum(processor.image_tokens(grid) for _, grid in seen)
        room = image_room(count, self.largest)
        text = max(SHORTEST_QUESTION, 1 << (len(ids) - count - 1).bit_length())
        pad = tokens.token_id(tokenizer, tokens.IMAGE_PAD)
        return prompt_fields(ids, seen, processor, pad, room * processor.merge_size**2, text + room)

    def text_fields(self, text: str) -> Fields:
        """The decoder's inputs for a text.

        Raises:
          ValueError: a text longer than `max_new_tokens`.
        """
        fields = self.rows.caption_fields(text)
        if fields["caption_truncated"]:
            raise ValueError(
                f"the text {text[:40]!r}... is longer than {self.config.max_new_tokens} tokens; shorten it or raise "
                "max_new_tokens"
            )
        return fields

    def unknown(self, texts: Iterable[str]) -> str:
        """A line that names words of texts that the model does not know, or nothing."""
        return unknown_note(self.rows.tokenizer, texts)

    def captions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
        """Captions of images (`image_fields`) or answers (`question_fields`), each batch as soon as it is done."""
        for group in batches(rows, self.config.batch_size, _shapes):
            said, lengths = jax.device_get(self._write(self.parts, stacked(group, self.config.batch_size)))
            for row, ids, length in zip(group, said.tokens, lengths):
                yield row, decode_caption(self.system.tokenizer, ids[:length])

    def drawings(self, rows: Iterable[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        """Images generated from texts (`text_fields`), uint8 `[S, S, 3]`, each batch as soon as it is done."""
        for group in batches(rows, self.config.batch_size, lambda row: 0):
            batch = stacked(group, self.config.batch_size)
            lengths = batch["caption_mask"].sum(-1, dtype=np.int32) - 1
            drawn = self._picture(self.parts, batch["caption_ids"], lengths, batch["sample_id"])
            yield from zip(group, from_signed(jax.device_get(drawn)))

    def reconstructions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str, np.ndarray]]:
        """Caption and reconstruction of each image (`image_fields`), each batch as soon as it is done.

        If the text of a caption has more tokens than were sampled, the reconstruction is without the last tokens.
        """
        if self.config.condition == "caption_states":
            yield from self._rebuilt(rows)
            return
        yield from drawn_captions(self, rows, self.rows.caption_fields)

    def _rebuilt(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str, np.ndarray]]:
        """`reconstructions` from the states of the captions' own tokens, of which the text alone has none."""
        for group in batches(rows, self.config.batch_size, _shapes):
            batch = stacked(group, self.config.batch_size)
            said, lengths = self._write(self.parts, batch)
            drawn = from_signed(jax.device_get(self._rebuild(self.parts, batch, said.tokens, said.mask)))
            for row, ids, length, picture in zip(group, *jax.device_get((said.tokens, lengths)), drawn):
                yield row, decode_caption(self.system.tokenizer, ids[:length]), picture


class Engine(Protocol):
    """What captions and draws rows; `Inference` describes the methods."""

    def captions(self, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]: ...
    def drawings(self, rows: Iterable[Row]) -> Iterator[tuple[Row, np.ndarray]]: ...


def drawn_captions(
    engine: Engine, rows: Iterable[Row], text_fields: Callable[[str], Fields]
) -> Iterator[tuple[Row, str, np.ndarray]]:
    """Caption of each image, and the drawing of its caption by the same engine.

    Args:
      engine: of both.
      rows: images.
      text_fields: the inputs for the drawing of a caption.
    """
    said: dict[int, str] = {}

    def texts() -> Iterator[Row]:
        for row, caption in engine.captions(rows):
            said[row.index] = caption
            yield row._replace(fields=text_fields(caption))

    for row, drawn in engine.drawings(texts()):
        yield row, said.pop(row.index), drawn


def mesh_of(devices: Sequence[jax.Device] | None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm] (an alias inside of jax)
    """A mesh over which parameters are sharded: the first device where none are given."""
    devices = jax.local_devices()[:1] if devices is None else list(devices)
    return sharding.make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)


def stacked(group: Sequence[Row], size: int) -> dict[str, np.ndarray]:
    """One batch of the compiled size, filled with the last row."""
    full = [*group, *[group[-1]] * (size - len(group))]
    batch = {name: np.stack([row.fields[name] for row in full]) for name in full[0].fields}
    return batch | {"sample_id": np.array([row.sample_id for row in full], np.int32)}


def _shapes(row: Row) -> Hashable:
    """Rows of equal shapes go through one compiled program."""
    return row.fields["patches"].shape, row.fields["prompt_ids"].shape


def _programs(system: System, config: InferenceConfig) -> tuple[Callable[..., Any], ...]:
    """The compiled functions.

    From images to captions and their lengths, from captions to images, and from images and captions to images.
    """
    key, sampling = jax.random.key(config.seed), SamplingConfig(config.temperature, 0, config.top_p)
    sigmas = noise_levels(system.model, config.steps, config.shift, config.schedule)
    denoising = Denoising(sigmas, config.guidance_scale, config.condition)

    def noise(sample_ids: Array) -> Array:
        return uae.initial_noise(system.model, sample_keys(trees.name_key(key, "noise"), sample_ids))

    def write(parts: Mapping, batch: Mapping) -> tuple[Completion, Array]:
        said = sample_captions(
            system.model, parts, batch, key, max_new_tokens=config.max_new_tokens, stops=system.stops, sampling=sampling
        )
        return said, condition.caption_lengths(said.mask, said.finished)

    def picture(parts: Mapping, ids: Array, lengths: Array, sample_ids: Array) -> Array:
        return jnp.clip(draw(system.model, parts, denoising, ids, lengths, noise(sample_ids)), -1, 1)

    def rebuild(parts: Mapping, batch: Mapping, ids: Array, mask: Array) -> Array:
        contexts = caption_states(system.model, parts, denoising, batch, ids, mask)
        return jnp.clip(draw_from(system.model, parts, denoising, contexts, noise(batch["sample_id"])), -1, 1)

    options = compiler_options(system.model.captioner.text.dtype)
    return tuple(jax.jit(program, compiler_options=options) for program in (write, picture, rebuild))


def builtin_settings() -> dict[str, Any]:
    """The settings of the built-in model of 32-pixel scenes, where they differ from the release's."""
    return dict(
        size=32,
        steps=20,
        guidance_scale=1.0,
        shift=4.0,
        schedule="single",
        max_new_tokens=32,
        temperature=0.7,
        prompt="describe",
        negative_prompt="",
        batch_size=8,
    )
