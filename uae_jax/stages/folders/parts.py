"""The parts of a model folder, found by name in the official layout and else by content, and the table of each part."""

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Collection
from typing import Any

import jax

from uae_jax.files.json_files import json_digest, read_json
from uae_jax.files.paths import read_range
from uae_jax.hf.adapters import FACTOR, LEAVES
from uae_jax.hf.formats import other_format
from uae_jax.hf.hub import local_folder
from uae_jax.hf.inventory import Table
from uae_jax.hf.rules import canonical
from uae_jax.hf.safetensors import TensorFolder, Tensors
from uae_jax.hf.torch_file import open_tensors
from uae_jax.models.decoder import Component
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPTextConfig
from uae_jax.models.encoders.openai import MARKS
from uae_jax.models.encoders.tables import POSITION_BUFFERS, clip_rules
from uae_jax.models.encoders.weights import EncoderFolder, open_encoder
from uae_jax.models.janus import config as janus_config
from uae_jax.models.janus import model as janus
from uae_jax.models.janus import weights as janus_weights
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import transformer, vae
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.stages import decoders

# part -> its kind, in the order of tables and files
KINDS = {
    "llm": "captioner",
    "projector": "projector",
    "llm_lora": "language adapter",
    "llm_processor": "processor",
    "llm_reference": "captioner",
    "SD3/transformer": "transformer",
    "SD3/vae": "vae",
    "SD3/text_encoder": "text encoder",
    "SD3/text_encoder_2": "text encoder",
    "SD3/scheduler": "scheduler",
    "decoder/transformer": "decoder part",
    "decoder/vae": "decoder part",
    "decoder/text_encoder": "decoder part",
    "decoder/tokenizer": "decoder tokenizer",
    "decoder/scheduler": "decoder scheduler",
    "dit": "transformer",
    "dit_lora": "transformer adapter",
    "clip": "image encoder",
    "longclip": "image encoder",
    "dinov2": "image encoder",
    "dinov3": "image encoder",
    "janus": "unified model",
}
ADAPTERS = ("llm_lora", "dit_lora")
ENCODERS = ("clip", "longclip", "dinov2", "dinov3")
# a file in `llm`, beside a projector that nothing has trained
NEW_PROJECTOR = "new_projector.json"
_MODEL_TYPES = {
    "qwen2_5_vl": "llm",
    "clip": "clip",
    "clip_vision_model": "clip",
    "clip_text_model": "SD3/text_encoder",
    "dinov2": "dinov2",
    "dinov3_vit": "dinov3",
    janus_config.HF: "janus",
    janus_config.OFFICIAL: "janus",
}
_CLASSES = {
    "SD3Transformer2DModel": "dit",
    "AutoencoderKL": "SD3/vae",
    "FlowMatchEulerDiscreteScheduler": "SD3/scheduler",
}
_SAMPLE = 1 << 16  # bytes of each end of a weight file in a digest
PROJECTOR = "uae_projector"  # model_type of the projector's folder, unknown to transformers


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
      name: in the official layout, a key of `KINDS`.
      folder: the folder with the weights, or a file of weights.
      settings: the folder of config.json, if that is another folder.
    """

    name: str
    folder: pathlib.Path
    settings: pathlib.Path | None = None

    @property
    def kind(self) -> str:
        """The kind of model, a value of `KINDS`."""
        return KINDS[self.name]

    @property
    def config_folder(self) -> pathlib.Path:
        """The folder of config.json."""
        return self.settings or self.folder


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder and its parts.

    Attributes:
      path: the folder of the parts (`export/` of a training workdir).
      layout: `official`; `pipeline`, a diffusers SD3 folder; `unified`, Janus with what lies beside it; `part`, one
        part alone.
      parts: the existing parts, in the order of `KINDS`.
    """

    path: pathlib.Path
    layout: str
    parts: tuple[Part, ...]

    def part(self, name: str) -> Part | None:
        """A part by name, or None."""
        return next((part for part in self.parts if part.name == name), None)

    def existing(self, name: str) -> Part:
        """A part by name.

        Raises:
          KeyError: the folder has no such part.
        """
        return {part.name: part for part in self.parts}[name]

    @property
    def transformer(self) -> Part | None:
        """The transformer that the model uses: `dit`, else the pipeline's."""
        return self.part("dit") or self.part("SD3/transformer") or self.part("decoder/transformer")

    @property
    def own_decoder(self) -> pathlib.Path | None:
        """The pipeline of a decoder with a text encoder of its own, or None."""
        return next((part.folder.parent for part in self.parts if part.name.startswith("decoder/")), None)

    @property
    def captioner(self) -> Part | None:
        """The captioner that the model uses: the captioner in `llm_lora` as in the release, else `llm`."""
        return _wrapped_captioner(self.part("llm_lora"), self.part("llm")) or self.part("llm")


def find_parts(path: str | pathlib.Path) -> Folder:
    """The parts of an official folder, a training workdir, a diffusers pipeline, or a folder of one part alone.

    A cache folder of the Hub is read by its snapshot, and a Hub id is downloaded (`hf.hub.local_folder`).

    Raises:
      FileNotFoundError: no such folder.
      ValueError: the folder holds no known part; the message has what was looked for.
    """
    root = local_folder(path)
    if root.is_file():
        name = identify(root)
        if name is None:
            raise ValueError(
                f"{root} is no adapter and no CLIP state; of other models give the folder with config.json and weights"
            )
        return Folder(root.parent, "part", (Part(name, root),))
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} does not exist; give an official UAE folder, a training workdir, or the folder of one model"
        )
    for candidate in (root, root / "export", root / "model"):
        names = [name for name in KINDS if (candidate / name).is_dir()]
        if "llm" not in names and janus_config.holds(candidate):
            beside = tuple(Part(name, candidate / name) for name in ("llm_lora", *ENCODERS) if name in names)
            return Folder(candidate, "unified" if beside else "part", (Part("janus", candidate), *beside))
        if any(name in names for name in ("llm", "dit", *ADAPTERS)):
            parts = [Part(name, candidate / name) for name in names]
            if not any((candidate / "llm").glob("*.safetensors")):  # llm_lora may be the complete captioner
                lora, plain = (
                    next((part for part in parts if part.name == name), None) for name in ("llm_lora", "llm")
                )
                wrapped = _wrapped_captioner(lora, plain)
                parts = [part for part in parts if part is not plain] + [wrapped] if wrapped else parts
            if "llm" in names and "llm_processor" not in names and has_tokenizer(candidate / "llm"):
                parts.append(Part("llm_processor", candidate / "llm"))
            return Folder(candidate, "official", tuple(sorted(parts, key=lambda part: list(KINDS).index(part.name))))
    prefix = "decoder/" if decoders.is_own(root) else "SD3/"
    inner = [name for name in KINDS if name.startswith(prefix) and (root / name.removeprefix(prefix)).is_dir()]
    if (root / "model_index.json").is_file() or len(inner) > 1:
        return Folder(root, "pipeline", tuple(Part(name, root / name.removeprefix(prefix)) for name in inner))
    name = identify(root)
    if name is None:
        if remedy := other_format(root):
            raise ValueError(remedy)
        raise ValueError(
            f"{root} holds no part of a model; looked for folders named {', '.join(list(KINDS)[:4])}, ..., for "
            "model_index.json, and for config.json, adapter_config.json or scheduler_config.json with weights"
        )
    beside = (Part("llm_processor", root),) if name == "llm" and has_tokenizer(root) else ()
    return Folder(root, "part", (Part(name, root), *beside))


def _wrapped_captioner(lora: Part | None, plain: Part | None) -> Part | None:
    """The captioner beside the adapter in `llm_lora`, with the folder of its config.json."""
    try:
        if lora is None or not qwen_weights.holds_base(lora.folder):
            return None
    except (ValueError, FileNotFoundError):
        return None  # the row of llm_lora has the error
    if plain is None or (lora.folder / "config.json").exists():
        return Part("llm", lora.folder)
    return Part("llm", lora.folder, plain.config_folder)


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a captioner's folder holds its tokenizer, as on the hub."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def identify(folder: pathlib.Path) -> str | None:
    """The part in a folder, or in a file of weights, by its configuration or else by its tensor names; None if unknown.

    Raises:
      ValueError: config.json is not JSON, or is of a model that is no part.
    """
    for file in ("config.json", "scheduler_config.json"):
        if (folder / file).is_file():
            stored = read_json(folder, file)
            kind, class_ = stored.get("model_type"), stored.get("_class_name")
            name = _MODEL_TYPES.get(str(kind)) or _CLASSES.get(str(class_))
            if name is None and kind != PROJECTOR:
                known = ", ".join((*_MODEL_TYPES, *_CLASSES))
                raise ValueError(
                    f"{folder / file} is of {kind or class_!r}, which is no part of UAE; the parts are {known}"
                )
            return name or "projector"
    try:
        names = open_tensors(folder).names()
    except FileNotFoundError:
        return None
    adapted = {match[1] for match in (re.fullmatch(FACTOR, canonical(name, LEAVES)) for name in names) if match}
    if adapted:
        of_captioner = any(re.search(r"(^|\.)(layers|visual|lm_head)\.", f"{name}.") for name in adapted)
        return "llm_lora" if of_captioner else "dit_lora"
    return open_encoder(folder).kind if set(MARKS) & names else None


def part_config(part: Part) -> Any:
    """The configuration of a part; None for adapters and the projector.

    Raises:
      FileNotFoundError, ValueError: config.json is absent, of another model, or not supported.
    """
    if part.kind == "captioner":
        return qwen_config.from_folder(part.config_folder)
    if part.kind == "transformer":
        return TransformerConfig.from_folder(part.folder)
    if part.kind == "vae":
        return VAEConfig.from_folder(part.folder)
    if part.kind == "decoder part":
        return component_of(part).config(part.folder)
    if part.kind == "text encoder":
        return CLIPTextConfig.from_folder(part.folder)
    if part.kind == "image encoder":
        return part_encoder(part).config
    if part.kind == "unified model":
        return janus_config.from_folder(part.folder)
    return None


def component_of(part: Part) -> Component:
    """What a folder of a decoder's pipeline is.

    Raises:
      FileNotFoundError, ValueError: no pipeline, or another one.
    """
    return decoders.family_of(part.folder.parent).components[part.folder.name]


def published_settings(part: Part) -> dict[str, Any]:
    """The config.json that belongs to a part's published names: the stored one, or that of transformers for Janus's
    official folder.

    Raises:
      FileNotFoundError, ValueError: see `part_config`.
    """
    stored = read_json(part.config_folder)
    return janus_config.to_json(part_config(part)) if stored.get("model_type") == janus_config.OFFICIAL else stored


def part_encoder(part: Part) -> EncoderFolder:
    """The image encoder of a part.

    Raises:
      FileNotFoundError, ValueError: absent files, or another model than the part's name.
    """
    encoder = open_encoder(part.folder)
    if encoder.kind not in (part.name, {"longclip": "clip"}.get(part.name)):
        raise ValueError(
            f"{part.folder} holds a model of the type {encoder.kind}, not {part.name}; copy the right model there"
        )
    return encoder


def has_openai_names(part: Part) -> bool:
    """Whether an image encoder is a state with OpenAI's names and without config.json, like the published Long-CLIP."""
    return part.kind == "image encoder" and not (part.folder / "config.json").is_file()


def part_tensors(part: Part) -> Tensors:
    """The tensors of a part with weights."""
    if part.kind == "unified model":
        return janus_weights.open_weights(part.folder)
    return part_encoder(part).tensors if part.kind == "image encoder" else TensorFolder(part.folder)


def check_head(part: Part, folder: Tensors, config: Any) -> None:
    """Refuses a text head that the settings of a captioner would leave unread (`language.weights.check_head`).

    Raises:
      ValueError: such a head.
    """
    if part.kind == "captioner":
        qwen_weights.check_head(folder, config)
    if part.kind == "unified model":
        janus_weights.check_head(folder, config)


def part_table(part: Part, config: Any, folder: Tensors) -> Table:
    """The table of a part's tensors.

    Args:
      part: any part except an adapter, a processor or a scheduler.
      config: of `part_config`.
      folder: the part's tensors, which determine the projector and its sizes.

    Raises:
      ValueError: a projector without its tensors.
    """
    if part.kind == "projector":
        sizes = projector_sizes(folder)
        if sizes is None:
            raise ValueError(f"{folder.path} has no projector.0 and projector.2 tensors; copy the folder again")
        abstract = jax.eval_shape(lambda: qwen.init_projector(jax.random.key(0), *sizes))
        return Table(qwen_weights.projector_rules(), {"projector": abstract})
    if part.kind == "captioner":
        # `contents` takes any `Tensors`
        rules, abstract, ignore = qwen_weights.contents(folder, config)  # pyright: ignore[reportArgumentType]
        return Table(rules, abstract, qwen_weights.ALIASES, ignore)
    if part.kind == "transformer":
        return Table(sd3_weights.transformer_rules(config), transformer.abstract_params(config))
    if part.kind == "decoder part":
        return component_of(part).table(config)
    if part.kind == "vae":
        return Table(sd3_weights.vae_rules(config), vae.abstract_params(config), sd3_weights.VAE_ALIASES)
    if part.kind == "unified model":
        ignore = janus_weights.ignored(config)
        return Table(janus_weights.rules(config), janus.abstract_params(config), janus_weights.ALIASES, ignore)
    if part.kind == "image encoder":
        encoder = part_encoder(part)
        return Table(encoder.rules, encoder.abstract(), encoder.aliases, encoder.ignore)
    return Table(clip_rules(config), clip.abstract_params(config), (), POSITION_BUFFERS)


def projector_sizes(folder: Tensors) -> tuple[int, int, int] | None:
    """Width of the language model, inner width and features of UAE's projector; None without a projector."""
    if not {"projector.0.weight", "projector.2.weight"} <= folder.names():
        return None
    (hidden, width), (features, _) = (folder.shape(f"projector.{index}.weight") for index in (0, 2))
    return width, hidden, features


def with_dtype(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json of transformers with the precision of the weights, in which transformers loads them."""
    field = "torch_dtype" if "torch_dtype" in content else "dtype"
    changed = content | {field: dtype}
    for name, inner in changed.items():
        if isinstance(inner, dict):
            changed[name] = inner | {key: dtype for key in ("dtype", "torch_dtype") if key in inner}
    return changed


def _weights_of(place: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a part: safetensors, else pickles as in Janus's official folder."""
    if not place.is_dir():
        return [place]
    return sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))


def weights_digest(folder: pathlib.Path, names: Collection[str] = ()) -> str:
    """A digest of a model folder's contents, the same wherever the folder lies; 16 hexadecimal digits.

    Weight files count by name, size, and their first and last bytes, so that no folder is read as a whole.

    Args:
      folder: of the model.
      names: folders in it that count, such as `SD3/vae`; none for all parts.
    """
    found = {}
    parts = [Part(name, folder / name) for name in names] or find_parts(folder).parts
    for part in parts:
        for path in _weights_of(part.folder):
            size = path.stat().st_size
            first, last = (read_range(path, start, _SAMPLE) for start in (0, max(size - _SAMPLE, 0)))
            found[f"{part.name}/{path.name}"] = [size, zlib.crc32(first), zlib.crc32(last)]
    return json_digest(found)
