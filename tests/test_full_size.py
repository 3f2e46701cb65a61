"""Every published size without its weights: each parameter has one source tensor, of the published name and shape.

The published lists are made apart from our tables: the reference library's model on torch's meta device, from the
published config, with the names of the files where transformers 5 has others in memory. Neither side allocates.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence

import diffusers
import janus_pieces
import jax
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from wrapped_layout import wrapped_tensors

from uae_jax import trees
from uae_jax.hf.adapters import adapter_rules
from uae_jax.hf.rules import Rule, canonical, published_tensors
from uae_jax.hf.split_tensors import SplitTensors
from uae_jax.models.encoders import clip, dino, openai, tables
from uae_jax.models.encoders.config import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov3Config,
    LongCLIPTextConfig,
)
from uae_jax.models.janus import config as janus_config
from uae_jax.models.janus import model as janus
from uae_jax.models.janus import weights as janus_weights
from uae_jax.models.language import model as lm
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import transformer as sd3
from uae_jax.models.sd3 import vae
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.nn.lora import init_lora
from uae_jax.planning import published as published_sizes

Shapes = dict[str, tuple[int, ...]]
RANK = 32
QWEN_FILE_NAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))

# the published config.json files, what transformers and diffusers read of them
QWEN_VISION = dict(
    depth=32,
    hidden_act="silu",
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    in_chans=3,
    out_hidden_size=2048,
    patch_size=14,
    spatial_merge_size=2,
    spatial_patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2,
    temporal_patch_size=2,
)
QWEN = dict(
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    model_type="qwen2_5_vl",
    bos_token_id=151643,
    eos_token_id=151645,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    vision_token_id=151654,
    image_token_id=151655,
    video_token_id=151656,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=11008,
    max_position_embeddings=128000,
    num_attention_heads=16,
    num_hidden_layers=36,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    vision_config=QWEN_VISION,
)
SD3_SHARED = dict(
    attention_head_dim=64,
    in_channels=16,
    out_channels=16,
    joint_attention_dim=4096,
    patch_size=2,
    pooled_projection_dim=2048,
    qk_norm="rms_norm",
    sample_size=128,
)
SD3_MEDIUM = dict(
    SD3_SHARED,
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    dual_attention_layers=list(range(13)),
)
SD3_LARGE = dict(
    SD3_SHARED,
    num_layers=38,
    num_attention_heads=38,
    caption_projection_dim=2432,
    pos_embed_max_size=192,
    dual_attention_layers=[],
)
SD3_VAE = dict(
    act_fn="silu",
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=1024,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    force_upcast=True,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
CLIP_VISION = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=24,
    image_size=224,
    patch_size=14,
    projection_dim=768,
    hidden_act="quick_gelu",
)
CLIP_TEXT = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
    max_position_embeddings=77,
    vocab_size=49408,
    projection_dim=768,
    hidden_act="quick_gelu",
    bos_token_id=0,
    eos_token_id=2,
)
DINOV2 = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    mlp_ratio=4,
    hidden_act="gelu",
    image_size=518,
    patch_size=14,
    layer_norm_eps=1e-6,
    layerscale_value=1.0,
    qkv_bias=True,
    use_swiglu_ffn=False,
    use_mask_token=True,
)
DINOV3 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="gelu",
    image_size=224,
    patch_size=16,
    num_register_tokens=4,
    layer_norm_eps=1e-5,
    layerscale_value=1.0,
    rope_theta=100.0,
    query_bias=True,
    key_bias=False,
    value_bias=True,
    proj_bias=True,
    mlp_bias=True,
    use_gated_mlp=False,
)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def shapes_of(model: nn.Module, *renamed: tuple[str, str]) -> Shapes:
    """The state of a model, under the names of its published files."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in renamed:
            name = re.sub(pattern, replacement, name)
        shapes[name] = tuple(tensor.shape)
    return shapes


def blank(abstract: trees.Tree) -> trees.Tree:
    """Arrays of the given shapes that take one number of memory each."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float16(0), leaf.shape), abstract)


def check_both_ways(rules: Sequence[Rule], abstract: trees.Tree, published: Shapes):
    """Each leaf has one rule, each published tensor one leaf or layer, and shapes agree in both directions."""
    leaves = trees.flatten(abstract)
    assert sorted(rule.ours for rule in rules) == sorted(leaves)
    written = list(published_tensors(blank(abstract), rules))
    assert max(Counter(name for name, _ in written).values()) == 1
    assert {name: tensor.shape for name, tensor in written} == published
    for rule in rules:
        target = leaves[rule.ours].shape
        assert rule.layers is None or (len(rule.layers), *target[1:]) == target
        for source in rule.sources():
            tensor = np.broadcast_to(np.float16(0), published[source])
            assert rule.to_ours(tensor).shape == (target if rule.layers is None else target[1:]), source


def millions(abstract: trees.Tree) -> float:
    return round(trees.parameter_count(abstract) / 1e6, 1)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Our config of the published config.json, and a function that builds the reference model of it."""
    folder = tmp_path_factory.mktemp("llm")
    (folder / "config.json").write_text(json.dumps(QWEN))
    theirs = transformers.Qwen2_5_VLConfig.from_pretrained(folder)
    return qwen_config.from_folder(folder), lambda: on_meta(
        lambda: transformers.Qwen2_5_VLForConditionalGeneration(theirs)
    )


def test_qwen2_5_vl_3b(captioner):
    config, build = captioner
    abstract, model = qwen.abstract_params(config), build()
    published = shapes_of(model, *QWEN_FILE_NAMES)
    assert published.pop("lm_head.weight") == published["model.embed_tokens.weight"]  # tied: not in the files
    assert len(published) == 824
    assert (
        trees.parameter_count(abstract) == sum(parameter.numel() for parameter in model.parameters()) == 3_754_622_976
    )
    check_both_ways(qwen_weights.rules(config, projector=False), abstract, published)


def _sizes(width, layers, heads, key_heads, inner, vision_inner=3420):
    """config.json of a larger Qwen2.5-VL, whose head is not tied."""
    return dict(
        QWEN,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        vocab_size=152064,
        tie_word_embeddings=False,
        vision_config=dict(QWEN_VISION, out_hidden_size=width, intermediate_size=vision_inner),
    )


LARGER = {
    "7b": (_sizes(3584, 28, 28, 4, 18944), 8_292_166_656, 729),
    "32b": (_sizes(5120, 64, 40, 8, 27648, 3456), 33_452_718_336, 1161),
    "72b": (_sizes(8192, 80, 64, 8, 29568, 3456), 73_410_777_344, 1353),
}


@pytest.mark.parametrize("size", LARGER)
def test_larger_captioners_differ_by_their_sizes_alone(size, tmp_path):
    values, parameters, tensors = LARGER[size]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = qwen_config.from_folder(tmp_path)
    theirs = transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path)
    model = on_meta(lambda: transformers.Qwen2_5_VLForConditionalGeneration(theirs))
    abstract, published = qwen.abstract_params(config), shapes_of(model, *QWEN_FILE_NAMES)
    assert published["lm_head.weight"] == (152064, values["hidden_size"]) and not config.text.tied
    assert len(published) == tensors
    assert trees.parameter_count(abstract) == sum(parameter.numel() for parameter in model.parameters()) == parameters
    check_both_ways(qwen_weights.rules(config, projector=False), abstract, published)
    if size == "7b":
        planned = published_sizes.CAPTIONERS["qwen2_5_vl_7b"]
        assert (config.text, config.vision) == (planned.text, planned.vision)


def test_the_release_of_the_captioner(captioner):
    """`llm` with its projector, and `llm_lora`: the whole state of a model whose text model is wrapped by peft."""
    config, build = captioner
    projector = jax.eval_shape(lambda: qwen.init_projector(jax.random.key(0), 2048, 8192, 4096))
    params = {**qwen.abstract_params(config), "projector": projector}
    model = build()
    mlp = on_meta(lambda: nn.Sequential(nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 4096)))
    projected = shapes_of(mlp, ("^", "projector."))
    published = shapes_of(model, *QWEN_FILE_NAMES) | projected
    published.pop("lm_head.weight")
    assert len(published) == 828
    check_both_ways(qwen_weights.rules(config, projector=True), params, published)

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inner = model.model.language_model
    model.model.language_model = on_meta(
        lambda: get_peft_model(inner, LoraConfig(r=RANK, lora_alpha=64, target_modules=modules))
    )
    wrapped = shapes_of(model, *QWEN_FILE_NAMES) | projected
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), params["language"], lm.ADAPTER_PATTERN, RANK))
    written = list(wrapped_tensors(config, blank(params), blank(adapter)))
    assert len(written) == len(wrapped) == 828 + 1 + 36 * 7 * 2
    assert {name: tensor.shape for name, tensor in written} == wrapped
    layer = "model.base_model.model.layers.35."
    assert wrapped[f"{layer}self_attn.k_proj.base_layer.bias"] == (256,)
    assert wrapped[f"{layer}mlp.down_proj.lora_A.default.weight"] == (32, 11008)
    assert wrapped[f"{layer}mlp.down_proj.lora_B.default.weight"] == (2048, 32)
    saved = {
        name.removeprefix("model.").replace(".default.", "."): shape
        for name, shape in wrapped.items()
        if ".lora_" in name
    }
    check_both_ways(lm_weights.adapter_rules(36), adapter, saved)
    assert trees.parameter_count(adapter) == 59_867_136


SIZES = [(SD3_MEDIUM, 909, 2.470, 382), (SD3_LARGE, 1227, 8.146, 606)]


@pytest.mark.parametrize("published_config, tensors, billions, adapted", SIZES, ids=["medium", "large"])
def test_sd3_5_and_its_adapter(tmp_path, published_config, tensors, billions, adapted):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **published_config}))
    config = TransformerConfig.from_folder(tmp_path)
    model = on_meta(lambda: diffusers.SD3Transformer2DModel(**published_config))
    published, abstract = shapes_of(model), sd3.abstract_params(config)
    assert len(published) == tensors and round(trees.parameter_count(abstract) / 1e9, 3) == billions
    check_both_ways(sd3_weights.transformer_rules(config), abstract, published)

    # flow_grpo's targets: projections of the joint attention alone, by suffix
    targets = [
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ]
    wrapped = on_meta(lambda: get_peft_model(model, LoraConfig(r=RANK, lora_alpha=64, target_modules=targets)))
    saved = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(wrapped).items()}
    assert len(saved) == adapted
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract, sd3.ATTENTION_ADAPTER, RANK))
    check_both_ways(adapter_rules(sd3_weights.transformer_rules(config), adapter), adapter, saved)


def test_sd3_vae(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **SD3_VAE}))
    config = VAEConfig.from_folder(tmp_path)
    published, abstract = shapes_of(on_meta(lambda: diffusers.AutoencoderKL(**SD3_VAE))), vae.abstract_params(config)
    assert len(published) == 244 and millions(abstract) == 83.8
    check_both_ways(sd3_weights.vae_rules(config), abstract, published)


TEXT_BIGG = dict(
    CLIP_TEXT,
    hidden_size=1280,
    intermediate_size=5120,
    num_attention_heads=20,
    num_hidden_layers=32,
    projection_dim=1280,
    hidden_act="gelu",
)
TOWERS = {
    "clip_l_vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", CLIPVisionConfig, CLIP_VISION, 392, 304.0),
    "clip_l_text": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIPTextConfig, CLIP_TEXT, 197, 123.7),
    "clip_bigg_text": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIPTextConfig, TEXT_BIGG, 517, 694.7),
    "clip_l": (
        "CLIPModel",
        "CLIPConfig",
        CLIPConfig,
        dict(projection_dim=768, vision_config=CLIP_VISION, text_config=CLIP_TEXT),
        590,
        427.6,
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_clip(name):
    model, theirs, ours, published_config, tensors, size = TOWERS[name]
    config = ours.from_dict(published_config)
    model, theirs = getattr(transformers, model), getattr(transformers, theirs)
    published = shapes_of(on_meta(lambda: model(theirs(**published_config))))
    published = {name: shape for name, shape in published.items() if not name.endswith("position_ids")}
    abstract = clip.abstract_params(config)
    assert len(published) == tensors and millions(abstract) == size
    check_both_ways(tables.clip_rules(config), abstract, published)


DINO_FILE_NAMES = {
    "dinov2": (
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
    ),
    "dinov3": ((r"^model\.layer\.", "layer."),),
}
DINOS = {
    "dinov2": (
        transformers.Dinov2Model,
        transformers.Dinov2Config,
        Dinov2Config,
        tables.dinov2_rules,
        DINOV2,
        439,
        304.4,
    ),
    "dinov3": (
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig,
        Dinov3Config,
        tables.dinov3_rules,
        DINOV3,
        415,
        303.1,
    ),
}


@pytest.mark.parametrize("name", DINOS)
def test_dino(name):
    model, theirs, ours, rules, published_config, tensors, size = DINOS[name]
    config = ours(**published_config)
    published = shapes_of(on_meta(lambda: model(theirs(**published_config))), *DINO_FILE_NAMES[name])
    abstract = dino.abstract_params(config)
    assert len(published) == tensors and millions(abstract) == size
    check_both_ways(rules(config), abstract, published)


JANUS = {
    "janus_pro_1b": (dict(width=2048, inner=5632, layers=24, heads=16), 2_076_636_811, 964, 882),
    "janus_pro_7b": (dict(width=4096, inner=11008, layers=30, heads=32), 7_407_773_323, 1018, 936),
}


def janus_of_transformers(width: int, inner: int, layers: int, heads: int) -> nn.Module:
    """From the published sizes, without our config."""
    text = transformers.LlamaConfig(
        vocab_size=102400,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=16384,
    )
    vision = transformers.JanusVisionConfig(projection_dim=width)
    vq = transformers.JanusVQVAEConfig(projection_dim=width, image_token_embed_dim=width)
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    return on_meta(lambda: transformers.JanusForConditionalGeneration(config))


@pytest.mark.parametrize("size", JANUS)
def test_janus_pro(size):
    sizes, parameters, tensors, official_tensors = JANUS[size]
    config, model = janus_config.SIZES[size], janus_of_transformers(**sizes)
    abstract, published = janus.abstract_params(config), shapes_of(model)
    assert len(published) == tensors
    assert trees.parameter_count(abstract) == sum(parameter.numel() for parameter in model.parameters()) == parameters
    check_both_ways(janus_weights.rules(config), abstract, published)

    # the official pickle, seen through the same table
    official = janus_pieces.official_state(model.state_dict())
    assert len(official) == official_tensors
    whole = Tensors({name: np.broadcast_to(np.float16(0), tensor.shape) for name, tensor in official.items()})
    seen = SplitTensors(whole, janus_weights.FUSED, janus_weights.BATCHED)
    names = {name: canonical(name, janus_weights.ALIASES) for name in seen.names()}
    used = {
        known: seen.shape(name)
        for name, known in names.items()
        if not re.fullmatch(janus_weights.ignored(config), known)
    }
    assert used == published and len(names) == len(set(names.values()))


def longclip_l() -> Shapes:
    """The state of longclip-L.pt, written out from the paper's sizes and the official model's names."""

    def block(prefix: str, width: int) -> Shapes:
        return {
            f"{prefix}.{name}": shape
            for name, shape in {
                "ln_1.weight": (width,),
                "ln_1.bias": (width,),
                "ln_2.weight": (width,),
                "ln_2.bias": (width,),
                "attn.in_proj_weight": (3 * width, width),
                "attn.in_proj_bias": (3 * width,),
                "attn.out_proj.weight": (width, width),
                "attn.out_proj.bias": (width,),
                "mlp.c_fc.weight": (4 * width, width),
                "mlp.c_fc.bias": (4 * width,),
                "mlp.c_proj.weight": (width, 4 * width),
                "mlp.c_proj.bias": (width,),
            }.items()
        }

    state = {
        "visual.class_embedding": (1024,),
        "visual.positional_embedding": (257, 1024),
        "visual.proj": (1024, 768),
        "visual.conv1.weight": (1024, 3, 14, 14),
        "visual.ln_pre.weight": (1024,),
        "visual.ln_pre.bias": (1024,),
        "visual.ln_post.weight": (1024,),
        "visual.ln_post.bias": (1024,),
        "token_embedding.weight": (49408, 768),
        "positional_embedding": (248, 768),
        "positional_embedding_res": (248, 768),
        "ln_final.weight": (768,),
        "ln_final.bias": (768,),
        "text_projection": (768, 768),
        "logit_scale": (),
    }
    for layer in range(24):
        state |= block(f"visual.transformer.resblocks.{layer}", 1024)
    for layer in range(12):
        state |= block(f"transformer.resblocks.{layer}", 768)
    return state


class Tensors:
    """Tensors in memory, with the interface of a folder of them."""

    path = "longclip-L.pt"

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return set(self.tensors)

    def file(self, name):
        return self.path

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return str(self.tensors[name].dtype)

    def expect(self, names):
        pass

    def read(self, name):
        return self.tensors[name]


def test_longclip_l():
    state = longclip_l()
    whole = {name: np.broadcast_to(np.float16(0), shape) for name, shape in state.items()}
    seen = SplitTensors(Tensors(whole), openai.FUSED)
    config = openai.config_of(seen)
    text = {**CLIP_TEXT, "max_position_embeddings": 248, "bos_token_id": 49406}
    assert config == CLIPConfig(CLIPVisionConfig(**CLIP_VISION), LongCLIPTextConfig(**text))
    # query, key and value are thirds of one tensor, in this order: each third has one parameter
    published = {name: seen.shape(name) for name in seen.names()}
    thirds = Counter(re.sub(r"\[(query|key|value)\]$", "", name) for name in published)
    assert set(thirds) == set(state) and {thirds[name] for name in state if "in_proj" in name} == {3}
    for name, (rows, *rest) in ((name, shape) for name, shape in state.items() if "in_proj" in name):
        assert {published[f"{name}[{part}]"] for part in ("query", "key", "value")} == {(rows // 3, *rest)}
    abstract = clip.abstract_params(config)
    assert len(state) == 447 and trees.parameter_count(abstract) == sum(int(np.prod(shape)) for shape in state.values())
    assert millions(abstract) == 427.9
    check_both_ways(openai.rules(config), abstract, published)
