"""Bytes of one device by formulas, where nothing is compiled.

Parameters, optimizer and batch are exact: they follow from shapes and sharding rules. Activations are those that a
rematerialised program keeps: the input of every layer of the part that is differentiated, the working set of one layer, and
the buffers of sampling and drawing. Numbers of copies in a working set are those of a pre-norm layer with a gated MLP.
"""

import dataclasses
import math
from typing import Any

import jax

from uae_jax import sharding, trees
from uae_jax.planning.compile import Memory, Program
from uae_jax.planning.roofline import MeshSizes
from uae_jax.stages.run_config import RunConfig

FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the formulas read of a model, for one device: widths, lengths and bytes of a number."""

    activation: int
    tensor: int
    text_width: int
    text_mlp: int
    text_layers: int
    cache: int
    vocabulary: int
    width: int
    layers: int
    tokens: int
    context: int
    pixels: int
    vae_width: int
    prompt: int


def _shapes(config: RunConfig, program: Program, sizes: MeshSizes, model: Any, caption: int) -> Shapes:
    text, decoder = model.captioner.text, model.transformer
    side = model.image_size // model.vae.downsampling // decoder.patch_size
    context = model.template.length(caption)
    return Shapes(
        activation=2 if config.model.dtype == "bfloat16" else 4, tensor=sizes.tensor, text_width=text.width, text_mlp=text.mlp_width,
        text_layers=text.layers, cache=2 * text.layers * text.key_heads * text.head_width, vocabulary=text.vocab_size,
        width=decoder.width, layers=decoder.num_layers, tokens=side**2 + context, context=context,
        pixels=model.image_size**2, vae_width=model.vae.block_out_channels[0], prompt=program.batch["prompt_ids"].shape[1])


def _transformer_layer(s: Shapes, rows: float) -> float:
    # input, norm, three projections, attention, output, and the inner width 4 D twice
    return rows * s.tokens * s.width * (7 + 8 / s.tensor) * s.activation


def _language_layer(s: Shapes, rows: float, length: int) -> float:
    return rows * length * (7 * s.text_width + 3 * s.text_mlp / s.tensor) * s.activation


def _pictures(s: Shapes, rows: float, kept: int) -> float:
    """`kept` float32 maps of the decoder's first width at full resolution; the last level begins with twice that width."""
    return rows * s.pixels * 2 * s.vae_width * FLOAT * kept


def _drawing(s: Shapes, rows: float, guidance: float, chunk: float) -> float:
    both = rows * (1 if guidance == 1 else 2)
    layer = _transformer_layer(s, both) + both * s.context * s.width * s.activation
    return max(layer, _pictures(s, min(chunk or rows, rows), 3)) + rows * s.pixels * 3 * FLOAT


def _writing(s: Shapes, rows: float, groups: float, length: int) -> float:
    cache = (rows * length + groups * s.prompt) * s.cache * s.activation
    return cache + rows * s.vocabulary * FLOAT * 3


def _gradient(shapes: Shapes, rows: float, *, language: bool, length: int) -> float:
    """Layer inputs that are kept, and one layer in the backward pass: its working set twice."""
    s = shapes
    if language:
        kept = rows * length * s.text_width * s.text_layers * s.activation
        # logits of 128 positions, their softmax and their gradient
        return kept + 2 * _language_layer(s, rows, length) + 3 * rows * min(128, length) * s.vocabulary * FLOAT
    return rows * s.tokens * s.width * s.layers * s.activation + 2 * _transformer_layer(s, rows)


def _stage_activations(stage: str, settings: Any, s: Shapes, rows: float, length: int, gathered: float) -> float:
    """The largest phase of a stage; `rows` pictures of a batch and `gathered` bytes of sampling weights on one device."""
    parts = settings.micro_batches * settings.updates_per_rollout
    small = max(rows / parts, 1)
    if stage == "pretrain":
        encode = _language_layer(s, small, s.context) + _pictures(s, small, 3)
        return max(encode, _gradient(s, small, language=False, length=length)) + rows * s.context * s.text_width * s.activation
    guided = 1 if settings.guidance_scale == 1 else 2
    if stage == "cold_start":
        steps = small * s.pixels / 64 * 16 * FLOAT * settings.sampler_steps
        return steps + max(_gradient(s, small * guided, language=False, length=length), _pictures(s, min(settings.vae_chunk or small, small), 12))
    chunk = settings.vae_chunk
    drawing = _drawing(s, rows * settings.group_size, settings.guidance_scale, chunk)
    if stage == "gen_for_und":
        writing = gathered + _writing(s, rows * settings.group_size, rows, length)
        return max(writing, drawing, _gradient(s, small * settings.group_size, language=True, length=length))
    window = 3 * settings.window * rows * settings.group_size * s.pixels / 64 * 16 * FLOAT
    gradient = _gradient(s, small * settings.group_size * guided, language=False, length=length)
    return window + max(gathered + _writing(s, rows, rows, length), drawing, gradient)


def _share(tree: Any, sizes: MeshSizes) -> float:
    """Bytes of one device's share of a tree by the sharding rules."""
    total = 0.0
    for name, leaf in trees.flatten(tree).items():
        cut = 1
        for axis in sharding.parameter_spec(name, tuple(leaf.shape), sizes):
            cut *= math.prod(sizes.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))
        total += math.prod(leaf.shape) * leaf.dtype.itemsize / cut
    return total


def estimate_memory(program: Program, config: RunConfig, sizes: MeshSizes, model: Any) -> Memory:
    """The memory of a stage on one device, without compiling.

    Args:
      program: the stage, without shardings.
      config: of the run.
      sizes: of the mesh.
      model: the description.
    """
    settings = program.config
    length = getattr(settings, "max_new_tokens", 0) or program.batch["caption_ids"].shape[1]
    shapes = _shapes(config, program, sizes, model, length)
    batch = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.batch)) / sizes.batch
    resident = _share(program.state, sizes) + _share(program.frozen, sizes) + batch
    gradients = 2 * _share(program.state.params, sizes)  # their sum, and those of a micro-batch
    layers = _largest_layer(program, sizes)
    rows, gathered = settings.batch_size / sizes.batch, 0.0
    if getattr(settings, "gather_weights", False) and sizes.fsdp > 1:
        gathered = trees.parameter_count(program.frozen["language"]) * shapes.activation / sizes.tensor
    entries = (
        (gradients, "float32", "gradients"), (layers, config.model.dtype, "gathered weights of two layers"),
        (_stage_activations(program.stage, settings, shapes, rows, length, gathered), config.model.dtype, "activations"))
    temporaries = sum(size for size, _, _ in entries)
    return Memory(resident, temporaries, resident + temporaries, tuple(sorted(entries, reverse=True)), estimated=True)


def _largest_layer(program: Program, sizes: MeshSizes) -> float:
    """Bytes of the gathered weights of two layers of the largest stack, in bfloat16; 0 where nothing is gathered."""
    if sizes.fsdp == 1:
        return 0.0
    stacks: dict[str, float] = {}
    for name, leaf in trees.flatten({**program.frozen, **program.state.params}).items():
        if len(leaf.shape) == 3:
            key = "/".join(name.split("/")[:2])
            stacks[key] = stacks.get(key, 0.0) + math.prod(leaf.shape[1:]) * 2 / sizes.tensor
    return 2 * max(stacks.values(), default=0.0)
