"""Random weights made on the device in the precision in which a stage holds them, and random batches."""

import functools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from configs import presets
from uae_jax import trees
from uae_jax.data import tokenizer as tokens
from uae_jax.data.qwen_inputs import prompt_fields
from uae_jax.diffusion.schedule import ScheduleConfig
from uae_jax.methods.trained import stored
from uae_jax.models.sd3.config import TransformerConfig
from uae_jax.models.sd3.transformer import position_table
from uae_jax.planning.system import AbstractSystem, abstract_system
from uae_jax.rollouts import frozen_inputs
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import System

BLOCK = 2**22  # numbers that are drawn at once: a generator needs several times their room
TOGETHER = 2**28  # numbers of the leaves that share one draw; a larger leaf has its own
POSITIONS = "pos_embed/table"
DISTINCT = 8  # rows of a batch; the others repeat them


def deviation(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a leaf's random numbers; 0 where its initial value is a constant (`constant`).

    Kernels have 1 / sqrt(fan-in), adapters those of `nn.lora.init_lora`, tables and tokens 0.02, as in the models' own
    initialisers, so that nothing overflows.
    """
    last = name.rpartition("/")[2]
    if name.endswith(POSITIONS) or last in ("bias", "b", "mask_token") or last.startswith("scale"):
        return 0.0
    if last == "kernel":
        return math.prod(shape[:-1] if len(shape) == 4 else shape[-2:-1]) ** -0.5
    return {"a": 1 / shape[-1], "pooled": 1.0}.get(last, 0.02)


def constant(name: str, shape: tuple[int, ...], transformer: TransformerConfig) -> Array:
    """A leaf without random numbers: the decoder's position table, a norm's scale of one, or zeros."""
    if name.endswith(POSITIONS):
        return position_table(transformer)
    return jnp.full(shape, float(name.rpartition("/")[2].startswith("scale")))


def random_parts(shapes: Mapping[str, Any], transformer: TransformerConfig, seed: int = 0) -> dict:
    """Parts of a model, made on the device one after the other.

    Args:
      shapes: part by name, trees of `jax.ShapeDtypeStruct`; their shardings are kept where they have one.
      transformer: sizes of the decoder, for its position table.
      seed: of all numbers.

    Returns:
      Arrays of these shapes, in the order of `shapes`.
    """
    key, made = jax.random.key(seed), {}
    # the largest comes first: what its generator needs beside it then lies where later parts will
    for name in sorted(shapes, key=lambda part: -_bytes(shapes[part])):
        tree = {name: shapes[name]}
        at = jax.tree.map(lambda leaf: leaf.sharding, tree)
        whole = len(jax.tree.leaves(at)) == len(jax.tree.leaves(tree))
        make = jax.jit(functools.partial(_random_tree, tree, transformer), out_shardings=at if whole else None)
        made |= jax.block_until_ready(make(trees.name_key(key, name)))
    return {name: made[name] for name in shapes}


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _random_tree(tree: dict, transformer: TransformerConfig, key: Array) -> dict:
    leaves = trees.flatten(tree)
    scales = {name: deviation(name, leaf.shape) for name, leaf in leaves.items()}
    drawn = {name: leaf for name, leaf in leaves.items() if scales[name]}
    found = {}
    for name in leaves.keys() - drawn.keys():
        found[name] = constant(name, leaves[name].shape, transformer).astype(leaves[name].dtype)
    for number, group in enumerate(_groups({name: math.prod(leaf.shape) for name, leaf in drawn.items()})):
        dtype = jnp.result_type(*(drawn[name].dtype for name in group))
        noise, at = _noise(jax.random.fold_in(key, number), sum(group.values()), dtype), 0
        for name, size in group.items():
            leaf = drawn[name]
            found[name] = (scales[name] * noise[at : at + size].reshape(leaf.shape)).astype(leaf.dtype)
            at += size
    return jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in leaves])


def _groups(sizes: Mapping[str, int]) -> Iterable[dict[str, int]]:
    """Leaves that share one draw: few draws are compiled faster than one a leaf."""
    group: dict[str, int] = {}
    for name, size in sizes.items():
        if group and sum(group.values()) + size > TOGETHER:
            yield group
            group = {}
        group[name] = size
    if group:
        yield group


def _noise(key: Array, count: int, dtype: Any) -> Array:
    """Unit normal numbers `[n]`, n at least `count`, a block at a time."""
    size = min(count, BLOCK)
    keys = jax.random.split(key, -(-count // size))
    return jax.lax.map(lambda block: jax.random.normal(block, (size,), jnp.float32).astype(dtype), keys).reshape(-1)


def random_batch(system: AbstractSystem, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the data loader makes it, of random pixels, prompts without padding and captions of full length.

    Args:
      system: for ids, sizes and the image processor.
      rows: B.
      seed: of pictures and texts.

    Raises:
      ValueError: fields differ from those that the loader's shapes promise.
    """
    rng = np.random.default_rng(seed)
    fields = [_row(system, rng) for _ in range(min(rows, DISTINCT))]
    batch = {name: np.stack([fields[index % len(fields)][name] for index in range(rows)]) for name in fields[0]}
    batch["sample_id"] = np.arange(rows, dtype=np.int32)
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    computed = {name for names in frozen_inputs.FIELDS.values() for name in names}  # by the step itself
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in system.batch(rows).items() if name not in computed}
    if found != wanted:
        raise ValueError(f"a batch has the fields {wanted}, not {found}")
    return batch


def _row(system: AbstractSystem, rng: np.random.Generator) -> dict[str, np.ndarray]:
    captioner, spec = system.model.captioner, system.spec
    picture = rng.integers(0, 256, (spec.image_size, spec.image_size, 3), np.uint8)
    patches, grid = system.processor(picture)
    inside = [captioner.image_token_id] * system.processor.image_tokens(grid)
    image = [captioner.vision_start_token_id, *inside, captioner.vision_end_token_id]
    words = rng.choice(plain_ids(system), spec.max_prompt - len(image)).tolist()
    ids = words[: len(words) // 2] + image + words[len(words) // 2 :]
    caption = rng.choice(plain_ids(system), spec.max_caption)
    caption[-1] = system.stops[0]
    return {
        "pixels": picture,
        "caption_ids": caption,
        "caption_mask": np.ones(spec.max_caption, bool),
        "caption_truncated": np.bool_(False),
        **prompt_fields(
            ids, [(patches, grid)], system.processor, captioner.image_token_id, spec.max_patches, spec.max_prompt
        ),
    }


def plain_ids(system: AbstractSystem | System) -> np.ndarray:
    """Token ids, int32, that neither end a text nor stand for a picture."""
    captioner = system.model.captioner
    special = {
        *system.stops,
        captioner.image_token_id,
        captioner.video_token_id,
        captioner.vision_start_token_id,
        captioner.vision_end_token_id,
        captioner.pad_token_id,
    }
    return np.array(sorted(set(range(captioner.text.vocab_size)) - special), np.int32)


def random_system(folder: pathlib.Path, image_size: int, dtype: str) -> System:
    """A system of a folder that has configs alone (`mini_checkpoint.write_configs`), with random weights.

    Args:
      folder: in the official layout.
      image_size: side of the pictures in pixels.
      dtype: of activations, and of the weights that are stored in it (`methods.trained.stored`).
    """
    settings = presets.preset("mini", ()).to_dict()
    settings["model"] |= dict(folder=str(folder), dtype=dtype)
    settings["data"] |= dict(image_size=image_size, max_prompt=0, negative_prompt="")
    described = abstract_system(frozen(RunConfig, settings))
    shapes = jax.eval_shape(lambda parts: stored(parts, (), dtype), described.parts)
    return System(
        folder=folder,
        model=described.model,
        parts=random_parts(shapes, described.model.transformer),
        tokenizer=tokens.load_tokenizer(folder / "llm_processor"),
        processor=described.processor,
        stops=described.stops,
        schedule=ScheduleConfig.from_folder(folder / "SD3"),
        encoders=described.encoders,
    )
