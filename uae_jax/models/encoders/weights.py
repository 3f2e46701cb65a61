"""Folders of the encoders: which one a folder holds, its tensors in the layouts in use, and CLIP's written back."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from safetensors.numpy import save_file

from uae_jax import trees
from uae_jax.files.json_files import read_json, write_json
from uae_jax.files.paths import to_path
from uae_jax.hf.rules import Placement, Rule, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.hf.split_tensors import SplitTensors
from uae_jax.hf.torch_file import TorchFile, open_tensors
from uae_jax.models.encoders import clip, dino, openai
from uae_jax.models.encoders.config import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov3Config,
    LongCLIPTextConfig,
)
from uae_jax.models.encoders.preprocess import Preprocess, clip_preprocessor
from uae_jax.models.encoders.tables import (
    DINOV2_ALIASES,
    DINOV3_ALIASES,
    POSITION_BUFFERS,
    clip_rules,
    dinov2_rules,
    dinov3_rules,
)
from uae_jax.models.precision import numpy_dtype

CONFIGS = {
    "clip": CLIPConfig,
    "clip_vision_model": CLIPVisionConfig,
    "clip_text_model": CLIPTextConfig,
    "dinov2": Dinov2Config,
    "dinov3_vit": Dinov3Config,
}
KINDS = {"dinov2": "dinov2", "dinov3_vit": "dinov3"}  # all others are clip


@dataclasses.dataclass(frozen=True)
class EncoderFolder:
    """An encoder that was recognised but not yet read.

    Attributes:
      path: the folder, or a file of its own.
      kind: `clip`, `longclip`, `dinov2` or `dinov3`.
      config: of the class that the folder holds.
      tensors: under the names that they are stored with.
      rules, aliases, ignore: see `load_params`.
    """

    path: pathlib.Path
    kind: str
    config: clip.AnyCLIPConfig | dino.AnyDinoConfig
    tensors: TensorFolder | TorchFile | SplitTensors
    rules: Sequence[Rule]
    aliases: Sequence[tuple[str, str]] = ()
    ignore: str = ""

    def abstract(self) -> dict[str, Any]:
        """The shapes of the parameters."""
        if isinstance(self.config, Dinov2Config | Dinov3Config):
            return dino.abstract_params(self.config)
        return clip.abstract_params(self.config)

    def load(self, dtype: DTypeLike | None = np.float32, placement: Placement | None = None) -> dict[str, Any]:
        """The parameters, as of `init_params` of `clip` or `dino`.

        Args:
          dtype, placement: see `load_params`.

        Raises:
          ValueError: the tensors do not fit the config, or hold non-finite numbers.
        """
        return load_params(
            cast(TensorFolder, self.tensors),  # all have the same methods
            self.rules,
            self.abstract(),
            aliases=self.aliases,
            ignore=self.ignore,
            dtype=numpy_dtype(dtype),
            placement=placement,
        )

    def image_tower(self) -> "EncoderFolder":
        """The image tower of CLIP with both towers, so that the text tower is not read; other encoders as they are.

        Raises:
          ValueError: it is the text tower of CLIP alone.
        """
        if isinstance(self.config, CLIPTextConfig):
            raise ValueError(
                f"{self.path} holds the text tower of CLIP alone, not an image encoder; give the folder of both towers"
            )
        if not isinstance(self.config, CLIPConfig):
            return self
        rules = [rule for rule in self.rules if rule.ours.startswith("vision/")]
        others = [re.escape(source) for rule in self.rules if rule not in rules for source in rule.sources()]
        return dataclasses.replace(
            self, config=self.config.vision, rules=rules, ignore="|".join((self.ignore, *others))
        )

    def preprocess(self, variant: str = "published") -> Preprocess:
        """The image processing of `preprocessor_config.json`; Long-CLIP's own for states with OpenAI's names.

        Args:
          variant: see `Preprocess.from_folder`.

        Raises:
          FileNotFoundError: a folder saved by transformers has no `preprocessor_config.json`.
          ValueError: a setting or the variant is not supported.
        """
        if isinstance(self.tensors, SplitTensors):
            # OpenAI's names are those of both towers or, after `image_tower`, of the image tower alone
            vision = self.config.vision if isinstance(self.config, CLIPConfig) else cast(CLIPVisionConfig, self.config)
            return Preprocess.longclip(vision.image_size).as_variant(variant)
        return Preprocess.from_folder(self.path, variant)


def open_encoder(path: str | pathlib.Path) -> EncoderFolder:
    """Recognises the encoder that a folder holds.

    Args:
      path: a folder of CLIP, DINOv2 or DINOv3 as transformers saves it, in the names of its files or of its memory; or
        a folder with a Long-CLIP (or CLIP) state in OpenAI's names, safetensors or `.pt`, or the path of that file.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it is another model, which is named, or a file cannot be read.
    """
    path = to_path(path)
    if not (path / "config.json").is_file():
        return _open_openai(path)
    kind = read_json(path).get("model_type")
    if kind not in CONFIGS:
        raise _another_model(path)
    config = CONFIGS[kind].from_folder(path)
    tables = {"dinov2": (dinov2_rules, DINOV2_ALIASES, ""), "dinov3_vit": (dinov3_rules, DINOV3_ALIASES, "")}
    table, aliases, ignore = tables.get(kind, (clip_rules, (), POSITION_BUFFERS))
    return EncoderFolder(path, KINDS.get(kind, "clip"), config, open_tensors(path), table(config), aliases, ignore)


def _open_openai(path: pathlib.Path) -> EncoderFolder:
    if not path.exists():
        raise FileNotFoundError(f"image encoder not found: {path} does not exist")
    if any((path / name).is_file() for name in ("model_index.json", "adapter_config.json")):
        raise _another_model(path)
    remedy = "give the folder of a CLIP, DINOv2 or DINOv3 model with its config.json, or a Long-CLIP file"
    try:
        tensors = SplitTensors(open_tensors(path), openai.FUSED)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds neither config.json nor weights; {remedy}") from None
    if not any(mark in tensors.names() for mark in openai.MARKS):
        found = ", ".join(sorted(tensors.names())[:3])
        if path.is_file():
            raise ValueError(f"{path} holds tensors such as {found}, not a CLIP state in OpenAI's names; {remedy}")
        raise FileNotFoundError(
            f"{path / 'config.json'} not found, and tensors such as {found} are not Long-CLIP's; {remedy}"
        )
    config = openai.config_of(tensors)
    kind = "longclip" if isinstance(config.text, LongCLIPTextConfig) else "clip"
    return EncoderFolder(path, kind, config, tensors, openai.rules(config), ignore=openai.IGNORED)


def _another_model(path: pathlib.Path) -> ValueError:
    """The error that says what a folder holds instead of an encoder."""
    what = "a peft adapter"
    for file in ("config.json", "model_index.json"):
        if (path / file).is_file():
            raw = read_json(path, file)
            name = (raw.get("architectures") or [raw.get("_class_name") or "a model"])[0]
            what = f"{name} (model_type {raw['model_type']!r})" if "model_type" in raw else name
    return ValueError(f"{path} holds {what}, not an image encoder; give a CLIP, Long-CLIP, DINOv2 or DINOv3 folder")


def _another_kind(source: EncoderFolder, needed: str) -> ValueError:
    return ValueError(f"{source.path} holds a {source.kind} model; needed: {needed}")


def load_dino(
    folder: str | pathlib.Path, *, dtype: DTypeLike = np.float32, placement: Placement | None = None
) -> tuple[dino.AnyDinoConfig, dict[str, Any]]:
    """Config and parameters of a Dinov2Model or DINOv3ViTModel folder, in the file or the in-memory names.

    Args:
      folder: with `config.json` and weights.
      dtype: precision of the parameters.
      placement: where they go, see `hf.rules.load_params`.

    Returns:
      The config, and parameters as of `dino.init_params`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its tensors do not fit.
    """
    source = open_encoder(folder)
    if not isinstance(source.config, Dinov2Config | Dinov3Config):
        raise _another_kind(source, "dinov2 or dinov3")
    return source.config, source.load(dtype, placement)


def load_clip(
    folder: str | pathlib.Path, *, dtype: DTypeLike = np.float32, placement: Placement | None = None
) -> tuple[clip.AnyCLIPConfig, dict[str, Any]]:
    """Config and parameters of a CLIPModel, CLIPVisionModelWithProjection, CLIPTextModelWithProjection or Long-CLIP
    folder.

    Args:
      folder: with `config.json` and weights, or what `open_encoder` takes for Long-CLIP.
      dtype: precision of the parameters.
      placement: where they go, see `hf.rules.load_params`.

    Returns:
      The config of the class that the folder holds, and parameters as of `clip.init_params`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its tensors do not fit.
    """
    source = open_encoder(folder)
    if isinstance(source.config, Dinov2Config | Dinov3Config):
        raise _another_kind(source, "clip or longclip")
    return source.config, source.load(dtype, placement)


def save_clip(folder: str | pathlib.Path, config: clip.AnyCLIPConfig, params: trees.Tree) -> None:
    """Writes a folder that `load_clip` and transformers read, with CLIP's image processing where there is an image
    tower.

    Long-CLIP becomes a CLIPModel of 248 positions (`clip.as_plain`).

    Args:
      folder: made if absent.
      config: of both towers or of one.
      params: as of `clip.init_params`.
    """
    config, params = clip.as_plain(config, params)
    names = {
        CLIPConfig: "CLIPModel",
        CLIPVisionConfig: "CLIPVisionModelWithProjection",
        CLIPTextConfig: "CLIPTextModelWithProjection",
    }
    folder = to_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # order="C" keeps the scalar logit scale a scalar, which np.ascontiguousarray does not
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in published_tensors(params, clip_rules(config))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = {"architectures": [names[type(config)]], "dtype": "float32", **config.to_dict()}
    write_json(folder / "config.json", raw)
    if not isinstance(config, CLIPTextConfig):
        size = (config.vision if isinstance(config, CLIPConfig) else config).image_size
        write_json(folder / "preprocessor_config.json", clip_preprocessor(size))


CLIP_START, CLIP_END = 49406, 49407  # of CLIP's tokenizer; the ids in the published text configs are wrong


def empty_prompt_ids(config: CLIPTextConfig) -> Int[np.ndarray, "1 2"]:
    """The empty prompt: start and end token.

    Published pipelines pad it (end token or 0). Padding cannot change the pooled feature: attention is causal, and
    pooling is at the first end token. Vocabularies smaller than CLIP's have the ids of their config.
    """
    is_clip = config.vocab_size > CLIP_END
    start, end = (CLIP_START, CLIP_END) if is_clip else (config.bos_token_id, config.eos_token_id)
    return np.array([[start, end]], np.int32)


_text_features = jax.jit(clip.text_features, static_argnums=0)


def pooled_empty_prompt(folders: Sequence[str | pathlib.Path]) -> Float[np.ndarray, " d_pooled"]:
    """The transformer's pooled condition: features of the empty prompt, concatenated (arXiv 2403.03206, section 4).

    The towers are on this process's first device, one after the other.

    Args:
      folders: `text_encoder` and `text_encoder_2` of a diffusers folder, in this order.

    Returns:
      float32, the features of both encoders side by side.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a folder does not hold a CLIP text tower, or its tensors do not fit.
    """
    parts = []
    device = SingleDeviceSharding(jax.local_devices()[0])  # one parameter at a time, so that no host holds a tower
    for folder in folders:
        config, params = load_clip(folder, placement=lambda tree: jax.tree.map(lambda leaf: device, tree))
        if isinstance(config, CLIPVisionConfig):
            raise ValueError(f"{folder} holds an image tower; the pooled condition needs CLIP text towers")
        text = config.text if isinstance(config, CLIPConfig) else config
        with jax.default_matmul_precision("highest"):
            parts.append(_text_features(config, params, empty_prompt_ids(text))[0])
        del params  # before the next tower is read
    return np.concatenate([np.asarray(part, np.float32) for part in parts])
