"""The `config.json` of Janus-Pro's official release in the layout of transformers."""

from collections.abc import Mapping
from typing import Any

from uae_jax.files.known_fields import WITHOUT_EFFECT, check_kinds, only, refuse_unknown, without_none

HF = "janus"  # model_type of transformers' layout
VISION_WIDTH = 1024  # of the image tower, which the official file names and does not size
FIELDS = ("input_dim", "n_embed", "image_token_embed", "image_token_size")
_MLP = ("MlpProjector", {"projector_type": "mlp_gelu", "depth": 2})
# classes of the official file, and the values of their parameters that name sizes which the file does not hold
_CLASSES = {
    "vision_config": (
        "CLIPVisionTower",
        {"model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1, "image_size": 384},
    ),
    "aligner_config": _MLP,
    "gen_aligner_config": _MLP,
    "gen_head_config": ("vision_head", {}),
    "gen_vision_config": ("VQ-16", {}),
}


def as_hf(data: Mapping[str, Any]) -> dict[str, Any]:
    """The official `config.json` in transformers' layout."""
    refuse_unknown(data, WITHOUT_EFFECT | {*_CLASSES, "language_config", "tie_word_embeddings"})
    params = {name: _params(data, name, *known) for name, known in _CLASSES.items()}
    kinds: dict[str, Any] = dict.fromkeys(FIELDS, int)
    for name, section in params.items():
        check_kinds(section, kinds, f"{name}.params.")
    aligner, draws = params["aligner_config"], params["gen_vision_config"]
    head, draw_aligner = params["gen_head_config"], params["gen_aligner_config"]
    for name, value, wanted in (
        ("aligner_config.params.input_dim", aligner.get("input_dim"), VISION_WIDTH),
        ("gen_aligner_config.params.input_dim", draw_aligner.get("input_dim"), draws.get("n_embed")),
        ("gen_head_config.params.image_token_size", head.get("image_token_size"), draws.get("image_token_size")),
        ("gen_head_config.params.n_embed", head.get("n_embed"), head.get("image_token_embed")),
    ):
        if value != wanted:
            raise ValueError(f"{name} is {value}, and the rest of the file asks for {wanted}")
    return {
        "model_type": HF,
        "text_config": data.get("language_config") or {},
        "vision_config": {"projection_dim": aligner.get("n_embed")},
        "vq_config": {
            "embed_dim": draws.get("n_embed"),
            "num_embeddings": draws.get("image_token_size"),
            "projection_dim": draw_aligner.get("n_embed"),
            "image_token_embed_dim": head.get("image_token_embed"),
        },
        "tie_word_embeddings": data.get("tie_word_embeddings"),
    }


def _params(data: Mapping[str, Any], name: str, kind: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of one part of the official file, which names a class that is known."""
    section = without_none(data.get(name) or {}, name)
    only(section, "cls", (kind,))
    params = without_none(section.get("params") or {}, f"{name}.params")
    for field, value in fixed.items():
        only(params, field, (value,))
    known = {*fixed, *FIELDS}
    refuse_unknown(params, known, what=f"{name}.params.")
    return params
