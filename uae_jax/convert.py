"""Checks model folders, writes them in other layouts, and builds them from published models.

    python -m uae_jax.convert check /weights/UAE
    python -m uae_jax.convert export runs/medium medium_hub --layout hub --dtype bfloat16
    python -m uae_jax.convert import --llm Qwen2.5-VL-3B-Instruct --sd3 stable-diffusion-3.5-medium \\
        --clip clip-vit-large-patch14 UAE_new
    python -m uae_jax.convert import --captioner Qwen2.5-VL-3B-Instruct --decoder FLUX.2-klein-4B \\
        --clip clip-vit-large-patch14 UAE_klein

check reads every tensor of an official UAE folder, a training workdir, a diffusers SD3 pipeline, or the folder of one
model (Qwen2.5-VL, Janus-Pro, SD3 transformer, VAE, CLIP, DINO, peft adapter); its exit code is 1 when a part is not
complete. export writes the official layout, or folders that transformers, diffusers and peft open (`--layout hub`); one
model alone is written as its library opens it, Janus-Pro's official pickle as safetensors for transformers.
import builds the official folder that `uae_jax.main` and `uae_jax.infer` take.
Nothing is written unless all parts that are read are complete.
"""

import argparse
import os
from typing import Any

from uae_jax.command_line import in_range, run_command, stay_offline
from uae_jax.files.paths import to_path
from uae_jax.settings import LAST_SEED

stay_offline()

IMPORTED = {
    "llm": "Qwen2.5-VL folder, with or without UAE's projector",
    "sd3": "SD3 or SD3.5 pipeline folder",
    "decoder": "in place of --sd3: pipeline folder of a decoder with its own text encoder, as FLUX.2-klein-4B",
    "llm_processor": "tokenizer and image processor (default: those in --llm)",
    "projector": "UAE's projector as `export --layout hub` writes it (default: a new one when --llm has none)",
    "dit": "transformer (default: the pipeline's)",
    "llm_lora": "adapter of the captioner",
    "dit_lora": "adapter of the transformer",
    "llm_reference": "the captioner before full fine-tuning of --llm, as `export` writes it",
    "clip": "CLIP folder",
    "longclip": "Long-CLIP folder, or the published .pt or safetensors file",
    "dinov2": "DINOv2 folder",
    "dinov3": "DINOv3 folder",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `check`, `export` and `import`."""
    commands = parser.add_subparsers()
    check = commands.add_parser("check", help="check that every tensor is there, has the right shape and is finite")
    check.add_argument("folder", metavar="FOLDER", help="model folder, pipeline, training workdir or one model")
    check.add_argument("--fast", action="store_true", help="read names and shapes, not values")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)
    export = commands.add_parser("export", help="write a model in another layout or precision")
    export.add_argument("source", metavar="SOURCE", help="official UAE folder, training workdir, or one model")
    export.add_argument("out", metavar="OUT", help="a new folder")
    export.add_argument("--layout", choices=("official", "hub"), default="official", help="layout of the new folder")
    export.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="precision of the weights (default: as stored)",
    )
    export.add_argument("--merge_adapters", action="store_true", help="add the adapters to the weights of their models")
    export.add_argument(
        "--llm_lora",
        choices=("peft", "wrapped"),
        default="peft",
        help="peft adapter folder, or the release's complete state in three files",
    )
    export.add_argument(
        "--max_shard_gb", default=5.0, metavar="GB", help="size limit of one file", **in_range(float, above=0)
    )
    export.add_argument(
        "--parts", nargs="+", default=(), metavar="PART", help="write only these parts, such as llm SD3/vae dit_lora"
    )
    export.set_defaults(run=_export)
    build = commands.add_parser("import", help="build an official folder from published models")
    for name, text in IMPORTED.items():
        flags = [f"--{name}"] + (["--captioner"] if name == "llm" else [])
        build.add_argument(*flags, dest=name, default="", metavar="DIR", required=name == "llm", help=text)
    build.add_argument("out", metavar="OUT", help="a new folder")
    build.add_argument(
        "--seed", default=0, help="random seed of a new projector", **in_range(int, low=0, high=LAST_SEED)
    )
    build.add_argument(
        "--link", action="store_true", help="write hard links instead of copies, if both folders are on one disk"
    )
    build.add_argument("--fast", action="store_true", help="check names and shapes, not values")
    build.set_defaults(run=_import)
    for command in (export, build):
        command.add_argument("--overwrite", action="store_true", help="replace the model folder OUT")


def _bar(text: str, total: int | None = None) -> Any:
    """A progress bar in bytes; on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=text, unit="B", unit_scale=True, leave=False, disable=None)


def _check(options: argparse.Namespace) -> int:
    from uae_jax.stages.folders.check import as_json, check_folder, table_text, weight_bytes
    from uae_jax.stages.folders.parts import find_parts

    folder = find_parts(options.folder)
    with _bar("reading", weight_bytes(folder)) as bar:
        rows = check_folder(folder, fast=options.fast, progress=bar.update)
    print(as_json(folder, rows) if options.json else table_text(folder, rows))
    return int(any(row.problems for row in rows))


def _export(options: argparse.Namespace) -> None:
    from uae_jax.stages.folders.check import readable
    from uae_jax.stages.folders.export import ExportConfig, export_folder

    config = ExportConfig(
        options.layout,
        options.dtype,
        options.merge_adapters,
        options.llm_lora,
        options.max_shard_gb,
        tuple(options.parts),
    )
    with _bar("writing") as bar:

        def progress(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        outputs = export_folder(options.source, options.out, config, overwrite=options.overwrite, progress=progress)
    for output in outputs:
        if output.items:
            dtypes = ", ".join(sorted({item.dtype.name for item in output.items}))
            note = f"  {output.note}" if output.note else ""
            name = output.name or "."
            print(f"{name:<20} {len(output.items):>5} tensors  {readable(output.nbytes):>8}B  {dtypes}{note}")
        elif output.note:
            print(f"{output.name:<20} {output.note}")
    print(f"written to {options.out}")


def _import(options: argparse.Namespace) -> None:
    from uae_jax.stages.folders.assemble import Sources, import_folder

    sources = Sources(**{name: getattr(options, name) for name in IMPORTED})
    with _bar("checking") as bar:
        rows, notes = import_folder(
            sources,
            options.out,
            seed=options.seed,
            link=options.link,
            overwrite=options.overwrite,
            fast=options.fast,
            progress=bar.update,
        )
    for row in rows:
        print(f"{row.part:<20} {row.folder}")
    for note in notes:
        print(note)
    print(
        f"written to {options.out}; use it as --checkpoint {options.out} or "
        f"--config.model.folder={to_path(options.out).absolute()}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line; `check` ends with code 1 when a part is not complete."""
    # the only computation is a random projector, which needs no accelerator
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run_command("uae_jax.convert", __doc__, add_arguments, arguments)


if __name__ == "__main__":
    main()
