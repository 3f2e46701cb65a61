"""A model folder in the official layout: read into one description and one dictionary (`stages.export` writes it back).

llm/ llm_processor/ [llm_lora/]     captioner with projector; tokenizer, template, image processor; adapter
[llm_reference/]                    the captioner before full fine-tuning, which is the decoder's text encoder
SD3/                                vae, scheduler, text_encoder, text_encoder_2[, transformer]
dit/ [dit_lora/]                    transformer (or SD3/transformer); adapter
decoder/                            instead of SD3 and dit: a pipeline with its own text encoder (`stages.decoders`)
clip/ [dinov2/ dinov3/]             image encoders for the reward and for the scores
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16 by name)
import numpy as np
from jax.sharding import Mesh

from uae_jax import sharding
from uae_jax.data import tokenizer as tokens
from uae_jax.data.qwen_inputs import ImageProcessor, load_image_processor
from uae_jax.diffusion.schedule import ScheduleConfig
from uae_jax.files.paths import problem, to_path
from uae_jax.hf.formats import other_format
from uae_jax.hf.hub import local_folder
from uae_jax.hf.rules import Placement
from uae_jax.methods.trained import store
from uae_jax.models import uae
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoders import PUBLISHED
from uae_jax.models.encoders.weights import pooled_empty_prompt
from uae_jax.models.janus import config as janus_config
from uae_jax.models.latents import check_fit
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.decoder import SD3Decoder
from uae_jax.nn.lora import merge_adapter
from uae_jax.rewards.caption_similarity import PART as SCORER
from uae_jax.rewards.caption_similarity import CaptionScorer, load_caption_scorer
from uae_jax.rewards.similarity import Encoder, load_encoder
from uae_jax.settings import Settings, setting
from uae_jax.stages import decoders

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
BUILTIN = ASSETS / "tiny"
# The built-in models by name, where no such path exists: where training starts, and what all four stages make of it;
# and one network that captions and draws, where unified_ar starts.
NAMED = {"start": BUILTIN, "trained": ASSETS / "trained", "unified": ASSETS / "unified"}
DEFAULT = "trained"  # of everything that does not train
ENCODERS = ("clip", "longclip", "dinov2", "dinov3")
REFERENCE = "llm_reference"
INSIDE = ("export", "model")  # where a workdir has its model: of a run, or of a bootstrap
DECODERS = ("sd3_5_medium", "sd3_5_large", *PUBLISHED)
SIZES = (
    "",
    *(f"{captioner}_{decoder}" for captioner in qwen_config.PUBLISHED for decoder in DECODERS),
    *janus_config.SIZES,
)
PRECISIONS = ("float32", "bfloat16")
CAPTIONER = ("vision", "language", "projector")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Which weights, and how they compute."""

    folder: str = setting("", "official folder or training workdir; empty for the built-in model", free=True)
    sizes: str = setting("", "published sizes of the folder, for plans without it; empty for any", choices=SIZES)
    lora_alpha: float = setting(
        64.0,
        "numerator of the scale of new adapters; adapters that are read keep theirs",
        above=0,
        source="released UAE",
    )
    frozen_dtype: str = setting(
        "float32", "precision of captioner, projector and transformer while nothing trains them", choices=PRECISIONS
    )
    dtype: str = setting("float32", "precision of activations", choices=PRECISIONS)
    remat: str = setting("none", "what the backward pass recomputes", choices=("none", "full", "dots"), free=True)
    merge_adapters: bool = setting(False, "add the adapters that are read to the weights, for new ones to start from")
    decoder_weights: str = setting(
        "model",
        "kernels of a decoder with a text encoder of its own, and of that: as frozen_dtype says, or rounded to 8 bits, "
        "half the bytes of bfloat16; the decoder is then never trained but for an adapter",
        choices=("model", "int8"),
    )
    adapters: bool = setting(True, "False leaves adapters and fully fine-tuned copies of the folder unread")
    caption_scorer: str = setting("", "folder or workdir of the caption scorer that a caption weight needs")

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and an adapter that would be added to integers."""
        yield from super().problems()
        if self.decoder_weights == "int8" and self.merge_adapters:
            yield "merge_adapters adds to weights that decoder_weights=int8 has rounded; leave one of them out"


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
      scorer: of captions, where the settings name one; parameters are among those of the encoders.
    """

    folder: pathlib.Path
    model: uae.UAE
    parts: dict
    tokenizer: Any
    processor: ImageProcessor
    stops: tuple[int, ...]
    schedule: ScheduleConfig
    encoders: dict[str, Encoder]
    scorer: CaptionScorer | None = None


def builtin_folder(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """The folder of a built-in model that is named, or of the start model for an empty path; None for other paths."""
    name = str(path)
    if not name:
        return BUILTIN
    return NAMED.get(name) if not to_path(name).exists() else None


def model_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The model folder behind a path: the start model for an empty path, `export/` of a training workdir.

    It is one in the official layout of UAE, or the folder of one unified model. Where there is no such path, the names
    of `NAMED` are built-in models.

    A cache folder of the Hub is read by its snapshot, and a Hub id of an official folder is downloaded.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: a Hub id or its cache folder that holds no official folder.
    """
    folder = builtin_folder(path)
    if folder is None:
        folder = local_folder(path, needs="llm")
    for candidate in (folder, *(folder / name for name in INSIDE)):
        if (candidate / "llm").is_dir() or (candidate / "llm_lora").is_dir() or janus_config.holds(candidate):
            return candidate
    if not folder.exists():
        raise FileNotFoundError(
            problem(folder)
            or f"model folder {folder} does not exist; give an official UAE folder or a training workdir"
        )
    if decoders.is_own(folder):
        raise FileNotFoundError(
            f"{folder} holds a decoder alone; put it beside a captioner: python -m uae_jax.convert import "
            f"--captioner=CAPTIONER --decoder={folder} OUT"
        )
    remedy = other_format(folder)
    if remedy:
        raise FileNotFoundError(remedy)
    raise FileNotFoundError(
        f"{folder} holds no `llm` folder; give an official UAE folder, or a workdir whose run has finished a stage"
    )


def processor_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder of tokenizer, chat template and image processor of a model folder."""
    own = folder / "llm_processor"
    return own if own.is_dir() else folder / "llm"


def load_system(
    config: ModelConfig,
    *,
    image_size: int,
    negative_prompt: str = "",
    mesh: Mesh | None = None,
    max_caption: int = 0,
    frozen: Collection[str] = (),
    control_tokens: bool = False,
) -> System:
    """Reads every part of a folder, in float32 unless it is frozen, with both-way checks of names and shapes.

    With a mesh each parameter goes from its file to its shards on the devices, one after the other: the host holds no
    more than one besides (`hf.rules.load_params`).

    Args:
      config: which folder.
      image_size: side of the pictures.
      negative_prompt: text for guidance.
      mesh: where the parameters lie, by the rules of `sharding`; None leaves them on the host as numpy arrays.
      max_caption: tokens that a caption scorer must be able to read.
      control_tokens: whether their names in texts are meant, see `tokenizer.load_tokenizer`.
      frozen: parts that are read into `frozen_dtype`, since nothing trains them; the others are float32.

    Raises:
      FileNotFoundError, ValueError: a part is absent or does not fit; the message names file, tensor and remedy.
    """
    folder = model_folder(config.folder)
    words = processor_folder(folder)
    tokenizer = tokens.load_tokenizer(words, control_tokens)
    if (folder / decoders.FOLDER).is_dir():
        model, parts = _load_with_decoder(folder, config, mesh, frozen, tokenizer, image_size, negative_prompt)
        schedule = ScheduleConfig()
    else:
        captioner, transformer, vae, parts = _load_models(folder, config, mesh, frozen)
        template = condition_template(tokenizer, negative_prompt, captioner.pad_token_id)
        model = uae.UAE(captioner, SD3Decoder(transformer, vae, template, captioner), image_size)
        schedule = ScheduleConfig.from_folder(folder / "SD3")
    encoders, parts["encoders"] = load_encoders(folder, mesh)
    scorer = None
    if config.caption_scorer:
        scorer, parts["encoders"][SCORER] = load_caption_scorer(
            model_folder(config.caption_scorer) / SCORER,
            len(tokenizer),
            max_caption,
            placement=placement(mesh, f"encoders/{SCORER}"),
        )
    return System(
        folder,
        model,
        parts,
        tokenizer,
        load_image_processor(words, model.captioner.vision.window_size),
        tokens.stop_ids(tokenizer),
        schedule,
        encoders,
        scorer,
    )


def condition_template(tokenizer: Any, negative_prompt: str, pad: int) -> ConditionTemplate:
    """Ids around a caption in UAE's own role, with the negative prompt."""
    prefix, suffix = tokens.condition_template(tokenizer)
    negative = tokens.encode_caption(tokenizer, negative_prompt)[:-1]
    return ConditionTemplate(tuple(prefix), tuple(suffix), tuple(negative), pad)


def _load_with_decoder(
    folder: pathlib.Path,
    config: ModelConfig,
    mesh: Mesh | None,
    frozen: Collection[str],
    tokenizer: Any,
    image_size: int,
    negative_prompt: str,
) -> tuple[uae.UAE, dict]:
    """Description and parameters of a captioner and a decoder with its own text encoder."""
    place = folder / decoders.FOLDER
    held, precision = _precisions(folder, config, frozen)
    overrides: dict[str, Any] = dict(dtype=config.dtype, remat=config.remat, lora_alpha=config.lora_alpha)
    decoder, banned = decoders.describe(place, tokenizer, negative_prompt, **overrides)
    captioner, parts = _load_captioner_with_reference(folder, config, mesh, frozen)
    parts |= decoders.load_parts(
        place, lambda part: placement(mesh, part), precision, in_eight_bits=config.decoder_weights == "int8"
    )
    if config.adapters and (folder / "dit_lora").is_dir():
        alpha, adapter = decoders.read_transformer_adapter(folder / "dit_lora", decoder)
        decoder = _add_adapter(decoder, parts, placed("transformer_lora", adapter, mesh), alpha, config.merge_adapters)
        store(parts, held, config.frozen_dtype)
    return uae.UAE(captioner, decoder, image_size, banned), parts


def _add_adapter(decoder: Any, parts: dict, adapter: Any, alpha: float, merge: bool) -> Any:
    """Puts an adapter beside the transformer's weights or into them; the description has the alpha of the former."""
    if merge:
        parts["transformer"] = merge_adapter(parts["transformer"], adapter, alpha)
        return decoder
    parts["transformer_lora"] = adapter
    return dataclasses.replace(decoder, transformer=dataclasses.replace(decoder.transformer, lora_alpha=alpha))


def _load_models(
    folder: pathlib.Path, config: ModelConfig, mesh: Mesh | None, frozen: Collection[str]
) -> tuple[qwen_config.Qwen2_5VLConfig, TransformerConfig, VAEConfig, dict]:
    """Captioner, transformer and auto-encoder with their adapters: descriptions and the dictionary of parameters."""
    _has_reference(folder, config)
    # its two text towers are on the host only until the vector is known, so they come before all that stays
    pooled = pooled_empty_prompt([folder / "SD3" / name for name in ("text_encoder", "text_encoder_2")])
    overrides = dict(dtype=config.dtype, remat=config.remat, lora_alpha=config.lora_alpha)
    held, precision = _precisions(folder, config, frozen)
    captioner, parts = _load_captioner_with_reference(folder, config, mesh, frozen)
    transformer_folder = folder / "dit" if (folder / "dit").is_dir() else folder / "SD3" / "transformer"
    transformer, parts["transformer"] = sd3_weights.load_transformer(
        transformer_folder,
        params_dtype=precision["transformer"],
        placement=placement(mesh, "transformer"),
        **overrides,
    )
    vae, parts["vae"] = sd3_weights.load_vae(folder / "SD3" / "vae", placement=placement(mesh, "vae"))
    parts["pooled"] = placed("pooled", pooled, mesh)
    projected = parts["projector"]["second"]["kernel"].shape[-1]
    widths = {
        "joint_attention_dim": (projected, f"the width of the projector of {captioner_folder(folder)}"),
        "pooled_projection_dim": (parts["pooled"].shape[-1], f"the width of the text encoders of {folder / 'SD3'}"),
        "in_channels": (vae.channels, f"the latent_channels of {folder / 'SD3' / 'vae'}"),
    }
    check_fit(transformer_folder / "config.json", transformer, widths)
    if config.adapters and (folder / "dit_lora").is_dir():
        transformer = _add_transformer_adapter(folder / "dit_lora", transformer, parts, config.merge_adapters, mesh)
        store(parts, held, config.frozen_dtype)
    return captioner, transformer, vae, parts


def _load_captioner_with_reference(
    folder: pathlib.Path, config: ModelConfig, mesh: Mesh | None, frozen: Collection[str]
) -> tuple[qwen_config.Qwen2_5VLConfig, dict]:
    """The captioner with its adapter, or with its fully fine-tuned copy beside the reference."""
    trained_whole = _has_reference(folder, config)
    overrides = dict(dtype=config.dtype, remat=config.remat, lora_alpha=config.lora_alpha)
    held, precision = _precisions(folder, config, frozen)
    stored = precision | {"language": np.dtype(np.float32)} if trained_whole and config.adapters else precision
    captioner, parts = _load_captioner(folder, overrides, placement(mesh), stored)
    if trained_whole:
        language = parts.pop("language")
        parts |= {"language_policy": language} if config.adapters else {}
        del language
        parts["language"] = qwen_weights.load_language(
            folder / REFERENCE, captioner, precision["language"], placement(mesh)
        )
    if config.adapters and (folder / "llm_lora").is_dir():
        captioner = _add_language_adapter(folder / "llm_lora", captioner, parts, config.merge_adapters, mesh)
        store(parts, held, config.frozen_dtype)
    return captioner, parts


def load_frozen(
    config: ModelConfig, names: Collection[str], *, mesh: Mesh | None = None, frozen: Collection[str] = ()
) -> dict:
    """The auto-encoder (`vae`), the reference language model (`language`), or both, as `load_system` reads them.

    Args:
      config: which folder.
      names: of the parts.
      mesh, frozen: see `load_system`.

    Raises:
      FileNotFoundError, ValueError: see `load_system`.
    """
    folder, parts = model_folder(config.folder), {}
    if "language" in names:
        parts["language"] = _load_captioner_with_reference(folder, config, mesh, frozen)[1]["language"]
    own = set(names) - {"language"} if (folder / decoders.FOLDER).is_dir() else set()
    if own:
        precision = _precisions(folder, config, frozen)[1]
        parts |= decoders.load_parts(folder / decoders.FOLDER, lambda part: placement(mesh, part), precision, own)
    elif "vae" in names:
        parts["vae"] = sd3_weights.load_vae(folder / "SD3" / "vae", placement=placement(mesh, "vae"))[1]
    return parts


def language_folders(folder: pathlib.Path, config: ModelConfig) -> tuple[str, ...]:
    """Names of the folders in a model folder whose weights make the reference language model."""
    if (folder / REFERENCE).is_dir():
        return (REFERENCE,)
    merged = config.adapters and config.merge_adapters and (folder / "llm_lora").is_dir()
    return tuple(sorted({captioner_folder(folder).name, *(("llm_lora",) if merged else ())}))


def _precisions(
    folder: pathlib.Path, config: ModelConfig, frozen: Collection[str]
) -> tuple[set[str], dict[str, np.dtype]]:
    """The parts that stay float32, and the precision in which each part is read.

    An adapter is added to weights in float32, and the sum is then rounded once.
    """
    names = (*CAPTIONER, "transformer", "text_encoder")
    held, merged = {str(name) for name in names if name not in frozen}, set()
    if config.merge_adapters and config.adapters:
        merged |= {"vision", "language"} if (folder / "llm_lora").is_dir() else set()
        merged |= {"transformer"} if (folder / "dit_lora").is_dir() else set()
    return held, {name: np.dtype(np.float32 if name in held | merged else config.frozen_dtype) for name in names}


def placement(mesh: Mesh | None, part: str = "") -> Placement | None:
    """Where the parameters of a part lie, by the names that they have in the whole model."""
    if mesh is None:
        return None
    if not part:
        return lambda tree: sharding.tree_shardings(tree, mesh)
    return lambda tree: sharding.tree_shardings({part: tree}, mesh)[part]


def load_encoders(folder: pathlib.Path, mesh: Mesh | None) -> tuple[dict[str, Encoder], dict[str, Any]]:
    """The image encoders of a model folder, and their parameters by name.

    Raises:
      FileNotFoundError, ValueError: see `rewards.similarity.load_encoder`.
    """
    encoders, params = {}, {}
    for name in ENCODERS:
        if (folder / name).is_dir():
            encoders[name], params[name] = _load_encoder(folder / name, name, placement(mesh, f"encoders/{name}"))
    return encoders, params


def _load_encoder(folder: pathlib.Path, name: str, placement: Placement | None) -> tuple[Encoder, dict]:
    """The encoder of a folder, of the kind that the folder's name says."""
    encoder, params = load_encoder(folder, name, placement=placement)
    if encoder.kind != {"longclip": "clip"}.get(name, name):
        raise ValueError(
            f"{folder} holds a {encoder.kind} model, not the {name} that its name promises; copy the right model there"
        )
    return encoder, params


def captioner_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the captioner's own weights: `llm_lora` where it holds them, as the release's does, else `llm`.

    The release loads `llm` and then `llm_lora` over it, so that the latter wins.
    """
    wrapped = folder / "llm_lora"
    return wrapped if wrapped.is_dir() and qwen_weights.holds_base(wrapped) else folder / "llm"


def config_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the captioner's config.json: that of its weights, or `llm` where it has none."""
    base = captioner_folder(folder)
    return base if (base / "config.json").exists() else folder / "llm"


def _load_captioner(
    folder: pathlib.Path, overrides: Mapping, placement: Placement | None, precision: Mapping[str, np.dtype]
) -> tuple[qwen_config.Qwen2_5VLConfig, dict]:
    """The captioner and its projector, wherever the folder keeps them, each part in its precision."""
    base = captioner_folder(folder)
    config = qwen_config.from_folder(config_folder(folder), **overrides)
    _, parts = qwen_weights.load(base, config, precision, placement)
    if base != folder / "llm" and list((folder / "llm").glob("*.safetensors")):
        qwen_weights.check(folder / "llm", config)  # not used, but a damaged copy should not pass unseen
    if "projector" not in parts and (folder / "llm").is_dir():
        projector = qwen_weights.load_projector(folder / "llm", config, precision["projector"], placement)
        parts |= {} if projector is None else {"projector": projector}
    if "projector" not in parts and not (folder / decoders.FOLDER).is_dir():
        raise ValueError(f"{base} has no projector.0 and projector.2 tensors; UAE's own llm folder has them")
    return config, parts


def _has_reference(folder: pathlib.Path, config: ModelConfig) -> bool:
    """Whether the folder's `llm` was trained whole, with its reference beside it.

    Raises:
      ValueError: there is an adapter too, or adapters are to be merged.
    """
    reference = folder / REFERENCE
    if not reference.is_dir():
        return False
    if (folder / "llm_lora").is_dir():
        raise ValueError(
            f"{folder} holds both llm_lora and {REFERENCE}; a captioner is trained by an adapter or whole, so remove "
            "one of them"
        )
    if config.merge_adapters:
        raise ValueError(
            f"config.model.merge_adapters cannot merge llm with its reference {reference}; remove {REFERENCE}, so "
            "that llm is the "
            "reference too, or merge dit_lora alone by `convert export --merge-adapters`"
        )
    return True


def _add_language_adapter(
    folder: pathlib.Path, captioner: qwen_config.Qwen2_5VLConfig, parts: dict, merge: bool, mesh: Mesh | None
) -> qwen_config.Qwen2_5VLConfig:
    """Puts the adapter beside the weights or into them; the configuration has the alpha of one that is beside them."""
    if merge:
        adapter = qwen_weights.read_adapters(folder, captioner, np.dtype(np.float32))
        for name, tree in adapter.tree.items():
            parts[name] = merge_adapter(parts[name], placed(f"{name}_lora", tree, mesh), adapter.alpha)
        return captioner
    captioner, adapter = qwen_weights.load_adapter(folder, captioner, np.dtype(np.float32))
    parts["language_lora"] = placed("language_lora", adapter, mesh)
    return captioner


def _add_transformer_adapter(
    folder: pathlib.Path, transformer: TransformerConfig, parts: dict, merge: bool, mesh: Mesh | None
) -> TransformerConfig:
    adapted, adapter = sd3_weights.load_adapter(folder, transformer)
    adapter = placed("transformer_lora", adapter, mesh)
    if merge:
        parts["transformer"] = merge_adapter(parts["transformer"], adapter, adapted.lora_alpha)
        return transformer
    parts["transformer_lora"] = adapter
    return adapted


def placed(part: str, tree: Any, mesh: Mesh | None) -> Any:
    """A small part that was read to the host, on the mesh if there is one."""
    return tree if mesh is None else sharding.shard_tree({part: tree}, mesh)[part]
