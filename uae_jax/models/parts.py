"""Which of the model's parts are the captioner's and the transformer's weights: as trained, or as the reference."""

from collections.abc import Mapping
from typing import Any

Parts = Mapping[str, Any]
CAPTIONER = ("vision", "language", "projector")


def captioner_weights(parts: Parts, *, policy: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parameters of the captioner, those of `CAPTIONER` that there are, and its adapter.

    Args:
      parts: the model's dictionary.
      policy: the trained captioner, or the reference (adapter off), which is also UAE's text encoder.
    """
    params = {name: parts[name] for name in CAPTIONER if name in parts}
    if not policy:
        return params, None
    if "language_policy" in parts:
        return params | {"language": parts["language_policy"]}, None
    return params, parts.get("language_lora")


def transformer_weights(parts: Parts, *, policy: bool) -> dict[str, Any]:
    """Flax variables of the transformer: the trained one, or the reference (adapter off)."""
    if not policy:
        return {"params": parts["transformer"]}
    if "transformer_policy" in parts:
        return {"params": parts["transformer_policy"]}
    variables = {"params": parts["transformer"]}
    return variables | {"lora": parts["transformer_lora"]} if "transformer_lora" in parts else variables
