"""Which published tensor is which parameter of FLUX.2-klein, in the names of diffusers."""

from uae_jax.hf.rules import Rule
from uae_jax.models.autoencoder.tables import affine, autoencoder_rules
from uae_jax.models.flux2.config import TransformerConfig, VAEConfig

BUFFERS = r"bn\.num_batches_tracked"
_ENDS = {
    "patch_embed": "x_embedder",
    "context_embedder": "context_embedder",
    "timestep_embedder/linear_1": "time_guidance_embed.timestep_embedder.linear_1",
    "timestep_embedder/linear_2": "time_guidance_embed.timestep_embedder.linear_2",
    "modulation/linear": "double_stream_modulation_img.linear",
    "context_modulation/linear": "double_stream_modulation_txt.linear",
    "single_modulation/linear": "single_stream_modulation.linear",
    "norm_out/linear": "norm_out.linear",
    "proj_out": "proj_out",
}
_MAPS = {
    "attention/query": "attn.to_q",
    "attention/key": "attn.to_k",
    "attention/value": "attn.to_v",
    "attention/output": "attn.to_out.0",
    "attention/context_query": "attn.add_q_proj",
    "attention/context_key": "attn.add_k_proj",
    "attention/context_value": "attn.add_v_proj",
    "attention/context_output": "attn.to_add_out",
    "feed_forward/gate_up": "ff.linear_in",
    "feed_forward/down": "ff.linear_out",
    "context_feed_forward/gate_up": "ff_context.linear_in",
    "context_feed_forward/down": "ff_context.linear_out",
}
_NORMS = {
    "attention/query_norm": "attn.norm_q",
    "attention/key_norm": "attn.norm_k",
    "attention/context_query_norm": "attn.norm_added_q",
    "attention/context_key_norm": "attn.norm_added_k",
}
_SINGLE_MAPS = {"fused_in": "attn.to_qkv_mlp_proj", "fused_out": "attn.to_out"}
_SINGLE_NORMS = {"query_norm": "attn.norm_q", "key_norm": "attn.norm_k"}


def transformer_rules(config: TransformerConfig) -> list[Rule]:
    """The table of the transformer, for `hf.rules.load_params` and `published_tensors`."""
    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", "dense") for ours, theirs in _ENDS.items()]
    for ours, theirs, count, maps, norms in (
        ("blocks", "transformer_blocks.{}", config.num_layers, _MAPS, _NORMS),
        ("single_blocks", "single_transformer_blocks.{}", config.num_single_layers, _SINGLE_MAPS, _SINGLE_NORMS),
    ):
        for names, leaf, layout in ((maps, "kernel", "dense"), (norms, "scale", "same")):
            rules += [
                Rule(f"{ours}/{name}/{leaf}", f"{theirs}.{published}.weight", layout, tuple(range(count)))
                for name, published in names.items()
                if count
            ]
    return rules


def vae_rules(config: VAEConfig) -> list[Rule]:
    """The table of the auto-encoder; its counter of batches (`BUFFERS`) is no parameter."""
    return [
        *autoencoder_rules(config.sizes),
        *affine("quant_conv", "quant_conv", "conv"),
        *affine("post_quant_conv", "post_quant_conv", "conv"),
        Rule("bn/mean", "bn.running_mean"),
        Rule("bn/variance", "bn.running_var"),
    ]
