"""A model folder in the official layout: read into one description and one dictionary, and written back.

    llm/ llm_processor/ [llm_lora/]            captioner with projector; tokenizer, template, image processor; adapter
    SD3/{vae, scheduler, text_encoder, text_encoder_2[, transformer]}
    dit/ [dit_lora/]                           transformer (or SD3/transformer); adapter
    clip/ [dinov2/ dinov3/]                    image encoders for the reward and for the scores
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from uae_jax.data import tokenizer as tokens
from uae_jax.data.qwen_inputs import ImageProcessor, load_image_processor
from uae_jax.diffusion.schedule import ScheduleConfig
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import write_tensors
from uae_jax.models import uae
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.encoders.weights import pooled_empty_prompt
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.rl.rewards import Encoder, load_encoder

BUILTIN = pathlib.Path(__file__).parents[1] / "assets" / "tiny"
# the joint attention's projections, as flow_grpo adapts them (scripts/train_sd3.py)
DIT_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
               "attn.to_add_out")
ENCODERS = ("clip", "longclip", "dinov2", "dinov3")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which weights, and how they compute.

    Attributes:
      folder: official folder, training workdir, or empty for the built-in model.
      lora_alpha: numerator of the scale of new adapters; adapters that are read keep theirs, or twice their rank (the
        release's 64 over 32) where no adapter_config.json says it.
      dtype: precision of activations, `float32` or `bfloat16`.
      remat: what the backward pass recomputes: `none`, `full`, `dots`.
      frozen_dtype: precision in which captioner, projector and transformer are held from the first stage on that no longer
        trains them (nor does a later one); auto-encoder, image encoders, adapters and all that is trained stay float32.
    """

    folder: str = ""
    lora_alpha: float = 64.0
    frozen_dtype: str = "float32"
    dtype: str = "float32"
    remat: str = "none"


@dataclasses.dataclass(frozen=True)
class System:
    """A model that was read from a folder, with what its inputs need.

    Attributes:
      folder: where it came from.
      model: the description.
      parts: the dictionary of parameters (`models.uae`), numpy or jax arrays.
      tokenizer, processor: of the captioner.
      stops: ids that end a caption.
      schedule: of the folder's scheduler.
      encoders: the image encoders that the folder holds, by name; parameters are in `parts["encoders"]`.
    """

    folder: pathlib.Path
    model: uae.UAE
    parts: dict
    tokenizer: Any
    processor: ImageProcessor
    stops: tuple[int, ...]
    schedule: ScheduleConfig
    encoders: dict[str, Encoder]


def model_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The official folder behind a path: the built-in one for an empty path, `export/` of a training workdir.

    Raises:
      FileNotFoundError: it is neither.
    """
    folder = pathlib.Path(path) if str(path) else BUILTIN
    for candidate in (folder, folder / "export", folder / "model"):
        if (candidate / "llm").is_dir():
            return candidate
    if not folder.exists():
        raise FileNotFoundError(f"model folder {folder} does not exist; give an official UAE folder or a training workdir")
    raise FileNotFoundError(f"{folder} holds no `llm` folder; give an official UAE folder, or a workdir whose run has finished a stage")


def load_system(config: ModelConfig, *, image_size: int, negative_prompt: str = "", attend_padding: bool = False) -> System:
    """Reads every part of a folder, with both-way checks of names and shapes; parameters stay on the host, in float32.

    Args:
      config: which folder.
      image_size: side of the pictures.
      negative_prompt: text for guidance.
      attend_padding: see `ConditionTemplate`.

    Raises:
      FileNotFoundError, ValueError: a part is absent or does not fit; the message names file, tensor and remedy.
    """
    folder = model_folder(config.folder)
    processor_folder = folder / "llm_processor" if (folder / "llm_processor").is_dir() else folder / "llm"
    tokenizer = tokens.load_tokenizer(processor_folder)
    overrides = dict(dtype=config.dtype, remat=config.remat, lora_alpha=config.lora_alpha)
    captioner = qwen_config.from_folder(folder / "llm", **overrides)
    _, parts = qwen_weights.load(folder / "llm", captioner, np.float32)
    transformer_folder = folder / "dit" if (folder / "dit").is_dir() else folder / "SD3" / "transformer"
    transformer, parts["transformer"] = sd3_weights.load_transformer(transformer_folder, params_dtype=np.float32, **overrides)
    vae, parts["vae"] = sd3_weights.load_vae(folder / "SD3" / "vae")
    parts["pooled"] = pooled_empty_prompt([folder / "SD3" / name for name in ("text_encoder", "text_encoder_2")])
    if "projector" not in parts:
        raise ValueError(f"{folder / 'llm'} has no projector.0 and projector.2 tensors; UAE's own llm folder has them")
    if (folder / "llm_lora").is_dir():
        captioner, parts["language_lora"] = _load_language_adapter(folder / "llm_lora", captioner)
    if (folder / "dit_lora").is_dir():
        transformer, parts["transformer_lora"] = sd3_weights.load_adapter(folder / "dit_lora", transformer)
    prefix, suffix = tokens.condition_template(tokenizer)
    negative = tokens.encode_caption(tokenizer, negative_prompt)[:-1]
    template = ConditionTemplate(tuple(prefix), tuple(suffix), tuple(negative), captioner.pad_token_id, attend_padding)
    encoders = {}
    parts["encoders"] = {}
    for name in ENCODERS:
        if (folder / name).is_dir():
            encoders[name], parts["encoders"][name] = _load_encoder(folder / name, name)
    return System(
        folder, uae.UAE(captioner, transformer, vae, template, image_size), parts, tokenizer,
        load_image_processor(processor_folder, captioner.vision.window_size), tokens.stop_ids(tokenizer),
        ScheduleConfig.from_folder(folder / "SD3"), encoders)


def _load_encoder(folder: pathlib.Path, name: str) -> tuple[Encoder, dict]:
    """The encoder of a folder, of the kind that the folder's name says."""
    encoder, params = load_encoder(folder)
    if encoder.kind != {"longclip": "clip"}.get(name, name):
        raise ValueError(f"{folder} holds a {encoder.kind} model, not the {name} that its name promises; copy the right model there")
    return encoder, params


def _load_language_adapter(folder: pathlib.Path, captioner: qwen_config.Qwen2_5VLConfig) -> tuple[qwen_config.Qwen2_5VLConfig, dict]:
    """The adapter, and the configuration with its alpha."""
    file = folder / "adapter_config.json"
    if file.exists():
        captioner = captioner.using(lora_alpha=json.loads(file.read_text())["lora_alpha"])
    adapter = qwen_weights.load_adapter(folder, captioner, np.float32)
    if not file.exists():
        rank = adapter["layers"]["attention"]["query"]["a"].shape[-1]
        captioner = captioner.using(lora_alpha=2.0 * rank)
    return captioner, adapter


def export_system(system: System, parts: Mapping, folder: pathlib.Path, dtype: np.dtype = np.float32) -> None:
    """Writes a model in the official layout; parts that do not train are copied from where the system was read.

    Args:
      system: the description, and the folder of the unchanged parts.
      parts: parameters to write.
      folder: replaced as a whole, only once everything is written.
      dtype: stored precision of the trained parts.
    """
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    captioner, parts = system.model.captioner, jax.device_get(dict(parts))
    language = parts.get("language_policy", parts["language"])
    whole = {"vision": parts["vision"], "language": language, "projector": parts["projector"]}
    write_tensors(fresh / "llm", qwen_weights.tensors(captioner, whole, dtype))
    for name in ("config.json", "generation_config.json"):
        if (system.folder / "llm" / name).exists():
            shutil.copy2(system.folder / "llm" / name, fresh / "llm" / name)
    if "language_lora" in parts:
        write_tensors(fresh / "llm_lora", qwen_weights.adapter_tensors(captioner, parts["language_lora"], dtype=dtype), stem="adapter_model")
        _write_json(fresh / "llm_lora" / "adapter_config.json", qwen_weights.adapter_config(captioner, parts["language_lora"]))
    _export_transformer(system, parts, fresh, dtype)
    for name in ("llm_processor", "SD3", *ENCODERS):
        if (system.folder / name).is_dir():
            skip = shutil.ignore_patterns("transformer")
            shutil.copytree(system.folder / name, fresh / name, ignore=skip)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _export_transformer(system: System, parts: Mapping, folder: pathlib.Path, dtype: np.dtype) -> None:
    config, stem = system.model.transformer, "diffusion_pytorch_model"
    weights = parts.get("transformer_policy", parts["transformer"])
    write_tensors(folder / "dit", published_tensors(weights, sd3_weights.transformer_rules(config), dtype), stem=stem)
    _write_json(folder / "dit" / "config.json", config.published())
    if "transformer_lora" in parts:
        adapter = parts["transformer_lora"]
        write_tensors(folder / "dit_lora", published_tensors(adapter, sd3_weights.adapter_rules(config), dtype), stem="adapter_model")
        rank = int(adapter["last_block"]["attention"]["query"]["a"].shape[-1])
        _write_json(folder / "dit_lora" / "adapter_config.json", {
            "peft_type": "LORA", "r": rank, "lora_alpha": config.lora_alpha, "target_modules": list(DIT_TARGETS),
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "task_type": None,
            "base_model_name_or_path": None})


def _write_json(path: pathlib.Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
