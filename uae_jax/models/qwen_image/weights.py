"""Which published tensor is which parameter of Qwen-Image, in the names of diffusers."""

from uae_jax.hf.rules import Rule
from uae_jax.models.autoencoder.tables import affine
from uae_jax.models.qwen_image.config import TransformerConfig, VAEConfig

# convolutions over time, which do nothing to a single frame
TIME = r".*\.time_conv\.(weight|bias)"
_ENDS = {
    "patch_embed": "img_in",
    "context_embedder": "txt_in",
    "timestep_embedder_1": "time_text_embed.timestep_embedder.linear_1",
    "timestep_embedder_2": "time_text_embed.timestep_embedder.linear_2",
    "norm_out/linear": "norm_out.linear",
    "proj_out": "proj_out",
}
_MAPS = {
    "modulation/linear": "img_mod.1",
    "context_modulation/linear": "txt_mod.1",
    "attention/query": "attn.to_q",
    "attention/key": "attn.to_k",
    "attention/value": "attn.to_v",
    "attention/output": "attn.to_out.0",
    "attention/context_query": "attn.add_q_proj",
    "attention/context_key": "attn.add_k_proj",
    "attention/context_value": "attn.add_v_proj",
    "attention/context_output": "attn.to_add_out",
    "feed_forward/up": "img_mlp.net.0.proj",
    "feed_forward/down": "img_mlp.net.2",
    "context_feed_forward/up": "txt_mlp.net.0.proj",
    "context_feed_forward/down": "txt_mlp.net.2",
}
_NORMS = {
    "attention/query_norm": "attn.norm_q",
    "attention/key_norm": "attn.norm_k",
    "attention/context_query_norm": "attn.norm_added_q",
    "attention/context_key_norm": "attn.norm_added_k",
}


def transformer_rules(config: TransformerConfig) -> list[Rule]:
    """The table of the transformer, for `hf.rules.load_params` and `published_tensors`."""
    rules, layers = [Rule("context_norm/scale", "txt_norm.weight")], tuple(range(config.num_layers))
    for ours, theirs in _ENDS.items():
        rules += affine(ours, theirs, "dense")
    for ours, theirs in _MAPS.items():
        rules += affine(f"blocks/{ours}", f"transformer_blocks.{{}}.{theirs}", "dense", layers)
    for ours, theirs in _NORMS.items():
        rules.append(Rule(f"blocks/{ours}/scale", f"transformer_blocks.{{}}.{theirs}.weight", layers=layers))
    return rules


def _video(ours: str, theirs: str, fan_in: int, fan_out: int, size: int = 3) -> list[Rule]:
    """A causal convolution of videos, of which single images see the last time slice."""
    shape = (fan_out, fan_in, size, size, size)
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", "last_frame", torch_shape=shape),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _norm(ours: str, theirs: str, width: int, ones: int) -> Rule:
    return Rule(f"{ours}/scale", f"{theirs}.gamma", "patch", torch_shape=(width, *(1,) * ones))


def _residual_block(ours: str, theirs: str, fan_in: int, width: int) -> list[Rule]:
    rules = [
        _norm(f"{ours}/norm1", f"{theirs}.norm1", fan_in, 3),
        *_video(f"{ours}/conv1", f"{theirs}.conv1", fan_in, width),
        _norm(f"{ours}/norm2", f"{theirs}.norm2", width, 3),
        *_video(f"{ours}/conv2", f"{theirs}.conv2", width, width),
    ]
    if fan_in == width:
        return rules
    return rules + _video(f"{ours}/conv_shortcut", f"{theirs}.conv_shortcut", fan_in, width, 1)


def _middle(part: str, width: int) -> list[Rule]:
    attention = f"{part}.mid_block.attentions.0"
    return [
        *_residual_block(f"{part}/mid_resnets_0", f"{part}.mid_block.resnets.0", width, width),
        _norm(f"{part}/mid_attention/norm", f"{attention}.norm", width, 2),
        *affine(f"{part}/mid_attention/query_key_value", f"{attention}.to_qkv", "conv"),
        *affine(f"{part}/mid_attention/output", f"{attention}.proj", "conv"),
        *_residual_block(f"{part}/mid_resnets_1", f"{part}.mid_block.resnets.1", width, width),
    ]


def vae_rules(config: VAEConfig) -> list[Rule]:
    """The table of the auto-encoder; what is about time alone (`TIME`) is left out."""
    widths, latent = config.block_out_channels, config.z_dim
    rules = _video("encoder/conv_in", "encoder.conv_in", config.input_channels, widths[0])
    number, before = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            name = f"down_blocks_{number}"
            rules += _residual_block(f"encoder/{name}", f"encoder.down_blocks.{number}", before, width)
            number, before = number + 1, width
        if level < len(widths) - 1:
            rules += affine(f"encoder/down_blocks_{number}", f"encoder.down_blocks.{number}.resample.1", "conv")
            number += 1
    rules += _middle("encoder", widths[-1]) + _middle("decoder", widths[-1])
    rules += _video("decoder/conv_in", "decoder.conv_in", latent, widths[-1])
    before = widths[-1]
    for level, width in enumerate(widths[::-1]):
        ours, theirs = f"decoder/up_blocks_{level}", f"decoder.up_blocks.{level}"
        for layer in range(config.num_res_blocks + 1):
            rules += _residual_block(f"{ours}_resnets_{layer}", f"{theirs}.resnets.{layer}", before, width)
            before = width
        if level < len(widths) - 1:
            rules += affine(f"{ours}_upsampler", f"{theirs}.upsamplers.0.resample.1", "conv")
            before = width // 2
    rules += [_norm("encoder/norm_out", "encoder.norm_out", widths[-1], 3)]
    rules += [_norm("decoder/norm_out", "decoder.norm_out", widths[0], 3)]
    rules += _video("encoder/conv_out", "encoder.conv_out", widths[-1], 2 * latent)
    rules += _video("decoder/conv_out", "decoder.conv_out", widths[0], config.input_channels)
    rules += _video("encoder/quant_conv", "quant_conv", 2 * latent, 2 * latent, 1)
    return rules + _video("decoder/post_quant_conv", "post_quant_conv", latent, latent, 1)
