"""Which published tensor is which parameter of Z-Image's transformer, in the names of diffusers."""

from uae_jax.hf.rules import Rule
from uae_jax.models.autoencoder.tables import affine
from uae_jax.models.z_image.config import TransformerConfig

_AFFINE = {
    "patch_embed": "all_x_embedder.2-1",
    "norm_out": "all_final_layer.2-1.adaLN_modulation.1",
    "proj_out": "all_final_layer.2-1.linear",
    "timestep_embedder_1": "t_embedder.mlp.0",
    "timestep_embedder_2": "t_embedder.mlp.2",
    "context_embedder": "cap_embedder.1",
}
_MAPS = {
    "attention/query": "attention.to_q",
    "attention/key": "attention.to_k",
    "attention/value": "attention.to_v",
    "attention/output": "attention.to_out.0",
    "mlp/gate": "feed_forward.w1",
    "mlp/up": "feed_forward.w3",
    "mlp/down": "feed_forward.w2",
}
_NORMS = {
    "attention/query_norm": "attention.norm_q",
    "attention/key_norm": "attention.norm_k",
    "attention_norm": "attention_norm1",
    "attention_output_norm": "attention_norm2",
    "mlp_norm": "ffn_norm1",
    "mlp_output_norm": "ffn_norm2",
}


def transformer_rules(config: TransformerConfig) -> list[Rule]:
    """The table of the transformer, for `hf.rules.load_params` and `published_tensors`."""
    rules = [
        Rule("image_pad", "x_pad_token"),
        Rule("context_pad", "cap_pad_token"),
        Rule("context_norm/scale", "cap_embedder.0.weight"),
    ]
    for ours, theirs in _AFFINE.items():
        rules += affine(ours, theirs, "dense")
    for name, count, modulated in (
        ("layers", config.n_layers, True),
        ("noise_refiner", config.n_refiner_layers, True),
        ("context_refiner", config.n_refiner_layers, False),
    ):
        layers = tuple(range(count))
        for ours, theirs in _MAPS.items():
            rules.append(Rule(f"{name}/{ours}/kernel", f"{name}.{{}}.{theirs}.weight", "dense", layers))
        for ours, theirs in _NORMS.items():
            rules.append(Rule(f"{name}/{ours}/scale", f"{name}.{{}}.{theirs}.weight", layers=layers))
        if modulated:
            rules += affine(f"{name}/modulation", f"{name}.{{}}.adaLN_modulation.0", "dense", layers)
    return rules
