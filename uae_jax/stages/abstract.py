"""The model of a folder without its weights: configs, shapes of parameters and shapes of a batch."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

import jax

from uae_jax.data import tokenizer as tokens
from uae_jax.data.loader import BatchSpec, batch_shapes
from uae_jax.data.qwen_inputs import ImageProcessor, load_image_processor
from uae_jax.files.json_files import read_json
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.methods.trained import COPY
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Decoder
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.encoders.weights import open_encoder
from uae_jax.models.parts import eight_bits
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.decoder import SD3Decoder
from uae_jax.models.uae import UAE
from uae_jax.rewards.caption_similarity import PART as SCORER
from uae_jax.rewards.caption_similarity import CaptionScorer
from uae_jax.rewards.similarity import Encoder
from uae_jax.rollouts.frozen_inputs import field_shapes
from uae_jax.stages import decoders
from uae_jax.stages.data import spec_of
from uae_jax.stages.program import with_adapters
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import (
    ENCODERS,
    REFERENCE,
    condition_template,
    config_folder,
    model_folder,
    processor_folder,
)


class HasParts(Protocol):
    """A system without weights, of any kind of model; `parts` are shapes."""

    @property
    def model(self) -> Any: ...

    @property
    def parts(self) -> dict: ...


Shapes = TypeVar("Shapes", bound=HasParts)


@dataclasses.dataclass(frozen=True)
class AbstractSystem:
    """As `stages.weights.System`, with shapes in place of arrays.

    Attributes:
      model: the description.
      parts: the dictionary of parameters (`models.uae`), `jax.ShapeDtypeStruct` leaves.
      encoders: image encoders by name.
      stops: ids that end a caption.
      processor: of the captioner's images.
      spec: fixed shapes of a batch.
      scorer: of captions, where the settings name one.
      tokenizer: of the captioner; None for published sizes alone.
    """

    model: UAE
    parts: dict
    encoders: dict[str, Encoder]
    stops: tuple[int, ...]
    processor: ImageProcessor
    spec: BatchSpec
    scorer: CaptionScorer | None = None
    tokenizer: Any = None

    def batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of so many rows, with the fields that may be precomputed."""
        shapes = batch_shapes(self.spec, batch_size, self.processor)
        made = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
        return made | field_shapes(self.model, batch_size, self.spec.max_caption)


def abstract_folder(config: RunConfig) -> AbstractSystem:
    """The system of a model folder.

    Raises:
      FileNotFoundError, ValueError: a config of the folder is absent or not supported.
    """
    settings, data = config.model, config.data
    folder = model_folder(settings.folder)
    words = processor_folder(folder)
    tokenizer = tokens.load_tokenizer(words, data.control_tokens)
    overrides: dict[str, Any] = dict(dtype=settings.dtype, remat=settings.remat, lora_alpha=settings.lora_alpha)
    captioner = qwen_config.from_folder(config_folder(folder), **overrides)
    banned: tuple[tuple[int, int], ...] = ()
    if (folder / decoders.FOLDER).is_dir():
        place = folder / decoders.FOLDER
        decoder, banned = decoders.describe(place, tokenizer, data.negative_prompt, **overrides)
    else:
        decoder = _sd3(
            folder, captioner, condition_template(tokenizer, data.negative_prompt, captioner.pad_token_id), overrides
        )
    processor = load_image_processor(words, captioner.vision.window_size)
    spec = spec_of(data, tokenizer, processor)
    encoders = encoders_of(folder)
    parts = part_shapes(captioner, decoder, _projector_width(folder / "llm", captioner), encoders)
    scorer = None
    if settings.caption_scorer:
        source = open_encoder(model_folder(settings.caption_scorer) / SCORER)
        if not isinstance(source.config, CLIPConfig):
            raise ValueError(
                f"{source.path} holds no CLIP with both towers; see configs/bootstrap.py, phase caption_scorer"
            )
        scorer = CaptionScorer(source.config, source.preprocess())
        parts["encoders"][SCORER] = clip.abstract_params(source.config)
    if settings.adapters and (folder / REFERENCE).is_dir():
        parts[f"language{COPY}"] = parts["language"]
    if settings.decoder_weights == "int8":
        parts = eight_bit_shapes(decoder, parts)
    model = UAE(captioner, decoder, data.image_size, banned)
    return AbstractSystem(model, parts, encoders, tokens.stop_ids(tokenizer), processor, spec, scorer, tokenizer)


def _sd3(
    folder: pathlib.Path, captioner: qwen_config.Qwen2_5VLConfig, template: ConditionTemplate, overrides: dict[str, Any]
) -> SD3Decoder:
    dit = folder / "dit" if (folder / "dit").is_dir() else folder / "SD3" / "transformer"
    transformer = TransformerConfig.from_folder(dit, **overrides)
    return SD3Decoder(transformer, VAEConfig.from_folder(folder / "SD3" / "vae"), template, captioner)


def with_run_adapters(config: RunConfig, system: Shapes) -> Shapes:
    """The system with the adapters that the stages of a run will train.

    Raises:
      ValueError: see `methods.trained.check_start`.
    """
    parts = jax.eval_shape(lambda parts: with_adapters(config, system.model, parts, jax.random.key(0)), system.parts)
    return cast(Shapes, dataclasses.replace(cast(Any, system), parts=parts))


def part_shapes(
    captioner: qwen_config.Qwen2_5VLConfig,
    decoder: Decoder,
    projector_width: int,
    encoders: Mapping[str, Encoder],
) -> dict:
    """Shapes of all parameters, float32."""
    width, features = captioner.text.width, decoder.transformer.joint_attention_dim
    projector = jax.eval_shape(lambda: qwen.init_projector(jax.random.key(0), width, projector_width, features))
    return {
        **qwen.abstract_params(captioner),
        **({"projector": projector} if "projector" in decoder.parts else {}),
        **decoder.abstract_parts(),
        "encoders": encoder_shapes(encoders),
    }


def eight_bit_shapes(decoder: Decoder, parts: dict) -> dict:
    """Shapes of all parameters with the decoder's kernels in 8 bits, see `models.parts.eight_bits`.

    Raises:
      ValueError: the decoder has no text encoder of its own.
    """
    if "text_encoder" not in decoder.parts:
        raise ValueError(
            "model.decoder_weights=int8 is for decoders with a text encoder of their own (docs/decoders.md); set it to "
            "model"
        )

    def rounded(parts: dict) -> dict:
        found = dict(parts)
        eight_bits(found)
        return found

    return jax.eval_shape(rounded, parts)


def encoders_of(folder: pathlib.Path) -> dict[str, Encoder]:
    """The image encoders of a model folder by name, without weights."""
    return {name: _encoder(folder / name) for name in ENCODERS if (folder / name).is_dir()}


def encoder_shapes(encoders: Mapping[str, Encoder]) -> dict[str, Any]:
    """Shapes of the parameters of image encoders by name, float32."""
    models = {"clip": clip, "dinov2": dino, "dinov3": dino}
    return {name: models[encoder.kind].abstract_params(encoder.config) for name, encoder in encoders.items()}


def _projector_width(folder: pathlib.Path, captioner: qwen_config.Qwen2_5VLConfig) -> int:
    """Of the stored tensor's header; without weights, four times the language model's width as in the release."""
    if not any(folder.glob("*.safetensors")):
        return 4 * captioner.text.width
    stored = TensorFolder(folder)
    return stored.shape("projector.0.weight")[0] if "projector.0.weight" in stored.names() else 4 * captioner.text.width


def _encoder(folder: pathlib.Path) -> Encoder:
    kind = str(read_json(folder).get("model_type"))
    classes = {
        "clip": CLIPConfig,
        "clip_vision_model": CLIPVisionConfig,
        "dinov2": Dinov2Config,
        "dinov3_vit": Dinov3Config,
    }
    if kind not in classes:
        raise ValueError(f"{folder} holds a {kind} model; use a CLIP, DINOv2 or DINOv3 folder")
    model = classes[kind].from_folder(folder)
    model = model.vision if isinstance(model, CLIPConfig) else model
    name = {"clip_vision_model": "clip", "dinov3_vit": "dinov3"}.get(kind, kind)
    return Encoder(folder.name, name, model, Preprocess.from_folder(folder))
