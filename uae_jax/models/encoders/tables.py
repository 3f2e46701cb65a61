"""Which published tensor is which parameter of CLIP, DINOv2 and DINOv3, with the names of transformers' files."""

from uae_jax.hf.rules import Rule
from uae_jax.models.encoders.clip import AnyCLIPConfig
from uae_jax.models.encoders.config import CLIPTextConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config

POSITION_BUFFERS = r".*\.position_ids"
# names that transformers 5 has in memory, to those of the published files
DINOV2_ALIASES = (
    (r"^dinov2\.", ""),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
DINOV3_ALIASES = ((r"^model\.layer\.", "layer."),)


def norm(ours: str, theirs: str, layers: tuple[int, ...] | None = None) -> list[Rule]:
    """Scale and bias of a layer norm."""
    return [
        Rule(f"{ours}/scale", f"{theirs}.weight", layers=layers),
        Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def dense(ours: str, theirs: str, layers: tuple[int, ...] | None = None, bias: bool = True) -> list[Rule]:
    """Kernel of a linear map, and bias if it has one."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", "dense", layers)]
    return rules + ([Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers)] if bias else [])


def tower_blocks(tower: str, prefix: str, count: int, output: str = "out_proj") -> list[Rule]:
    """The table of a stack of `blocks.TransformerBlock`, in the names of CLIP's and SigLIP's towers.

    Args:
      tower: what stands before `layers` in our names.
      prefix: what stands before `encoder.layers.N` in the published names.
      count: number of blocks.
      output: published name of the map after attention.
    """
    layers = tuple(range(count))
    names = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", output))
    rules = []
    for ours, theirs in names:
        rules += dense(f"{tower}/layers/attention/{ours}", f"{prefix}.encoder.layers.{{}}.self_attn.{theirs}", layers)
    for name in ("fc1", "fc2"):
        rules += dense(f"{tower}/layers/{name}", f"{prefix}.encoder.layers.{{}}.mlp.{name}", layers)
    for number in (1, 2):
        rules += norm(f"{tower}/layers/norm{number}", f"{prefix}.encoder.layers.{{}}.layer_norm{number}", layers)
    return rules


def clip_vision_rules(config: CLIPVisionConfig) -> list[Rule]:
    """The table of CLIPVisionModelWithProjection and of the image tower of CLIPModel."""
    prefix = "vision_model"
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    return [
        Rule("vision/class_embedding", f"{prefix}.embeddings.class_embedding"),
        Rule(
            "vision/patch_embedding/kernel", f"{prefix}.embeddings.patch_embedding.weight", "patch", torch_shape=shape
        ),
        Rule("vision/position_embedding", f"{prefix}.embeddings.position_embedding.weight"),
        *norm("vision/pre_norm", f"{prefix}.pre_layrnorm"),
        *tower_blocks("vision", prefix, config.num_hidden_layers),
        *norm("vision/post_norm", f"{prefix}.post_layernorm"),
        *dense("vision/projection", "visual_projection", bias=False),
    ]


def clip_text_rules(config: CLIPTextConfig) -> list[Rule]:
    """The table of CLIPTextModelWithProjection and of the text tower of CLIPModel."""
    prefix = "text_model"
    return [
        Rule("text/token_embedding", f"{prefix}.embeddings.token_embedding.weight"),
        Rule("text/position_embedding", f"{prefix}.embeddings.position_embedding.weight"),
        *tower_blocks("text", prefix, config.num_hidden_layers),
        *norm("text/final_norm", f"{prefix}.final_layer_norm"),
        *dense("text/projection", "text_projection", bias=False),
    ]


def clip_rules(config: AnyCLIPConfig) -> list[Rule]:
    """The table of the published model that the config belongs to."""
    if isinstance(config, CLIPVisionConfig):
        return clip_vision_rules(config)
    if isinstance(config, CLIPTextConfig):
        return clip_text_rules(config)
    return [*clip_vision_rules(config.vision), *clip_text_rules(config.text), Rule("logit_scale", "logit_scale")]


def dinov2_rules(config: Dinov2Config) -> list[Rule]:
    """The table of Dinov2Model, with the names of published files."""
    layers, block = tuple(range(config.num_hidden_layers)), "encoder.layer.{}"
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    rules = [
        Rule("cls_token", "embeddings.cls_token"),
        Rule("position_embedding", "embeddings.position_embeddings"),
        Rule("patch_embedding/kernel", "embeddings.patch_embeddings.projection.weight", "patch", torch_shape=shape),
        Rule("patch_embedding/bias", "embeddings.patch_embeddings.projection.bias"),
        *norm("norm", "layernorm"),
    ]
    if config.use_mask_token:
        rules.append(Rule("mask_token", "embeddings.mask_token"))
    for name in ("query", "key", "value"):
        rules += dense(f"layers/attention/{name}", f"{block}.attention.attention.{name}", layers, config.qkv_bias)
    rules += dense("layers/attention/out", f"{block}.attention.output.dense", layers)
    for name in ("weights_in", "weights_out") if config.use_swiglu_ffn else ("fc1", "fc2"):
        rules += dense(f"layers/{name}", f"{block}.mlp.{name}", layers)
    return rules + _residual_rules(block, layers)


def dinov3_rules(config: Dinov3Config) -> list[Rule]:
    """The table of DINOv3ViTModel, with the names of published files."""
    layers, block = tuple(range(config.num_hidden_layers)), "layer.{}"
    shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
    rules = [
        Rule("cls_token", "embeddings.cls_token"),
        Rule("mask_token", "embeddings.mask_token"),
        Rule("register_tokens", "embeddings.register_tokens"),
        Rule("patch_embedding/kernel", "embeddings.patch_embeddings.weight", "patch", torch_shape=shape),
        Rule("patch_embedding/bias", "embeddings.patch_embeddings.bias"),
        *norm("norm", "norm"),
    ]
    biases = (config.query_bias, config.key_bias, config.value_bias, config.proj_bias)
    names = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj"))
    for (ours, theirs), bias in zip(names, biases):
        rules += dense(f"layers/attention/{ours}", f"{block}.attention.{theirs}", layers, bias)
    for name in ("up", "gate", "down") if config.use_gated_mlp else ("up", "down"):
        rules += dense(f"layers/{name}", f"{block}.mlp.{name}_proj", layers, config.mlp_bias)
    return rules + _residual_rules(block, layers)


def _residual_rules(block: str, layers: tuple[int, ...]) -> list[Rule]:
    rules = []
    for number in (1, 2):
        rules += norm(f"layers/norm{number}", f"{block}.norm{number}", layers)
        rules.append(Rule(f"layers/scale{number}", f"{block}.layer_scale{number}.lambda1", layers=layers))
    return rules
