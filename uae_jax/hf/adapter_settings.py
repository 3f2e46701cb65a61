"""Settings of low-rank adapters in peft's `adapter_config.json` and diffusers' header, by what is understood."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from uae_jax.files.known_fields import shown, unknown_fields
from uae_jax.hf.safetensors import Tensors, metadata

HEADER = "lora_adapter_metadata"  # key of diffusers' settings in the safetensors header
DIFFUSERS_PREFIX = "transformer."
# peft's settings that are read here, that only chose the modules or the training, or that say where the adapter is from
UNDERSTOOD = frozenset(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r rank_pattern
    lora_alpha use_rslora target_modules exclude_modules layers_to_transform layers_pattern lora_dropout megatron_core
    qalora_group_size runtime_config ensure_weight_tying eva_config alpha_pattern bias init_lora_weights
    """.split()
)
# these begin with other factors; all others, such as pissa and olora, also move the base model's weights
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_settings(folder: Tensors) -> dict[str, Any]:
    """The adapter's settings from peft's `adapter_config.json` or diffusers' header; empty without both.

    Raises:
      ValueError: not JSON, or a kind of adapter other than plain LoRA; the message has the field.
    """
    file = (folder.path if folder.path.is_dir() else folder.path.parent) / "adapter_config.json"
    text: bytes | str | None = file.read_bytes() if file.exists() else None
    if text is None:
        file = sorted(set(folder.files.values()))[0]
        text = metadata(file).get(HEADER)
    try:
        stored = {} if text is None else json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except ValueError as error:
        raise ValueError(f"{file}: the adapter's settings are not JSON ({error}); copy it again") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: the adapter's settings are not a JSON object; copy it again")
    # the header of diffusers may hold settings of the text encoders' adapters too, under their names
    settings = {
        short: value for name, value in stored.items() if "." not in (short := str(name).removeprefix(DIFFUSERS_PREFIX))
    }
    _check_settings(file, settings)
    return settings


def _check_settings(file: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Refuses what is not a plain LoRA adapter, by an allow-list: a setting of a later peft is not passed over."""
    start = settings.get("init_lora_weights")
    if not any(start is plain or isinstance(start, str) and start == plain for plain in PLAIN_STARTS):
        raise ValueError(
            f"{file}: init_lora_weights={start!r} is not supported: it moves the base model's weights, which are not "
            "in this folder; save the adapter again with path_initial_model_for_weight_conversion, as peft describes"
        )
    wrong = [name for name, _ in unknown_fields(settings, UNDERSTOOD)]
    wrong += [
        name
        for name, plain in (("peft_type", "LORA"), ("bias", "none"))
        if settings.get(name, plain) not in (plain, None)
    ]
    alphas = settings.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or any(alpha != settings.get("lora_alpha") for alpha in alphas.values()):
        wrong.append("alpha_pattern")
    if wrong:
        raise ValueError(
            f"{file}: {shown(wrong[0], settings[wrong[0]])} is not supported; only plain LoRA adapters are"
        )
    targets = settings.get("target_modules")
    listed = isinstance(targets, list | tuple) and all(isinstance(target, str) for target in targets)
    if targets is not None and not isinstance(targets, str) and not listed:
        raise ValueError(f"{file}: {shown('target_modules', targets)} is no list of modules; copy it again")
    alpha = settings.get("lora_alpha", 1)
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf
    ):
        raise ValueError(f"{file}: lora_alpha={alpha!r} is not a positive number; copy it again")
