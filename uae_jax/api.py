"""The Python API: a model that captions pictures, draws texts, and reconstructs pictures through their captions.

    import uae_jax

    model = uae_jax.load("runs/tiny", steps=20)  # a training workdir, an official folder, or "" for the built-in model
    captions = model.caption(["a.png", "b.jpg"])
    pictures = model.generate(["gray background , top left large red circle"])
    for result in model.reconstruct(["a.png"], progress=True):
        result.image.save("a_again.png")

The lists come back in the order of what was given. `each_caption`, `each_drawing` and `each_reconstruction` give every
batch as soon as it is done, hold no more than that in memory, and go on after a picture that cannot be read.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uae_jax.data.loader import square_image
from uae_jax.data.qwen_inputs import to_rgb
from uae_jax.data.sources import load_image
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.settings import frozen
from uae_jax.stages.inference import Inference, InferenceConfig, Row, builtin_settings
from uae_jax.stages.run_config import CAPTION_PROMPT, NEGATIVE_PROMPT
from uae_jax.stages.weights import ModelConfig, model_folder

ImageLike = str | os.PathLike | Image.Image | np.ndarray
Failed = Callable[[int, Exception], None]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A picture, what the captioner said of it, and what was drawn from that alone."""

    original: Image.Image
    caption: str
    image: Image.Image

    def strip(self, side: int = 256) -> Image.Image:
        """Original (its centre square), caption and reconstruction side by side, each square `side` pixels."""
        gap = side // 32
        strip = Image.new("RGB", (3 * side + 4 * gap, side + 2 * gap), "white")
        for column, picture in (
            (0, Image.fromarray(square_image(self.original, min(self.original.size)))),
            (2, self.image),
        ):
            filter_ = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            strip.paste(picture.resize((side, side), filter_), (gap + column * (side + gap), gap))
        font = ImageFont.load_default(max(10, side // 21))
        lines = _wrapped(self.caption, font, side)[: int(side / (font.size * 1.3))]
        ImageDraw.Draw(strip).multiline_text(
            (2 * gap + side, gap), "\n".join(lines), fill="black", font=font, spacing=font.size * 0.2
        )
        return strip


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of words no wider than `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def default_settings(folder: str | os.PathLike = "") -> dict[str, Any]:
    """Fields of `InferenceConfig` that suit a folder: the built-in model's, a training run's own, or the release's.

    A folder whose `llm_lora` holds the whole captioner, as the release's does, also encodes captions through it.

    Raises:
      FileNotFoundError: there is no model.
      ValueError: a run's config.json is not JSON.
    """
    if not str(folder):
        return builtin_settings()
    model = model_folder(folder)
    run = _run_config(pathlib.Path(folder)) or _run_config(model.parent)
    if run is None:
        wrapped = model / "llm_lora"
        return dict(
            prompt=CAPTION_PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            policy_condition=wrapped.is_dir() and qwen_weights.holds_base(wrapped),
        )
    data, evaluation = run["data"], run["evaluation"]
    return dict(
        size=data["image_size"],
        steps=evaluation["sampler_steps"],
        guidance_scale=evaluation["guidance_scale"],
        shift=run["sampler"]["shift"],
        schedule=run["sampler"]["schedule"],
        max_new_tokens=data["max_caption"],
        prompt=data["caption_prompt"],
        negative_prompt=data["negative_prompt"],
        batch_size=min(evaluation["batch_size"], 8),
        policy_condition=_conditions_through_policy(run),
    )


def _conditions_through_policy(run: Mapping) -> bool:
    """Whether the decoder was trained with captions that the trained captioner encodes."""
    return any(run.get(stage, {}).get("condition_model") == "policy" for stage in run["stages"])


def _run_config(folder: pathlib.Path) -> dict | None:
    """The configuration of a training workdir; None for other folders, whose config.json may be of a single model."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or give the folder {folder / 'export'}") from error
    return run if {"stages", "data", "evaluation", "sampler"} <= set(run) else None


def load(
    folder: str | os.PathLike = "",
    *,
    dtype: str = "float32",
    adapters: bool = True,
    devices: Sequence[jax.Device] | None = None,
    **settings: Any,
) -> "Model":
    """A model ready to caption, draw and reconstruct.

    Args:
      folder: official UAE folder, training workdir, or "" for the built-in model of 32-pixel scenes.
      dtype: precision of activations, `float32` or `bfloat16`.
      adapters: False leaves out the folder's `llm_lora` and `dit_lora`, and an `llm` beside its `llm_reference`: the
        model as it was before they were trained.
      devices: over which the parameters are cut; None takes the first one.
      **settings: fields of `InferenceConfig` such as `steps`, `guidance_scale`, `size`, `seed`, `temperature`; what is
        not given is taken from `default_settings`.

    Raises:
      FileNotFoundError, ValueError: the folder cannot be read, or a setting does not exist or cannot be.
    """
    config = frozen(InferenceConfig, default_settings(folder) | settings, "settings")
    return Model(Inference(ModelConfig(folder=str(folder), dtype=dtype, adapters=adapters), config, devices))


class Model:
    """What `load` returns. Pictures are paths, PIL images or uint8 arrays `[H, W, 3]`, of any sizes.

    Every result depends on the settings, the input and its number in `sample_ids` (0, 1, ... where not given) alone: a
    part of the work that is done later, or in another batch, comes out the same.

    Args:
      engine: the loaded model.
    """

    def __init__(self, engine: Inference):
        self.engine = engine

    @property
    def settings(self) -> InferenceConfig:
        """The settings that are in force."""
        return self.engine.config

    def caption(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, progress: bool = False
    ) -> list[str]:
        """A caption of each picture.

        Args:
          images: pictures.
          sample_ids: numbers in 0 .. 2**31 - 1 that the random tokens follow from.
          progress: draw a bar on stderr.

        Raises:
          FileNotFoundError, ValueError: a picture cannot be read.
        """
        return _in_order(self.each_caption(images, sample_ids=sample_ids), len(_listed(images)), "caption", progress)

    def generate(
        self, texts: Sequence[str], *, sample_ids: Sequence[int] | None = None, progress: bool = False
    ) -> list[Image.Image]:
        """A picture of each text, `size` pixels square.

        Args:
          texts: what to draw.
          sample_ids: numbers in 0 .. 2**31 - 1 that the noise follows from; with the same number and text a picture is
            the same.
          progress: draw a bar on stderr.

        Raises:
          ValueError: a text has more than `max_new_tokens` tokens.
        """
        return _in_order(self.each_drawing(texts, sample_ids=sample_ids), len(_listed(texts)), "generate", progress)

    def reconstruct(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, progress: bool = False
    ) -> list[Reconstruction]:
        """Captions each picture and draws the caption.

        Args:
          images: pictures.
          sample_ids: numbers in 0 .. 2**31 - 1 that random tokens and noise follow from.
          progress: draw a bar on stderr.

        Raises:
          FileNotFoundError, ValueError: a picture cannot be read.
        """
        return _in_order(
            self.each_reconstruction(images, sample_ids=sample_ids), len(_listed(images)), "reconstruct", progress
        )

    def each_caption(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, failed: Failed | None = None
    ) -> Iterator[tuple[int, str]]:
        """(index, caption) of each picture, batch by batch; pictures of one shape go together, so that others may
        overtake.

        Args:
          images: pictures; files are read when their turn comes.
          sample_ids: see `caption`.
          failed: called with index and error of a picture that cannot be read, which is then left out; None raises the
            error.

        Raises:
          FileNotFoundError, ValueError: a picture cannot be read, and there is no `failed`.
        """
        for row, caption in self.engine.captions(
            self._rows(images, sample_ids, failed, lambda image: self._opened(image)[1])
        ):
            yield row.index, caption

    def each_drawing(
        self, texts: Sequence[str], *, sample_ids: Sequence[int] | None = None, failed: Failed | None = None
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of each text, batch by batch; see `each_caption` and `generate`."""
        for row, drawn in self.engine.drawings(self._rows(texts, sample_ids, failed, self.engine.text_fields)):
            yield row.index, Image.fromarray(drawn)

    def each_reconstruction(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, failed: Failed | None = None
    ) -> Iterator[tuple[int, Reconstruction]]:
        """(index, reconstruction) of each picture, batch by batch; see `each_caption`."""
        originals: dict[int, Image.Image] = {}

        def opened(numbered: tuple[int, ImageLike]) -> dict[str, np.ndarray]:
            index, image = numbered
            originals[index], fields = self._opened(image)
            return fields

        rows = self._rows(list(enumerate(_listed(images))), sample_ids, failed, opened)
        for row, caption, drawn in self.engine.reconstructions(rows):
            yield row.index, Reconstruction(originals.pop(row.index), caption, Image.fromarray(drawn))

    def _opened(self, image: ImageLike) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """A picture as RGB, turned as its file says and with transparency on white, and the captioner's inputs."""
        is_file = isinstance(image, str | os.PathLike)
        original = Image.fromarray(load_image(image)) if is_file else to_rgb(image)
        try:
            return original, self.engine.image_fields(original)
        except ValueError as error:
            raise ValueError(f"{image}: {error}" if is_file else str(error)) from error

    def _rows(
        self, inputs: Sequence, sample_ids: Sequence[int] | None, failed: Failed | None, fields: Callable[[Any], dict]
    ) -> Iterator[Row]:
        """The engine's rows; errors of a single input go to `failed`."""
        numbers = range(len(_listed(inputs))) if sample_ids is None else sample_ids
        if len(numbers) != len(inputs):
            raise ValueError(f"there are {len(numbers)} sample_ids for {len(inputs)} inputs; give one for each")
        for index, (value, number) in enumerate(zip(inputs, numbers)):
            if not 0 <= number < 2**31:
                raise ValueError(f"sample_ids[{index}] is {number}; it must be in 0 .. 2**31 - 1")
            try:
                row = Row(index, int(number), fields(value))
            except (ValueError, OSError) as error:
                if failed is None:
                    raise
                failed(index, error)
                continue
            yield row


def _listed(inputs: Any) -> Any:
    """Inputs as they are; a single one would be taken apart, letter by letter or row by row."""
    if isinstance(inputs, str | os.PathLike | Image.Image) or isinstance(inputs, np.ndarray) and inputs.ndim == 3:
        raise ValueError("give a list of pictures or texts, also for a single one")
    return inputs


def _in_order(results: Iterator[tuple[int, Any]], count: int, what: str, progress: bool) -> list:
    """The results by their index, with a bar."""
    from tqdm import tqdm

    found = dict(tqdm(results, total=count, desc=what, file=sys.stderr, disable=not progress))
    return [found[index] for index in range(count)]
