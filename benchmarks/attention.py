"""Times every form of attention side by side on this machine, forward and with its gradient.

    python -m benchmarks.attention --repeats=5

The sizes are those of the benchmark model: denoising tokens of 256x256 pictures with their captions, caption scoring,
image patches, and the auto-encoder's single wide head. The last column is the form that `nn.attention` picks here.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from uae_jax.nn.attention import IMPLEMENTATIONS, Mask
from uae_jax.nn.attention.cudnn import supported
from uae_jax.nn.attention.entry import choose
from uae_jax.nn.device import platform

REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls of each form, after one that compiles", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "precision of queries, keys and values")
# name: B, T, H, H', K, mask
CASES = {
    "denoising": (16, 352, 6, 6, 64, "valid"),
    "scoring": (8, 256, 16, 2, 64, "causal"),
    "short captions": (8, 96, 16, 2, 64, "causal"),
    "patches": (2, 1024, 6, 6, 64, "groups"),
    "auto-encoder": (2, 1024, 1, 1, 512, "all"),
}


def median_ms(function: Callable, *arguments) -> float:
    """Median milliseconds of the compiled function."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def make_mask(kind: str, batch: int, length: int) -> Mask:
    """The masks of the cases, with a tenth of the keys as padding."""
    valid = jnp.broadcast_to(jnp.arange(length) < length - length // 10, (batch, length))
    groups = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // 64, (batch, length))
    return {
        "all": Mask(),
        "valid": Mask(valid=valid, right_padded=True),
        "groups": Mask(groups=groups),
        "causal": Mask(valid=valid, causal=True, right_padded=True),
    }[kind]


def forms(query: jax.Array) -> list[str]:
    """The implementations that run on this device."""
    usable = {"splash": platform() == "tpu", "cudnn": platform() == "gpu" and supported(query)}
    return [name for name in IMPLEMENTATIONS if usable.get(name, True)]


def compare(name: str) -> None:
    """Prints a line for each form: milliseconds forward, and of the gradient with its forward pass."""
    batch, length, heads, key_heads, width, kind = CASES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, length, count, width) for count in (heads, key_heads, key_heads)]
    arrays = [jax.random.normal(key, shape, DTYPE.value) for key, shape in zip(keys, shapes)]
    mask = make_mask(kind, batch, length)
    for form in forms(arrays[0]):
        attend = IMPLEMENTATIONS[form]
        forward = jax.jit(attend)
        gradient = jax.jit(
            jax.grad(lambda q, k, v, m, attend=attend: attend(q, k, v, m).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        )
        picked = "*" if form == choose(platform(), arrays[0], length) else ""
        size = f"{batch} x {length} x {heads}/{key_heads} x {width}"
        print(
            f"| {name} | {size} | {form}{picked} | {median_ms(forward, *arrays, mask):.0f} | "
            f"{median_ms(gradient, *arrays, mask):.0f} |",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    """Prints one table; a star marks the form that is picked."""
    del arguments
    print("| case | B x T x H/H' x K | form | forward, ms | gradient, ms |\n|---|---|---|---|---|")
    for name in CASES:
        compare(name)


if __name__ == "__main__":
    app.run(main)
