"""The model without its weights: configs, shapes of parameters and shapes of a batch."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from uae_jax.data import tokenizer as tokens
from uae_jax.data.loader import BatchSpec, batch_shapes, batch_spec, check_max_prompt
from uae_jax.data.qwen_inputs import ImageProcessor, load_image_processor
from uae_jax.files.json_files import read_json
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.sd3 import transformer, vae
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.uae import UAE
from uae_jax.planning import published
from uae_jax.rl.rewards import Encoder
from uae_jax.stages.run import with_adapters
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import ENCODERS, REFERENCE, model_folder


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
    """

    model: UAE
    parts: dict
    encoders: dict[str, Encoder]
    stops: tuple[int, ...]
    processor: ImageProcessor
    spec: BatchSpec
    scorer: None = None  # of captions: a control of the built-in model, not planned for

    def batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of so many rows."""
        shapes = batch_shapes(self.spec, batch_size, self.processor)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def abstract_system(config: RunConfig) -> AbstractSystem:
    """The system of a run, from a folder's configs where one is given, otherwise from the published ones.

    Raises:
      FileNotFoundError, ValueError: a config of the folder is absent or not supported.
    """
    sizes = published.transformer_of(config.preset)
    if config.model.folder or sizes is None:
        system = _from_folder(config)
    else:
        system = _published(config, sizes)
    return dataclasses.replace(
        system, parts=jax.eval_shape(lambda parts: with_adapters(config, parts, jax.random.key(0)), system.parts)
    )


def _parts(
    captioner: qwen_config.Qwen2_5VLConfig,
    decoder: TransformerConfig,
    autoencoder: VAEConfig,
    projector_width: int,
    encoders: Mapping[str, Encoder],
) -> dict:
    """Shapes of all parameters, float32."""
    projector = jax.eval_shape(
        lambda: qwen.init_projector(
            jax.random.key(0), captioner.text.width, projector_width, decoder.joint_attention_dim
        )
    )
    models = {"clip": clip, "dinov2": dino, "dinov3": dino}
    return {
        **qwen.abstract_params(captioner),
        "projector": projector,
        "transformer": transformer.abstract_params(decoder),
        "vae": vae.abstract_params(autoencoder),
        "pooled": jax.ShapeDtypeStruct((decoder.pooled_projection_dim,), jnp.float32),
        "encoders": {name: models[encoder.kind].abstract_params(encoder.config) for name, encoder in encoders.items()},
    }


def _published(config: RunConfig, sizes: TransformerConfig) -> AbstractSystem:
    settings, data = config.model, config.data
    captioner, decoder = published.using(
        sizes, dtype=settings.dtype, remat=settings.remat, lora_alpha=settings.lora_alpha
    )
    rows, columns = grid = published.PROCESSOR.grid_of(data.image_size, data.image_size)
    prompt = published.CAPTION_PROMPT_TOKENS + published.PROCESSOR.image_tokens(grid)
    check_max_prompt(data.max_prompt or prompt, prompt, data.image_size)
    spec = BatchSpec(data.image_size, rows * columns, data.max_prompt or prompt, data.max_caption)
    model = UAE(captioner, decoder, published.VAE, published.template(), data.image_size)
    parts = _parts(captioner, decoder, published.VAE, published.PROJECTOR_WIDTH, published.ENCODERS)
    return AbstractSystem(model, parts, dict(published.ENCODERS), captioner.stop_token_ids, published.PROCESSOR, spec)


def _from_folder(config: RunConfig) -> AbstractSystem:
    settings, data = config.model, config.data
    folder = model_folder(settings.folder)
    words = folder / "llm_processor" if (folder / "llm_processor").is_dir() else folder / "llm"
    tokenizer = tokens.load_tokenizer(words)
    overrides = dict(dtype=settings.dtype, remat=settings.remat, lora_alpha=settings.lora_alpha)
    captioner = qwen_config.from_folder(folder / "llm", **overrides)
    decoder = TransformerConfig.from_folder(
        folder / "dit" if (folder / "dit").is_dir() else folder / "SD3" / "transformer", **overrides
    )
    autoencoder = VAEConfig.from_folder(folder / "SD3" / "vae")
    prefix, suffix = tokens.condition_template(tokenizer)
    negative = tokens.encode_caption(tokenizer, data.negative_prompt)[:-1]
    template = ConditionTemplate(tuple(prefix), tuple(suffix), tuple(negative), captioner.pad_token_id)
    processor = load_image_processor(words, captioner.vision.window_size)
    spec = batch_spec(tokenizer, processor, data.image_size, data.caption_prompt, data.max_caption)
    if data.max_prompt:
        check_max_prompt(data.max_prompt, spec.max_prompt, data.image_size)
        spec = dataclasses.replace(spec, max_prompt=data.max_prompt)
    encoders = {name: _encoder(folder / name) for name in ENCODERS if (folder / name).is_dir()}
    parts = _parts(captioner, decoder, autoencoder, _projector_width(folder / "llm", captioner), encoders)
    if settings.adapters and (folder / REFERENCE).is_dir():
        parts["language_policy"] = parts["language"]
    model = UAE(captioner, decoder, autoencoder, template, data.image_size)
    return AbstractSystem(model, parts, encoders, tokens.stop_ids(tokenizer), processor, spec)


def _projector_width(folder: pathlib.Path, captioner: qwen_config.Qwen2_5VLConfig) -> int:
    """Of the stored tensor's header; without weights, four times the language model's width as in the release."""
    if not any(folder.glob("*.safetensors")):
        return 4 * captioner.text.width
    stored = TensorFolder(folder)
    return stored.shape("projector.0.weight")[0] if "projector.0.weight" in stored.names() else 4 * captioner.text.width


def _encoder(folder: pathlib.Path) -> Encoder:
    kind = read_json(folder).get("model_type")
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
