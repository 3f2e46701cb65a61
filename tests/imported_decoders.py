"""Tiny model folders of the small captioner and a decoder with its own text encoder."""

import functools
import pathlib

import flux2_pieces
import qwen_image_pieces
import z_image_pieces

from uae_jax import convert
from uae_jax.data.tokenizer import load_tokenizer

WRITERS = {
    "klein": functools.partial(flux2_pieces.write_pipeline, distilled=True),
    "klein_base": flux2_pieces.write_pipeline,
    "z_image": z_image_pieces.write_pipeline,
    "qwen_image": qwen_image_pieces.write_pipeline,
}
# the words of the small model's tokenizer are fewer than the tokens that Qwen-Image drops of its published template
DROPPED = 20


def joined(model_folder: pathlib.Path, pipeline: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The model folder that `convert import` makes of the small captioner and a pipeline."""
    sources = dict(captioner=model_folder / "llm", llm_processor=model_folder / "llm_processor", decoder=pipeline)
    sources |= dict(clip=model_folder / "clip", dinov2=model_folder / "dinov2")
    convert.main(["import", *(f"--{flag}={path}" for flag, path in sources.items()), str(out)])
    return out


def imported(name: str, model_folder: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A pipeline of this kind, written into `folder` and imported there."""
    pipeline = folder / "pipeline"
    WRITERS[name](pipeline, load_tokenizer(model_folder / "llm_processor"), seed=7)
    return joined(model_folder, pipeline, folder / "model")
