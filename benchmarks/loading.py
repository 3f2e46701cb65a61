"""Seconds and memory of reading a model folder: here, and by `from_pretrained` of transformers and diffusers.

    python -m benchmarks.loading --checkpoint=DIR [--dtype=bfloat16] [--json=FILE]
    python -m benchmarks.loading --make-gb=1 [--dtype=bfloat16] [--json=FILE]

The second makes a folder of random weights in the real layout, of that many GB, in a temporary folder. Each part, and
all parts one after the other, is read by each side in a process of its own, in one precision, from files that were read
before (so from the page cache). The row `load_system` is what a run reads, with tokenizer, adapters and the vector of
the empty prompt, beside all parts of the other side; captioner and transformer are in the precision, the rest in
float32. Memory is how far the process grew at most while reading, libraries not counted; seconds are of the clock and
of the processor. One table; with --json one object a row.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from uae_jax import sharding, trees
from uae_jax.hf.rules import Rule
from uae_jax.hf.safetensors import write_tensors
from uae_jax.methods.trained import STORABLE
from uae_jax.models.encoders import clip
from uae_jax.models.encoders import weights as encoder_weights
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import transformer, vae
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.stages.weights import PRECISIONS, ModelConfig, load_system

# part of the folder: its class in diffusers or transformers
PARTS = {
    "llm": "transformers.Qwen2_5_VLForConditionalGeneration",
    "dit": "diffusers.SD3Transformer2DModel",
    "SD3/vae": "diffusers.AutoencoderKL",
    "SD3/text_encoder": "transformers.CLIPTextModelWithProjection",
    "SD3/text_encoder_2": "transformers.CLIPTextModelWithProjection",
    "clip": "transformers.CLIPModel",
    "dinov2": "transformers.Dinov2Model",
    "dinov3": "transformers.DINOv3ViTModel",
}
SIDES = ("uae_jax", "from_pretrained")
SYSTEM = "load_system"


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far (Linux)."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))


def read_here(folder: pathlib.Path, part: str, dtype: str) -> Any:
    """One part onto the devices, or all that a run reads."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    placement = dict(placement=lambda tree: sharding.tree_shardings(tree, mesh))
    if part == SYSTEM:
        config = ModelConfig(folder=str(folder), frozen_dtype=dtype)
        return load_system(config, image_size=256, mesh=mesh, frozen=STORABLE)
    if part == "llm":
        return qwen_weights.load(folder / part, dtype=dtype, **placement)
    if part == "dit":
        return sd3_weights.load_transformer(folder / part, params_dtype=dtype, **placement)
    if part == "SD3/vae":
        return sd3_weights.load_vae(folder / part, **placement)
    load = encoder_weights.load_dino if part.startswith("dino") else encoder_weights.load_clip
    return load(folder / part, dtype=dtype, **placement)


def read_there(folder: pathlib.Path, part: str, dtype: str) -> Any:
    """One part by `from_pretrained`, until each of its numbers has been read (files may stay mapped until then)."""
    import importlib

    import torch

    library, name = PARTS[part].split(".")
    kind = getattr(importlib.import_module(library), name)
    model = kind.from_pretrained(folder / part, torch_dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.sum()
    return model


def measure(folder: pathlib.Path, side: str, parts: Sequence[str], dtype: str) -> dict:
    """Reads parts in this process.

    Returns:
      `seconds`, `cpu_seconds`, and `peak_bytes` above what the process had before.
    """
    read = read_here if side == "uae_jax" else read_there
    jax.block_until_ready(jax.device_put(np.zeros(8))) if side == "uae_jax" else _import_libraries(parts)
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    models = [read(folder, part, dtype) for part in parts]
    result = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": memory("VmHWM") - before,
    }
    del models
    return result


def _import_libraries(parts: Sequence[str]) -> None:
    """Both libraries import a class's module when it is first asked for; that is not reading."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    for part in parts:
        library, name = PARTS[part].split(".")
        getattr(libraries[library], name)


def in_new_process(folder: pathlib.Path, side: str, parts: Sequence[str], dtype: str) -> dict:
    """`measure` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loading",
        f"--checkpoint={folder}",
        f"--dtype={dtype}",
        f"--measure={side}:{','.join(parts)}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def random_tensors(rules: Sequence[Rule], abstract: trees.Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Published names and random arrays of a model, made one at a time."""
    rng, shapes = np.random.default_rng(0), trees.flatten(abstract)
    for rule in rules:
        shape = shapes[rule.ours].shape if rule.layers is None else shapes[rule.ours].shape[1:]
        shape = rule.torch_shape or rule.to_theirs(np.broadcast_to(np.int8(0), shape)).shape
        for source in rule.sources():
            yield source, np.asarray(0.02 * rng.standard_normal(shape, np.float32), np.float32)


def make_folder(folder: pathlib.Path, gigabytes: float) -> None:
    """Random weights in the official layout: about six tenths captioner, three tenths transformer."""
    layers = max(2, round((0.6e9 * gigabytes - 131e6) / 62e6))
    captioner = qwen_config.Qwen2_5VLConfig(
        vision=qwen_config.VisionConfig(
            depth=2, width=256, heads=4, mlp_width=512, out_width=1024, full_attention_blocks=(1,)
        ),
        text=qwen_config.TextConfig(
            vocab_size=32000,
            width=1024,
            layers=layers,
            heads=16,
            key_heads=4,
            mlp_width=4096,
            mrope_section=(8, 12, 12),
        ),
        image_token_id=31990,
        video_token_id=31991,
        vision_start_token_id=31992,
        vision_end_token_id=31993,
        pad_token_id=31994,
        stop_token_ids=(31995,),
    )
    decoder = TransformerConfig(
        num_layers=max(2, round(0.3e9 * gigabytes / 130e6)),
        num_attention_heads=16,
        joint_attention_dim=1024,
        pooled_projection_dim=256,
        pos_embed_max_size=64,
        dual_attention_layers=(),
    )
    encoder = VAEConfig(block_out_channels=(64, 128, 256, 256))
    towers = CLIPConfig(
        CLIPVisionConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8),
        CLIPTextConfig(vocab_size=1000, num_hidden_layers=2),
    )
    parts: dict[str, tuple[list[Rule], trees.Tree, dict, str]] = {
        "llm": (
            qwen_weights.rules(captioner, False),
            qwen.abstract_params(captioner),
            qwen_config.to_json(captioner),
            "model",
        ),
        "dit": (
            sd3_weights.transformer_rules(decoder),
            transformer.abstract_params(decoder),
            decoder.published(),
            "diffusion_pytorch_model",
        ),
        "SD3/vae": (
            sd3_weights.vae_rules(encoder),
            vae.abstract_params(encoder),
            encoder.published(),
            "diffusion_pytorch_model",
        ),
        "clip": (encoder_weights.clip_rules(towers), clip.abstract_params(towers), towers.to_dict(), "model"),
    }
    for part, (rules, abstract, config, stem) in parts.items():
        write_tensors(folder / part, random_tensors(rules, abstract), stem=stem)
        (folder / part / "config.json").write_text(json.dumps(config))


def compare(folder: pathlib.Path, dtype: str, show: Callable[[dict], None]) -> None:
    """All parts that the folder has, by both sides, their total, and what a run reads where the folder is complete."""
    parts = [part for part in PARTS if (folder / part / "config.json").exists()]
    if not parts:
        raise SystemExit(f"error: {folder} holds none of {', '.join(PARTS)}; give an official UAE folder")
    rows = [*((part, [part], [part]) for part in parts), ("all", parts, parts)]
    if (folder / "llm_processor").is_dir():
        rows.append((SYSTEM, [SYSTEM], parts))
    for name, ours, theirs in rows:
        files = [file for part in theirs for file in (folder / part).glob("*.safetensors")]
        stored = sum(_touch(file) for file in files)
        members = dict(zip(SIDES, (ours, theirs)))
        sides = {side: in_new_process(folder, side, members[side], dtype) for side in SIDES}
        show({"part": name, "dtype": dtype, "file_bytes": stored} | sides)


def _touch(file: pathlib.Path) -> int:
    """Reads a file into the page cache, a piece at a time; its bytes."""
    with file.open("rb") as stream:
        while stream.read(2**24):
            pass
        return stream.tell()


def print_row(row: dict) -> None:
    """One line of the table."""
    cells = [
        f"{row[side]['seconds']:8.2f} {row[side]['cpu_seconds']:8.2f} {row[side]['peak_bytes'] / 1e6:8.0f}"
        for side in SIDES
    ]
    print(f"{row['part']:20s} {row['file_bytes'] / 1e6:8.0f}   {'   '.join(cells)}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=pathlib.Path, help="folder in the official layout")
    source.add_argument("--make-gb", type=float, help="size of a folder of random weights to make")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="precision into which both sides read")
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a row")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, _, parts = options.measure.partition(":")
        print(json.dumps(measure(options.checkpoint, side, parts.split(","), options.dtype)))
        return
    rows: list[dict] = []
    print(f"{'part':20s} {'file MB':>8s}   {'':9s}{SIDES[0]:>17s}   {'':9s}{SIDES[1]:>17s}")
    print(f"{'':20s} {'':8s}   " + "   ".join([f"{'s':>8s} {'cpu s':>8s} {'MB':>8s}"] * 2))
    with tempfile.TemporaryDirectory() as made:
        if options.make_gb:
            make_folder(pathlib.Path(made), options.make_gb)
        folder = options.checkpoint or pathlib.Path(made)
        compare(folder, options.dtype, lambda row: (rows.append(row), print_row(row)))
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
