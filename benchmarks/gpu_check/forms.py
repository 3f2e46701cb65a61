"""Whether the forms of attention agree in bfloat16: greedy captions, hidden states, the denoiser and its gradient."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu_check.random_model import plain_ids, random_batch, random_parts
from benchmarks.gpu_check.steps import check_config
from uae_jax.methods.trained import stored
from uae_jax.models import condition, uae
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.nn.attention import use_attention
from uae_jax.planning.system import AbstractSystem, abstract_system
from uae_jax.rollouts.reconstruction import sample_keys

EXACT = "float32 plain"
PARTS = ("vision", "language", "projector", "transformer", "pooled")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Images B, greedy tokens and tokens of a caption T that is read."""

    images: int
    greedy: int
    caption: int


SIZES = {"full": Sizes(2, 64, 256), "small": Sizes(2, 8, 24)}


class Inputs(NamedTuple):
    """A `batch` of images, captions `tokens [B, T]`, `lengths [B]`, `latents`, a `cotangent` of them, `sigma [B]`."""

    batch: dict
    tokens: Array
    lengths: Array
    latents: Array
    cotangent: Array
    sigma: Array


class Results(NamedTuple):
    """Float32 hidden states `[B, T, D]` of captions, velocity and gradient `[B, h, w, C]`, and the prompts."""

    hidden: Array
    velocity: Array
    gradient: Array
    prefix: lm.Prefix


def forms() -> tuple[str, ...]:
    """The forms that this process's device has."""
    return ("plain", "by_query_blocks", "cudnn" if jax.default_backend() == "gpu" else "by_head")


def make_inputs(system: AbstractSystem, sizes: Sizes, seed: int = 0) -> Inputs:
    """Random inputs; the captions differ in length, so that masks matter."""
    rng = np.random.default_rng(seed)
    batch = {name: jnp.asarray(array) for name, array in random_batch(system, sizes.images, seed).items()}
    lengths = np.linspace(sizes.caption // 2, sizes.caption, sizes.images).astype(np.int32)
    shape = (sizes.images, *system.model.latent_shape)
    latents, cotangent = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    return Inputs(
        batch,
        jnp.asarray(rng.choice(plain_ids(system), (sizes.images, sizes.caption))),
        jnp.asarray(lengths),
        latents,
        cotangent,
        jnp.linspace(0.2, 0.9, sizes.images),
    )


def compute(model: uae.UAE, parts: Mapping, inputs: Inputs) -> Results:
    """Captioner and denoiser, with the form of attention that is in use."""
    captioner, mask = model.captioner, jnp.arange(inputs.tokens.shape[1])[None] < inputs.lengths[:, None]
    prefix = qwen.prompt_prefix(captioner, parts, None, inputs.batch)
    hidden = lm.completion_hidden_states(captioner, parts, None, prefix, inputs.tokens, mask)
    context = condition.encode_captions(captioner, parts, None, model.template, inputs.tokens, inputs.lengths)

    def weighted(latents: Array) -> tuple[Array, Array]:
        velocity = uae.velocity(model, parts, latents, inputs.sigma, context)
        return jnp.sum(velocity * inputs.cotangent), velocity

    (_, velocity), gradient = jax.value_and_grad(weighted, has_aux=True)(inputs.latents)
    return Results(jnp.where(mask[..., None], hidden, 0).astype(jnp.float32), velocity, gradient, prefix)


def write(model: uae.UAE, tokens: int, parts: Mapping, prefix: lm.Prefix, ids: Array) -> Array:
    """Greedy captions `[B, T]`. One query attends by the plain formula on every device, as `choose` has it."""
    keys, sampling = sample_keys(jax.random.key(0), ids), SamplingConfig(temperature=0.0)
    with use_attention("plain"):
        return generate(
            model.captioner, parts, None, prefix, keys, max_new_tokens=tokens, stop_ids=(), sampling=sampling
        ).tokens


def in_precision(model: uae.UAE, dtype: str) -> uae.UAE:
    """The model with activations in a precision."""
    captioner = model.captioner.using(dtype=dtype, remat="full", lora_alpha=64.0)
    transformer = dataclasses.replace(model.transformer, dtype=dtype, remat="full")
    decoder = dataclasses.replace(model.decoder, captioner=captioner, transformer=transformer)
    return dataclasses.replace(model, captioner=captioner, decoder=decoder)


def run(size: str, report: Callable[[dict], None]) -> None:
    """Computes with each form, and with the plain one in float32 (same weights), and compares all with the plain form.

    Raises:
      RuntimeError: a form failed, or gave numbers that are not finite; the others are compared all the same.
    """
    config, sizes = check_config(size), SIZES[size]
    system = abstract_system(config)
    shapes = jax.eval_shape(lambda parts: stored(parts, (), "bfloat16"), {name: system.parts[name] for name in PARTS})
    parts, inputs = random_parts(shapes, system.model.transformer), make_inputs(system, sizes)
    figures: dict[str, Any] = {
        "preset": config.preset,
        "forms": [*forms(), EXACT],
        "greedy_tokens": sizes.images * sizes.greedy,
        "errors": {},
    }
    found: dict[str, dict[str, np.ndarray]] = {}
    half = in_precision(system.model, "bfloat16")
    writer = jax.jit(functools.partial(write, half, sizes.greedy))
    for form in figures["forms"]:
        try:
            found[form] = _results(form, system.model, writer, sizes, parts, inputs)
        except Exception as error:  # whatever a kernel's library raises: the other forms go on
            figures["errors"][form] = f"{type(error).__name__}: {error}"[:600]
        if "plain" in found:
            others = [name for name in found if name != "plain"]
            figures["against_plain"] = {name: compared(found[name], found["plain"]) for name in others}
        report(figures)
    if figures["errors"]:
        raise RuntimeError(f"attention failed: {figures['errors']}")


def _results(
    form: str, model: uae.UAE, writer: Callable, sizes: Sizes, parts: dict, inputs: Inputs
) -> dict[str, np.ndarray]:
    """Arrays by name, on the host."""
    exact = form == EXACT
    described = in_precision(model, "float32" if exact else "bfloat16")
    attention, precision = ("plain", "highest") if exact else (form, None)
    with use_attention(attention), jax.default_matmul_precision(precision) if exact else contextlib.nullcontext():
        results = jax.jit(functools.partial(compute, described))(parts, inputs)
        writer = jax.jit(functools.partial(write, described, sizes.greedy)) if exact else writer
        tokens = writer(parts, results.prefix, inputs.batch["sample_id"])
    arrays = {name: np.asarray(getattr(results, name)) for name in Results._fields[:-1]}
    arrays["tokens"] = np.asarray(tokens)
    wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise FloatingPointError(f"{', '.join(wrong)} not finite")
    return arrays


def compared(found: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far results are from those of the plain form.

    Returns:
      `equal_tokens`, the share of equal greedy tokens; `equal_first`, that of each caption's first half, since one
      rounding that tips a token changes all that follow; for the other arrays the largest difference over the largest
      value, and `NAME_rms`, the root mean square of the differences over that of the values.
    """
    equal = found["tokens"] == plain["tokens"]
    distances = {"equal_tokens": float(equal.mean()), "equal_first": float(equal[:, : -(-equal.shape[1] // 2)].mean())}
    for name in Results._fields[:-1]:
        gap = found[name].astype(np.float64) - plain[name]
        distances[name] = float(np.abs(gap).max() / np.abs(plain[name]).max())
        distances[f"{name}_rms"] = float(np.sqrt(np.mean(gap**2) / np.mean(plain[name].astype(np.float64) ** 2)))
    return distances
