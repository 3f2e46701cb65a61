"""One network that captions and draws, as a run reads, describes and writes it; the image encoders lie beside it.

config.json model.safetensors tokenizer.json ...   the network, in the layout of transformers or the official one
[llm_lora/]                                        adapter of its language model, as peft writes it
clip/ [dinov2/ dinov3/]                            image encoders for the reward and for the scores
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import DTypeLike

from uae_jax import sharding
from uae_jax.data.janus_inputs import SYSTEM, JanusTokenizer, check_image_settings
from uae_jax.data.janus_rows import JanusRows, janus_shapes
from uae_jax.data.loader import BatchSpec, check_max_prompt
from uae_jax.files.json_files import write_json
from uae_jax.hf.items import published_items, write_items
from uae_jax.methods.trained import ADAPTER_FOLDERS
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.janus import config as configs
from uae_jax.models.janus import model as janus
from uae_jax.models.janus import weights
from uae_jax.models.janus.unified import Unified
from uae_jax.models.language import weights as language_weights
from uae_jax.nn.lora import merge_adapter
from uae_jax.rewards.similarity import Encoder
from uae_jax.stages.abstract import encoder_shapes, encoders_of
from uae_jax.stages.folders.files import begin, copy_file, copy_folder_again, small_files, take_place
from uae_jax.stages.folders.parts import with_dtype
from uae_jax.stages.run_config import DataConfig, RunConfig
from uae_jax.stages.weights import ENCODERS, ModelConfig, load_encoders, model_folder, placed, placement

LORA = ADAPTER_FOLDERS["language"]
PARTS = ("vision", "aligner", "language", "generation")  # those that may be stored in another precision


@dataclasses.dataclass(frozen=True)
class UnifiedSystem:
    """A network that was read from a folder, with what its inputs need.

    Attributes:
      folder: where it came from.
      model: the description.
      parts: parameters: those of `models.janus.model`, an adapter if there is one, and the `encoders`.
      tokenizer: of its texts.
      encoders: image encoders by name.
      stops: ids that end a caption.
      scorer: None: it has no scorer of captions.
    """

    folder: pathlib.Path
    model: Unified
    parts: dict
    tokenizer: JanusTokenizer
    encoders: dict[str, Encoder]
    stops: tuple[int, ...]
    scorer: None = None


@dataclasses.dataclass(frozen=True)
class AbstractUnified:
    """As `UnifiedSystem`, with shapes in place of arrays, and the fixed shapes of a batch."""

    model: Unified
    parts: dict
    encoders: dict[str, Encoder]
    stops: tuple[int, ...]
    spec: BatchSpec
    tokenizer: JanusTokenizer | None = None
    scorer: None = None

    def batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of so many rows."""
        shapes = janus_shapes(self.spec, batch_size)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def load_unified(
    config: ModelConfig,
    *,
    image_size: int,
    frozen: Collection[str] = (),
    control_tokens: bool = False,
    mesh: Mesh | None = None,
) -> UnifiedSystem:
    """Reads a network with the encoders beside it; arguments and errors are those of `weights.load_system`."""
    folder = model_folder(config.folder)
    network = _network(folder, config, image_size)
    tokenizer = _tokenizer(folder, network, control_tokens)
    merged = config.merge_adapters and config.adapters and (folder / LORA).is_dir()
    exact = {"vq", *(name for name in PARTS if name not in frozen), *(("language",) if merged else ())}
    precision = {name: np.dtype(np.float32 if name in exact else config.frozen_dtype) for name in ("vq", *PARTS)}
    _, parts = weights.load(folder, network, precision, placement(mesh))
    if config.adapters and (folder / LORA).is_dir():
        network = _add_adapter(folder / LORA, network, parts, mesh, config.merge_adapters)
    encoders, parts["encoders"] = load_encoders(folder, mesh)
    model = Unified(network, _template(tokenizer, network))
    return UnifiedSystem(folder, model, parts, tokenizer, encoders, network.stop_token_ids)


def _network(folder: pathlib.Path, config: ModelConfig, image_size: int) -> configs.JanusConfig:
    """The sizes of a folder's network, which sees and draws images of the run's size."""
    network = configs.from_folder(folder, dtype=config.dtype, remat=config.remat, lora_alpha=config.lora_alpha)
    if image_size != network.vq.image_size:
        raise ValueError(
            f"images of {image_size} pixels are asked for, but the model in {folder} draws {network.vq.image_size} "
            "pixels alone; set that as config.data.image_size, or as the size"
        )
    check_image_settings(folder, network.vision.image_size)
    return network


def _tokenizer(folder: pathlib.Path, network: configs.JanusConfig, control_tokens: bool) -> JanusTokenizer:
    tokenizer = JanusTokenizer(folder, configs.special_ids(folder), network.vision.tokens, control_tokens)
    if len(tokenizer) > network.text.vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer):,} tokens in tokenizer.json and {network.text.vocab_size:,} in config.json; "
            "copy both from one model"
        )
    return tokenizer


def _template(tokenizer: JanusTokenizer, network: configs.JanusConfig) -> ConditionTemplate:
    before, after = tokenizer.drawing_template()
    return ConditionTemplate(tuple(before), tuple(after), (), network.pad_token_id)


def _add_adapter(
    folder: pathlib.Path, network: configs.JanusConfig, parts: dict, mesh: Mesh | None, merge: bool
) -> configs.JanusConfig:
    """Puts the adapter beside the language model or into it; the sizes have the alpha of one that is beside it."""
    adapted, adapter = weights.load_adapter(folder, network, np.dtype(np.float32))
    adapter = placed("language_lora", adapter, mesh)
    if merge:
        parts["language"] = merge_adapter(parts["language"], adapter, adapted.text.lora_alpha)
        return network
    parts["language_lora"] = adapter
    return adapted


def abstract_unified(config: RunConfig) -> AbstractUnified:
    """The system of a folder without weights.

    Raises:
      FileNotFoundError, ValueError: a config of the folder is absent or not supported.
    """
    folder = model_folder(config.model.folder)
    network = _network(folder, config.model, config.data.image_size)
    tokenizer = _tokenizer(folder, network, config.data.control_tokens)
    prompt = len(tokenizer.question_ids(config.data.caption_prompt, system_of(config.data)))
    encoders = encoders_of(folder)
    shapes = unified_shapes(network, encoders)
    spec = unified_spec(config.data, prompt)
    model = Unified(network, _template(tokenizer, network))
    return AbstractUnified(model, shapes, encoders, network.stop_token_ids, spec, tokenizer)


def unified_shapes(network: configs.JanusConfig, encoders: Mapping[str, Encoder]) -> dict[str, Any]:
    """Shapes of all parameters, float32."""
    return {**janus.abstract_params(network), "encoders": encoder_shapes(encoders)}


def unified_spec(data: DataConfig, prompt: int) -> BatchSpec:
    """Fixed shapes of a batch whose caption prompt has so many tokens.

    Raises:
      ValueError: `data.max_prompt` is less.
    """
    room = data.max_prompt or prompt
    check_max_prompt(room, prompt, data.image_size)
    return BatchSpec(data.image_size, 0, room, data.max_caption)


def system_of(data: DataConfig) -> str:
    """The text before the caption prompt: the official one, unless the settings have another."""
    return data.caption_system or SYSTEM


def unified_rows(data: DataConfig, system: Any) -> JanusRows:
    """Turns examples into rows of a batch, by the tokenizer of a system."""
    prompt = len(system.tokenizer.question_ids(data.caption_prompt, system_of(data)))
    return JanusRows(system.tokenizer, unified_spec(data, prompt), data.caption_prompt, system_of(data))


def export_unified(system: UnifiedSystem, parts: Mapping, folder: pathlib.Path, dtype: DTypeLike = np.float32) -> None:
    """Writes the network as transformers opens it, its adapter as peft does, and the encoders beside them.

    A fully fine-tuned language model takes the place of its reference. Arguments are those of `export.export_system`.
    """
    dtype, network = np.dtype(dtype), system.model.network
    adapter = parts.get("language_lora")
    trained = {name.removesuffix("_policy"): parts[name] for name in written_parts(parts) if name != "language_lora"}
    items = published_items(trained, weights.rules(network), dtype, sharding.first_process_value)
    factors = []
    if adapter:
        table = language_weights.rules_of_adapter(network, adapter, weights.ADAPTER_PREFIX)
        factors = published_items(adapter, table, dtype, sharding.first_process_value)
    if jax.process_index():
        for item in [*items, *factors]:
            item.read()
        return
    fresh = begin(folder)
    write_items(fresh, items, finite=False)
    for file in small_files(system.folder):
        if file.name != "config.json":
            copy_file(file, fresh)
    write_json(fresh / "config.json", with_dtype(configs.to_json(network), dtype.name), indent=1)
    if adapter:
        write_items(fresh / LORA, factors, stem="adapter_model", finite=False)
        write_json(fresh / LORA / "adapter_config.json", weights.adapter_config(network, adapter), indent=1)
    for name in ENCODERS:
        if (system.folder / name).is_dir():
            copy_folder_again(system.folder / name, fresh / name, folder / name, skip="transformer")
    take_place(fresh, folder)


def written_parts(parts: Mapping) -> list[str]:
    """Names of the parts that an export writes; the encoders are copied as files."""
    language = "language_policy" if "language_policy" in parts else "language"
    return [
        "vision",
        "aligner",
        "generation",
        "vq",
        language,
        *(("language_lora",) if "language_lora" in parts else ()),
    ]
