"""Flags of the commands that run a model, and what they were in words that can be compared later."""

import argparse
from typing import Any

import uae_jax
from uae_jax.api import Model
from uae_jax.evaluation.run_settings import weights_digest
from uae_jax.stages.weights import model_folder

SETTINGS = {
    "seed": (int, "of noise and answers"), "steps": (int, "denoising steps"), "guidance_scale": (float, "1 is without guidance"),
    "size": (int, "side of a picture in pixels"), "negative_prompt": (str, "what guidance moves away from"),
    "shift": (float, "static shift of the noise levels"), "temperature": (float, "of the answers; 0 is greedy"),
    "top_p": (float, "share of the probability that answers are drawn from"), "max_new_tokens": (int, "longest text"),
    "batch_size": (int, "pictures or questions in one compiled call")}
DRAWING = ("seed", "steps", "guidance_scale", "size", "negative_prompt", "shift", "max_new_tokens", "batch_size")
ANSWERING = ("seed", "temperature", "top_p", "max_new_tokens", "batch_size")
# settings that decide what is drawn or answered; the others only decide how fast
DECIDES_DRAWING = ("seed", "steps", "guidance_scale", "size", "negative_prompt", "shift", "schedule", "policy_condition")
DECIDES_ANSWERS = ("seed", "temperature", "top_p", "max_new_tokens")


def add_model_arguments(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """`--checkpoint`, precision, adapters, and the settings called `names`; a setting that is not given is the model's own."""
    parser.add_argument("--checkpoint", default="", help="official UAE folder or training workdir (default: the built-in model)")
    for name in names:
        kind, text = SETTINGS[name]
        parser.add_argument(f"--{name}", type=kind, help=text)
    if "steps" in names:
        parser.add_argument(
            "--policy_condition", action=argparse.BooleanOptionalAction,
            help="encode texts through the captioner's adapter (default: for the release's own folder)")
    parser.add_argument("--without_adapters", action="store_true", help="leave out llm_lora and dit_lora: the model before they were trained")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of activations")


def load_model(options: argparse.Namespace, **defaults: Any) -> Model:
    """The model of `add_model_arguments`; `defaults` are settings for flags that were not given."""
    given = {name: value for name in (*SETTINGS, "policy_condition") if (value := getattr(options, name, None)) is not None}
    return uae_jax.load(options.checkpoint, dtype=options.dtype, adapters=not options.without_adapters, **defaults | given)


def model_settings(options: argparse.Namespace, model: Model, names: tuple[str, ...]) -> dict[str, Any]:
    """What a result follows from: the weights and the settings called `names`, for `run_settings.begin`."""
    values = {name: getattr(model.settings, name) for name in names}
    return {
        "model": str(model_folder(options.checkpoint).resolve()), "weights": weights_digest(options.checkpoint),
        "dtype": options.dtype, "adapters": not options.without_adapters, **values}
