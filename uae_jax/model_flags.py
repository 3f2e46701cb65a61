"""The flags of the commands that load a model, and the model that they describe."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uae_jax.api import Model

# fields of stages.inference.InferenceConfig
SETTINGS = {
    "seed": (int, "of captions and noise"),
    "steps": (int, "denoising steps"),
    "guidance_scale": (float, "1 is without guidance"),
    "size": (int, "side of the drawings in pixels"),
    "temperature": (float, "of captions; 0 is greedy"),
    "top_p": (float, "share of the probability that captions are drawn from"),
    "max_new_tokens": (int, "longest caption"),
    "prompt": (str, "what the captioner is asked"),
    "negative_prompt": (str, "what guidance moves away from"),
    "batch_size": (int, "pictures in one compiled call"),
    "shift": (float, "static shift of the noise levels"),
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint, the settings of inference, and how the folder is read."""
    model = parser.add_argument_group(
        "model",
        "Settings that are not given are the run's own, or the release's: 1024 pixels, 40 steps, guidance 5,\n"
        "temperature 0.7, top_p 1, seed 42.",
    )
    model.add_argument(
        "--checkpoint", default="", help="official UAE folder or training workdir (default: the built-in model)"
    )
    for name, (kind, text) in SETTINGS.items():
        model.add_argument(f"--{name}", type=kind, help=text)
    model.add_argument(
        "--policy_condition",
        action="store_true",
        default=None,
        help="encode captions through the captioner's adapter (default: as the run was trained; yes for the "
        "release's own folder)",
    )
    model.add_argument(
        "--no_policy_condition",
        action="store_false",
        dest="policy_condition",
        default=None,
        help="encode captions without the captioner's adapter",
    )
    model.add_argument(
        "--without_adapters",
        action="store_true",
        help="leave out llm_lora, dit_lora, and an llm beside its llm_reference: the model before they were trained",
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of activations")


def load_model(options: argparse.Namespace, inputs: int | None = None) -> "Model":
    """The model of parsed flags; the settings that are not given suit the folder.

    Args:
      options: with the flags of `add_model_flags`.
      inputs: how many there will be, if known: a batch that was not asked for is not larger.

    Raises:
      ValueError, FileNotFoundError: see `api.load`.
    """
    from uae_jax import api  # seconds of imports, which `--help` does not need

    given: dict[str, Any] = {name: getattr(options, name) for name in (*SETTINGS, "policy_condition")}
    settings = {name: value for name, value in given.items() if value is not None}
    if inputs is not None and "batch_size" not in settings:
        settings["batch_size"] = min(api.default_settings(options.checkpoint).get("batch_size", 1), inputs)
    return api.load(options.checkpoint, dtype=options.dtype, adapters=not options.without_adapters, **settings)
