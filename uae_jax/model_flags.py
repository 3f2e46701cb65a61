"""Flags of the commands that load a model, and the loading itself."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from uae_jax.stages.inference_config import InferenceConfig

if TYPE_CHECKING:
    from uae_jax.api import Model

FIELDS = {field.name: field for field in dataclasses.fields(InferenceConfig)}
# the schedule is the folder's own, and the adapter has two flags
GIVEN = tuple(name for name in FIELDS if name not in ("schedule", "condition"))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint, the settings of inference, and how the folder is read."""
    model = parser.add_argument_group(
        "model",
        "Settings that are not given are the run's own, or the release's: 1024 pixels, 40 steps, guidance 5,\n"
        "temperature 0.7, top_p 1, seed 42.",
    )
    model.add_argument(
        "--checkpoint",
        default="",
        help="official UAE folder or its Hub id (OWNER/NAME), training workdir or Janus folder; start: the built-in "
        "model before its training; "
        "unified: the built-in unified model (default: the built-in trained model)",
    )
    for name in GIVEN:
        meaning = FIELDS[name].metadata["meaning"]
        unit = f" [{meaning.unit}]" if meaning.unit else ""
        kind = type(FIELDS[name].default)
        how: dict[str, Any] = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
        model.add_argument(f"--{name}", help=f"{meaning.text}{unit}", **how)
    model.add_argument(
        "--condition",
        choices=FIELDS["condition"].metadata["meaning"].choices,
        help="what the decoder reads: the caption alone, encoded by the reference or by the policy, or the caption's "
        "own states after the image (default: as the run was trained; policy for the release's own folder)",
    )
    model.add_argument(
        "--without_adapters",
        action="store_true",
        help="the model before training: without llm_lora, dit_lora, and an llm that has an llm_reference beside it",
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of activations")


def load_model(options: argparse.Namespace, inputs: int | None = None) -> "Model":
    """Loads the model of parsed flags; settings that are not given are the folder's own.

    Args:
      options: flags of `add_model_flags`.
      inputs: number of inputs, if known; it limits a batch size that was not given.

    Raises:
      ValueError, FileNotFoundError: see `api.load`.
    """
    from uae_jax import api  # seconds of imports, which `--help` does not need

    given: dict[str, Any] = {name: getattr(options, name) for name in (*GIVEN, "condition")}
    settings = {name: value for name, value in given.items() if value is not None}
    if inputs is not None and "batch_size" not in settings:
        settings["batch_size"] = min(api.default_settings(options.checkpoint).get("batch_size", 1), inputs)
    model = api.load(options.checkpoint, dtype=options.dtype, adapters=not options.without_adapters, **settings)
    if model.warning:
        print(f"note: {model.warning}; --checkpoint trained has all four stages behind it", file=sys.stderr)
    return model
