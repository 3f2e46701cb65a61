"""Published tensors of Janus to and from our parameters, in the layout of transformers and in the official one.

Canonical names are those of transformers' files. Aliases read the official names, and those that peft makes around the
complete model or the language model. The official release is a PyTorch pickle, which is read without running its code
(`hf.torch_file`).
"""

import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

from uae_jax.hf.adapters import Adapter, AdapterFiles, read_adapter, settings_of, survey_adapter
from uae_jax.hf.rules import Placement, Rule, canonical, load_params, published_tensors
from uae_jax.hf.safetensors import TensorFolder, Tensors
from uae_jax.hf.split_tensors import SplitTensors
from uae_jax.hf.torch_file import open_tensors
from uae_jax.models.autoencoder.tables import affine, autoencoder_rules
from uae_jax.models.encoders.tables import norm, tower_blocks
from uae_jax.models.janus import model, vq
from uae_jax.models.janus.config import JanusConfig, VisionConfig, VQConfig, from_folder
from uae_jax.models.language import weights as language_weights
from uae_jax.models.language.weights import ADAPTER_TENSOR, PEFT_ALIASES, language_rules, of_language_alone
from uae_jax.models.precision import numpy_dtype

PREFIX = "model.language_model."  # of the language model's tensors
ADAPTER_PREFIX = f"base_model.model.{PREFIX}"  # peft around the complete model
_TOWER, _VQ = "model.vision_model", "model.vqmodel"
# names of SD3's auto-encoder to those of this tokenizer
_VQ_NAMES = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2.block."),
    (r"\.(down|up)_blocks\.(\d+)\.attentions\.", r".\1.\2.attn."),
    (r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
# official names; query, key and value are one tensor there, and positions have an axis for the batch
FUSED = r"vision_model\.vision_tower\.blocks\.\d+\.attn\.qkv\.(weight|bias)"
BATCHED = r"vision_model\.vision_tower\.pos_embed"
_OFFICIAL_TOWER = r"^vision_model\.vision_tower\."
_OFFICIAL_VQ = r"^gen_vision_model\."
_OFFICIAL = (
    (rf"{_OFFICIAL_TOWER}patch_embed\.proj\.", f"{_TOWER}.embeddings.patch_embedding."),
    (rf"{_OFFICIAL_TOWER}pos_embed$", f"{_TOWER}.embeddings.position_embedding.weight"),
    (rf"{_OFFICIAL_TOWER}norm\.", f"{_TOWER}.post_layernorm."),
    (rf"{_OFFICIAL_TOWER}blocks\.(\d+)\.norm([12])\.", rf"{_TOWER}.encoder.layers.\1.layer_norm\2."),
    (rf"{_OFFICIAL_TOWER}blocks\.(\d+)\.attn\.proj\.", rf"{_TOWER}.encoder.layers.\1.self_attn.projection_layer."),
    (
        rf"{_OFFICIAL_TOWER}blocks\.(\d+)\.attn\.qkv\.(weight|bias)\[([a-z])[a-z]*\]$",
        rf"{_TOWER}.encoder.layers.\1.self_attn.\3_proj.\2",
    ),
    (rf"{_OFFICIAL_TOWER}blocks\.(\d+)\.mlp\.", rf"{_TOWER}.encoder.layers.\1.mlp."),
    (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
    (r"^aligner\.layers\.2\.", "model.aligner.hidden_layers.0."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.vision_head\.", "model.generation_head.vision_head."),
    (rf"{_OFFICIAL_VQ}encoder\.conv_blocks\.", f"{_VQ}.encoder.down."),
    (rf"{_OFFICIAL_VQ}decoder\.conv_blocks\.", f"{_VQ}.decoder.up."),
    (rf"{_OFFICIAL_VQ}(encoder|decoder)\.mid\.0\.", rf"{_VQ}.\1.mid.block_1."),
    (rf"{_OFFICIAL_VQ}(encoder|decoder)\.mid\.1\.", rf"{_VQ}.\1.mid.attn_1."),
    (rf"{_OFFICIAL_VQ}(encoder|decoder)\.mid\.2\.", rf"{_VQ}.\1.mid.block_2."),
    (_OFFICIAL_VQ, f"{_VQ}."),
    (r"^(model\.vqmodel\.(?:encoder\.down|decoder\.up)\.\d+)\.res\.", r"\1.block."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
ALIASES = (
    *PEFT_ALIASES,
    *_OFFICIAL,
    (r"^(model\.)?(language_model\.)?(model\.)?(?=(layers|embed_tokens|norm)\.)", PREFIX),
)
# in the official files and without use: the tower's pooling, and a record of the tokenizer's training
UNUSED = r"vision_model\.vision_tower\.attn_pool\..*|model\.vqmodel\.quantize\.codebook_used"
BUFFERS = r".*\.rotary_emb\.inv_freq|.*\.position_ids"


def vision_rules(config: VisionConfig) -> list[Rule]:
    """The table of the image tower; names of ours start with `vision/`."""
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    embeddings = f"{_TOWER}.embeddings"
    return [
        Rule("vision/patch_embedding/kernel", f"{embeddings}.patch_embedding.weight", "patch", torch_shape=shape),
        Rule("vision/patch_embedding/bias", f"{embeddings}.patch_embedding.bias"),
        Rule("vision/position_embedding", f"{embeddings}.position_embedding.weight"),
        *tower_blocks("vision", _TOWER, config.num_hidden_layers, output="projection_layer"),
        *norm("vision/post_norm", f"{_TOWER}.post_layernorm"),
    ]


def generation_rules() -> list[Rule]:
    """The tables of both aligners and of what is for image tokens, without the tokenizer."""
    maps = {
        "aligner/first": "model.aligner.fc1",
        "aligner/second": "model.aligner.hidden_layers.0",
        "generation/aligner/first": "model.generation_aligner.fc1",
        "generation/aligner/second": "model.generation_aligner.hidden_layers.0",
        "generation/head/first": "model.generation_head.proj_out",
        "generation/head/second": "model.generation_head.vision_head",
    }
    table = [Rule("generation/embedding/table", "model.generation_embeddings.weight")]
    return table + [rule for ours, theirs in maps.items() for rule in affine(ours, theirs, "dense")]


def vq_rules(config: VQConfig) -> list[Rule]:
    """The table of the image tokenizer; names of ours start with `vq/`."""
    width = config.sizes.widths[-1]
    table = [Rule("vq/codebook/table", f"{_VQ}.quantize.embedding.weight")]
    for ours, theirs, shape in (
        ("quant", "quant_conv", (config.code_width, config.latent)),
        ("post_quant", "post_quant_conv", (config.latent, config.code_width)),
    ):
        table += [
            Rule(f"vq/{ours}/kernel", f"{_VQ}.{theirs}.weight", "patch", torch_shape=(*shape, 1, 1)),
            Rule(f"vq/{ours}/bias", f"{_VQ}.{theirs}.bias"),
        ]
    for rule in autoencoder_rules(config.sizes):
        theirs = f"{_VQ}.{canonical(rule.theirs, _VQ_NAMES)}"
        # the linear maps of attention are 1x1 convolutions here
        how = ("patch", (width, width, 1, 1)) if rule.layout == "dense" else (rule.layout, None)
        table.append(Rule(f"vq/{rule.ours}", theirs, how[0], torch_shape=how[1]))
    return table


def rules(config: JanusConfig) -> list[Rule]:
    """The complete table."""
    return [
        *vision_rules(config.vision),
        *generation_rules(),
        *language_rules(config.text, PREFIX),
        *vq_rules(config.vq),
    ]


def open_weights(path: str | pathlib.Path) -> Tensors:
    """The tensors of a folder in either layout: safetensors, or the official pickle, in transformers' form.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: a file is not complete, or holds more than tensors by name.
    """
    return SplitTensors(open_tensors(path), FUSED, BATCHED)


def ignored(config: JanusConfig) -> str:
    """Regular expression of canonical names that are no parameters."""
    return "|".join((UNUSED, BUFFERS, ADAPTER_TENSOR, *((r"lm_head\.weight",) if config.text.tied else ())))


def check_head(folder: Tensors, config: JanusConfig) -> None:
    """See `language.weights.check_head`."""
    language_weights.check_head(folder, config, ALIASES, PREFIX)


def load(
    path: str | pathlib.Path,
    config: JanusConfig | None = None,
    dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
    placement: Placement | None = None,
) -> tuple[JanusConfig, dict]:
    """Reads a model folder of either layout.

    Args:
      path: folder with weights, and `config.json` unless `config` is given.
      config: sizes, when known.
      dtype: precision to store the parameters in, or one by part; None keeps that of the files.
      placement: see `hf.rules.load_params`.

    Returns:
      The config, and the parts of `janus.model`.

    Raises:
      FileNotFoundError: no such folder, config or weights.
      ValueError: what the config asks for and what the files hold differ; both lists are in the message.
    """
    config = from_folder(path) if config is None else config
    folder = open_weights(path)
    check_head(folder, config)
    return config, load_params(
        folder,
        rules(config),
        model.abstract_params(config),
        aliases=ALIASES,
        ignore=ignored(config),
        dtype=dtype if isinstance(dtype, Mapping) else numpy_dtype(dtype),
        placement=placement,
    )


def load_vq(path: str | pathlib.Path, config: VQConfig) -> dict:
    """Reads the image tokenizer of a folder that may hold it alone, in float32."""
    abstract = {"vq": jax.eval_shape(lambda: vq.init_params(config, jax.random.key(0)))}
    others = rf"(?!{re.escape(_VQ)}\.).*"
    return load_params(
        open_weights(path), vq_rules(config), abstract, aliases=ALIASES, ignore=others, dtype=np.float32
    )["vq"]


def tensors(config: JanusConfig, params: Mapping, dtype: DTypeLike | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of transformers' layout; the inverse of `load`."""
    return published_tensors(params, rules(config), numpy_dtype(dtype))


def survey_adapters(path: str | pathlib.Path, config: JanusConfig | None) -> AdapterFiles:
    """The files of an adapter for `read_adapters`; a config of None stands for an unknown base model.

    Raises:
      FileNotFoundError, ValueError: see `hf.adapters.survey_adapter`.
    """
    table, abstract = (None, {}) if config is None else (rules(config), model.abstract_params(config))
    parts = ("vision", "aligner", "language", "generation", "vq")
    return survey_adapter(TensorFolder(path), table, abstract, aliases=ALIASES, parts=parts)


def read_adapters(path: str | pathlib.Path, config: JanusConfig, dtype: DTypeLike | None = None) -> Adapter:
    """Reads a peft adapter of any part.

    Args:
      path: peft folder around the complete model, or around the language model.
      config: sizes of the base model.
      dtype: precision to store the adapter in; None keeps that of the files.

    Raises:
      FileNotFoundError: no such folder or weights.
      ValueError: see `hf.adapters.read_adapter`.
    """
    return read_adapter(survey_adapters(path, config), numpy_dtype(dtype))


def load_adapter(
    path: str | pathlib.Path, config: JanusConfig, dtype: DTypeLike | None = None
) -> tuple[JanusConfig, dict]:
    """The config with the alpha of an adapter of the language model alone, and its tree; see `read_adapters`."""
    adapter = read_adapters(path, config, dtype)
    return config.using(lora_alpha=adapter.alpha), of_language_alone(adapter, path)


def adapter_tensors(
    config: JanusConfig, adapter: Mapping, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of an adapter as peft saves it around the complete model; the inverse of `load_adapter`."""
    return language_weights.adapter_tensors(config, adapter, ADAPTER_PREFIX, dtype)


def adapter_config(config: JanusConfig, adapter: Mapping) -> dict:
    """The contents of peft's `adapter_config.json`; the image tower has modules of the same endings, which stay."""
    factors = language_weights.rules_of_adapter(config, adapter, ADAPTER_PREFIX)
    return settings_of(adapter, factors, rules(config), config.text.lora_alpha)
