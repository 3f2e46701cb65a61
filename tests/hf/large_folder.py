"""A model folder of 1 GB, and the program that reads it and prints how far its memory grew.

    python tests/hf/large_folder.py FOLDER

prints one JSON object: {"bytes", "largest", "growth", "wrong"}.
"""

import json
import os
import pathlib
import re
import sys
import zlib

import jax
import numpy as np

from uae_jax import sharding, trees
from uae_jax.hf.safetensors import write_tensors
from uae_jax.models.qwen2_5_vl import model, weights
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig, to_json

CONFIG = Qwen2_5VLConfig(
    vision=VisionConfig(depth=2, width=256, heads=4, mlp_width=512, out_width=1024, full_attention_blocks=(1,)),
    text=TextConfig(
        vocab_size=32000, width=1024, layers=12, heads=16, key_heads=4, mlp_width=5632, mrope_section=(8, 12, 12)
    ),
)


def published(rule, abstract):
    """Published names and arrays of one parameter; every number says where it belongs."""
    shape = abstract[rule.ours].shape
    shape = (
        rule.torch_shape
        or rule.to_theirs(np.broadcast_to(np.int8(0), shape if rule.layers is None else shape[1:])).shape
    )
    for source in rule.sources():
        rows, columns = (
            np.arange(shape[0], dtype=np.float32),
            np.arange(np.prod(shape[1:], dtype=int), dtype=np.float32),
        )
        yield (
            source,
            (np.add.outer(rows, columns / 8192) + np.float32(zlib.crc32(source.encode()) % 1024)).reshape(shape),
        )


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder, in several files."""
    abstract = trees.flatten(model.abstract_params(CONFIG))
    tensors = (pair for rule in weights.rules(CONFIG, projector=False) for pair in published(rule, abstract))
    files = write_tensors(folder, tensors, max_shard_bytes=3 * 10**8)
    (folder / "config.json").write_text(json.dumps(to_json(CONFIG)))
    return files


def environment() -> dict[str, str]:
    """Of the program: four faked devices, and the package on the path."""
    return os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status).group(1))


def wrong_leaves(params, abstract) -> list[str]:
    """Parameters of which a device holds other numbers than were written."""
    leaves, wrong = trees.flatten(params), []
    for rule in weights.rules(CONFIG, projector=False):
        for shard in leaves[rule.ours].addressable_shards:
            held = np.asarray(shard.data)
            for layer, (_, tensor) in enumerate(published(rule, abstract)):
                index = shard.index if rule.layers is None else shard.index[1:]
                first = 0 if rule.layers is None else layer - (shard.index[0].start or 0)
                if rule.layers is not None and not 0 <= first < len(held):
                    continue
                if not np.array_equal(held if rule.layers is None else held[first], rule.to_ours(tensor)[index]):
                    wrong.append(rule.ours)
    return wrong


def main(folder: str) -> None:
    """Reads the folder onto four devices."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=2))
    abstract = trees.flatten(model.abstract_params(CONFIG))
    jax.block_until_ready(
        jax.device_put(np.zeros(8), jax.devices()[-1])
    )  # what the backend itself needs is not the loader's
    before = memory("VmRSS")
    _, params = weights.load(folder, dtype=np.float32, placement=lambda tree: sharding.tree_shardings(tree, mesh))
    growth = memory("VmHWM") - before
    sizes = [sum(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in trees.flatten(params).values()]
    print(
        json.dumps(
            {"bytes": sum(sizes), "largest": max(sizes), "growth": growth, "wrong": wrong_leaves(params, abstract)}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
