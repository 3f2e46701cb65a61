"""The Python API: a model that captions images, generates images from texts, and reconstructs images from captions.

    import uae_jax

    model = uae_jax.load("runs/tiny", steps=20)  # a training workdir or official folder; the built-in model without
    captions = model.caption(["a.png", "b.jpg"])
    images = model.generate(["gray background , top left large red circle"])
    for result in model.reconstruct(["a.png"], progress=True):
        result.image.save("a_again.png")

The lists are in the order of the inputs. `each_caption`, `each_drawing` and `each_reconstruction` give every batch as
soon as it is done, keep no more than a batch in memory, and can continue after an unreadable image.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from uae_jax.data.images import load_image, square_image, to_rgb
from uae_jax.data.qwen_inputs import Fields
from uae_jax.files.paths import to_path
from uae_jax.files.strips import strip
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.settings import frozen
from uae_jax.stages import decoders
from uae_jax.stages.engines import Engine, open_engine, single_engine
from uae_jax.stages.inference import InferenceConfig, Row, builtin_settings
from uae_jax.stages.inference_config import deciding_condition
from uae_jax.stages.run_config import CAPTION_PROMPT, NEGATIVE_PROMPT
from uae_jax.stages.unified_inference import SCENES
from uae_jax.stages.weights import BUILTIN, DEFAULT, ModelConfig, builtin_folder, model_folder

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
Failed = Callable[[int, Exception], None]
# fields that tell the config.json of a training workdir, and of a bootstrap, from that of a single model
TRAINING = frozenset(("stages", "data", "evaluation", "sampler"))
BOOTSTRAP = frozenset(("phases", "data", "side", "decoder"))


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """An image, its caption, and the image generated from the caption alone."""

    original: Image.Image
    caption: str
    image: Image.Image

    def strip(self, side: int = 256) -> Image.Image:
        """Original (its centre square), caption and reconstruction side by side, each `side` pixels square."""
        original = Image.fromarray(square_image(self.original, min(self.original.size)))
        return strip(original, self.caption, self.image, side)


def default_settings(folder: str | os.PathLike[str] = "") -> dict[str, Any]:
    """Fields of `InferenceConfig` for a folder: those of the built-in model, of a training run, or of the release.

    If `llm_lora` holds the complete captioner, as in the release, that captioner also encodes captions.

    Raises:
      FileNotFoundError: no model.
      ValueError: a run's config.json is not JSON.
    """
    single = single_engine(str(folder))
    if not str(folder) or builtin_folder(folder):
        return builtin_settings() | (SCENES if single else {})
    if single:
        model, run = model_folder(str(folder)), _run_config(to_path(folder))
        run = run or _run_config(model.parent)
        return single.settings(str(folder)) | (single.run_settings(run) if run else {})
    model = model_folder(str(folder))
    run = _run_config(to_path(folder)) or _run_config(model.parent)
    if run is None and (made := _read_config(model.parent, BOOTSTRAP)):
        return builtin_settings() | {"size": made["side"]}
    if run is None:
        wrapped = model / "llm_lora"
        own = decoders.defaults(model)
        if own is not None:
            return {"prompt": CAPTION_PROMPT, **own}
        return dict(
            prompt=CAPTION_PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            condition="policy" if wrapped.is_dir() and qwen_weights.holds_base(wrapped) else "reference",
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
        system_prompt=data.get("caption_system", ""),
        negative_prompt=data["negative_prompt"],
        control_tokens=data.get("control_tokens", False),
        batch_size=min(evaluation["batch_size"], 8),
        condition=_condition(run),
    )


def _condition(run: Mapping) -> str:
    """What the decoder read of captions in training; `condition_model` is the name that older runs have."""
    sections = [run.get(stage, {}) for stage in run["stages"]]
    return deciding_condition(
        [section.get("condition", section.get("condition_model", "reference")) for section in sections]
    )


def _run_config(folder: pathlib.Path) -> dict | None:
    """The configuration of a training workdir; None for other folders, whose config.json may belong to one model."""
    return _read_config(folder, TRAINING)


def _read_config(folder: pathlib.Path, fields: frozenset[str]) -> dict | None:
    """The content of a folder's config.json where it has these fields."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or give the folder {folder / 'export'}") from error
    return found if fields <= set(found) else None


def load(
    folder: str | os.PathLike[str] = "",
    *,
    dtype: str = "float32",
    adapters: bool = True,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (an alias inside of jax)
    **settings: Any,
) -> "Model":
    """A model for captions, image generation and reconstruction.

    Args:
      folder: official UAE folder, training workdir, folder of a Janus model, "" for the built-in trained model
        of 32-pixel scenes, `start` for it before its training, or `unified` for the built-in unified model.
      dtype: precision of activations, `float32` or `bfloat16`.
      adapters: False gives the model from before its training: without `llm_lora` and `dit_lora`, and with
        `llm_reference` in place of `llm`.
      devices: the parameters are sharded over these devices; None for the first device.
      **settings: fields of `InferenceConfig` such as `steps`, `guidance_scale`, `size`, `seed`, `temperature`; other
        fields have the values of `default_settings`.

    Raises:
      FileNotFoundError, ValueError: the folder cannot be read, or a setting is unknown or invalid.
    """
    config = frozen(InferenceConfig, default_settings(folder) | settings, "settings")
    place = str(folder) or DEFAULT
    return Model(open_engine(ModelConfig(folder=place, dtype=dtype, adapters=adapters), config, devices))


class Model:
    """The result of `load`. Images are paths, PIL images or uint8 arrays `[H, W, 3]`, of any size.

    A result depends only on the settings, the input and its number in `sample_ids` (default 0, 1, ...). So a result is
    the same in another batch, or in a later call.

    Args:
      engine: the loaded model.
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def warning(self) -> str:
        """A line about a model that is not worth its captions yet, or nothing."""
        if self.engine.folder != BUILTIN:
            return ""
        return "this is the start model, not trained yet: its captions say little, and its pictures are blurs"

    @property
    def settings(self) -> InferenceConfig:
        """The settings of this model."""
        return self.engine.config

    def caption(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, progress: bool = False
    ) -> list[str]:
        """A caption for each image.

        Args:
          images: images.
          sample_ids: numbers in 0 .. 2**31 - 1 that seed the random tokens.
          progress: show a progress bar on stderr.

        Raises:
          FileNotFoundError, ValueError: an image cannot be read.
        """
        return _in_order(self.each_caption(images, sample_ids=sample_ids), len(_listed(images)), "caption", progress)

    def generate(
        self, texts: Sequence[str], *, sample_ids: Sequence[int] | None = None, progress: bool = False
    ) -> list[Image.Image]:
        """An image for each text, `size` pixels square.

        Args:
          texts: captions of the images.
          sample_ids: numbers in 0 .. 2**31 - 1 that seed the noise; the same number and text give the same image.
          progress: show a progress bar on stderr.

        Raises:
          ValueError: a text has more than `max_new_tokens` tokens.
        """
        return _in_order(self.each_drawing(texts, sample_ids=sample_ids), len(_listed(texts)), "generate", progress)

    def reconstruct(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, progress: bool = False
    ) -> list[Reconstruction]:
        """Captions each image, and generates an image from the caption.

        Args:
          images: images.
          sample_ids: numbers in 0 .. 2**31 - 1 that seed random tokens and noise.
          progress: show a progress bar on stderr.

        Raises:
          FileNotFoundError, ValueError: an image cannot be read.
        """
        return _in_order(
            self.each_reconstruction(images, sample_ids=sample_ids), len(_listed(images)), "reconstruct", progress
        )

    def unknown(self, texts: Iterable[str]) -> str:
        """A line that names words of texts that the model does not know, or nothing."""
        return self.engine.unknown(texts)

    def each_caption(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, failed: Failed | None = None
    ) -> Iterator[tuple[int, str]]:
        """(index, caption) of each image, batch by batch, out of order: a batch has images of one shape.

        Args:
          images: images; a file is read just before its batch.
          sample_ids: see `caption`.
          failed: called with index and error of an unreadable image, which is then left out; None raises the error.

        Raises:
          FileNotFoundError, ValueError: an image cannot be read, and there is no `failed`.
        """
        rows = self._rows(images, sample_ids, failed, lambda image: self._opened(image)[1])
        for row, caption in self.engine.captions(rows):
            yield row.index, caption

    def each_drawing(
        self, texts: Sequence[str], *, sample_ids: Sequence[int] | None = None, failed: Failed | None = None
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index, image) of each text, batch by batch; see `each_caption` and `generate`."""
        for row, drawn in self.engine.drawings(self._rows(texts, sample_ids, failed, self.engine.text_fields)):
            yield row.index, Image.fromarray(drawn)

    def each_reconstruction(
        self, images: Sequence[ImageLike], *, sample_ids: Sequence[int] | None = None, failed: Failed | None = None
    ) -> Iterator[tuple[int, Reconstruction]]:
        """(index, reconstruction) of each image, batch by batch; see `each_caption`."""
        originals: dict[int, Image.Image] = {}

        def opened(numbered: tuple[int, ImageLike]) -> Fields:
            index, image = numbered
            originals[index], fields = self._opened(image)
            return fields

        rows = self._rows(list(enumerate(_listed(images))), sample_ids, failed, opened)
        for row, caption, drawn in self.engine.reconstructions(rows):
            yield row.index, Reconstruction(originals.pop(row.index), caption, Image.fromarray(drawn))

    def _opened(self, image: ImageLike) -> tuple[Image.Image, Fields]:
        """An image as RGB, with EXIF rotation applied and transparency on white, and the captioner's inputs."""
        place = f"{image}: " if isinstance(image, str | os.PathLike) else ""
        original = Image.fromarray(load_image(image)) if isinstance(image, str | os.PathLike) else to_rgb(image)
        try:
            return original, self.engine.image_fields(original)
        except ValueError as error:
            raise ValueError(f"{place}{error}") from error

    def _rows(
        self,
        inputs: Sequence[Any],
        sample_ids: Sequence[int] | None,
        failed: Failed | None,
        fields: Callable[[Any], Fields],
    ) -> Iterator[Row]:
        """The engine's rows; the error of one input goes to `failed`."""
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
    """The inputs, unless they are a single input, which a loop would split into letters or rows."""
    if isinstance(inputs, str | os.PathLike | Image.Image) or isinstance(inputs, np.ndarray) and inputs.ndim == 3:
        raise ValueError("give a list of images or texts, also for a single one")
    return inputs


def _in_order(results: Iterator[tuple[int, Any]], count: int, what: str, progress: bool) -> list:
    """The results in order of their index, with a progress bar."""
    from tqdm import tqdm

    found = dict(tqdm(results, total=count, desc=what, file=sys.stderr, disable=not progress))
    return [found[index] for index in range(count)]
