"""What inference costs as captions get longer, pictures larger, groups and batches wider.

    python -m benchmarks.inference_scaling [--checkpoint=DIR] [--repeats=3] [--json=FILE]

From one starting point each size is varied alone. Every case is one compiled program: its seconds, its seconds a row,
and its memory beside parameters, as the compiler reports it (`memory_analysis`), in all and a row. Without a checkpoint
it makes one of the preset `mini`'s size; --repeats=0 compiles only. One table; with --json one object a line. Pictures
that the decoder's position table has no room for are named and left out.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jax_side import open_system, picture_rows
from benchmarks.measure import time_call
from benchmarks.mini_checkpoint import write_checkpoint
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.rollouts.captioning import sample_captions
from uae_jax.rollouts.reconstruction import Denoising, draw
from uae_jax.stages.weights import System


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      kind: `captions` of pictures, or `pictures` of captions.
      image_size: side of the pictures read or drawn.
      tokens: of each caption; none ends earlier.
      group: captions or drawings of a picture.
      batch: pictures.
    """

    kind: str
    image_size: int = 256
    tokens: int = 64
    group: int = 1
    batch: int = 2

    @property
    def rows(self) -> int:
        """Captions or drawings."""
        return self.batch * self.group


VARIED = {
    "captions": {"tokens": (64, 128, 256, 512), "image_size": (128, 256, 512), "group": (1, 4, 16), "batch": (1, 2, 4)},
    "pictures": {"tokens": (64, 256), "image_size": (128, 256, 512), "group": (1, 4), "batch": (1, 2, 4)},
}


def cases() -> Iterator[Case]:
    """The starting point of each kind, and each size varied alone; no case twice."""
    for kind, sizes in VARIED.items():
        varied = [Case(kind)] + [
            dataclasses.replace(Case(kind), **{name: value}) for name, values in sizes.items() for value in values
        ]
        yield from dict.fromkeys(varied)


def largest_picture(system: System) -> int:
    """Side in pixels of the largest picture that the decoder can draw."""
    decoder = system.model.transformer
    return decoder.pos_embed_max_size * decoder.patch_size * system.model.vae.downsampling


def build(system: System, case: Case, steps: int, guidance_scale: float) -> tuple:
    """The jitted function of a case, and its arguments."""
    if case.kind == "captions":
        batch = {
            name: jnp.asarray(rows)
            for name, rows in picture_rows(system, case.image_size, case.batch, case.tokens + 1).items()
        }

        def captions(parts: dict, batch: dict) -> jax.Array:
            return sample_captions(
                system.model,
                parts,
                batch,
                jax.random.key(0),
                max_new_tokens=case.tokens,
                stops=(),
                sampling=SamplingConfig(0.7),
                group=case.group,
            ).tokens

        return jax.jit(captions), (system.parts, batch)
    model = dataclasses.replace(system.model, image_size=case.image_size)
    how = Denoising(tuple(system.schedule.sigmas(steps).tolist()), guidance_scale)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(100, 400, (case.rows, case.tokens)), jnp.int32)
    noise = jnp.asarray(rng.standard_normal((case.rows, *model.latent_shape), np.float32))
    lengths = jnp.full(case.rows, case.tokens, jnp.int32)
    return jax.jit(lambda parts, ids, noise: draw(model, parts, how, ids, lengths, noise)), (system.parts, ids, noise)


def measure(system: System, case: Case, *, steps: int, guidance_scale: float, repeats: int) -> dict:
    """Compiles a case and times it.

    Returns:
      The case's fields, `temporary_bytes`, and with repeats `seconds`, the median.
    """
    function, arguments = build(system, case, steps, guidance_scale)
    compiled = function.lower(*arguments).compile()
    found = dataclasses.asdict(case) | {"temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes)}
    if repeats:
        found["seconds"] = time_call(lambda: jax.block_until_ready(compiled(*arguments)), repeats)["seconds"]
    return found


def line(row: dict) -> str:
    """A line of the table."""
    count = row["batch"] * row["group"]
    seconds = row.get("seconds")
    times = (f"{seconds:.2f}", f"{1e3 * seconds / count:.0f}") if seconds is not None else ("", "")
    sizes = (f"{row['temporary_bytes'] / 1e6:.0f}", f"{row['temporary_bytes'] / count / 1e6:.1f}")
    return (
        "| "
        + " | ".join(
            [row["kind"], *(str(row[name]) for name in ("image_size", "tokens", "group", "batch")), *times, *sizes]
        )
        + " |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, help="folder in the official layout; made if it is not given"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each case; 0 compiles only")
    parser.add_argument("--steps", type=int, default=6, help="Euler steps of a drawing")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="of a drawing")
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a case")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.checkpoint or pathlib.Path(place)
        if options.checkpoint is None:
            write_checkpoint(folder)
        system = open_system(folder, Case("captions").image_size)
    largest = largest_picture(system)
    print(
        "| kind | side | tokens | group | batch | seconds | ms a row | temporary MB | MB a row |\n" + "|---" * 9 + "|"
    )
    with options.json.open("w") if options.json else contextlib.nullcontext() as lines:
        for case in cases():
            if case.kind == "pictures" and case.image_size > largest:
                print(
                    f"left out: pictures of {case.image_size}, as the decoder's position table ends at {largest}",
                    file=sys.stderr,
                )
                continue
            row = measure(
                system, case, steps=options.steps, guidance_scale=options.guidance_scale, repeats=options.repeats
            )
            print(line(row), flush=True)
            if lines:
                print(json.dumps(row), file=lines, flush=True)


if __name__ == "__main__":
    main()
