"""Unified-Bench, protocol 1: similarity of images and reconstructions under frozen image encoders.

The first form scores two folders, as the official script does:

    python -m uae_jax.evaluate unified_bench --ref_dir=originals --gen_dir=generated --output=scores.json \\
        --clip=clip-vit-large-patch14 --longclip=longclip-L.pt --dinov2=dinov2-large \\
        --dinov3=dinov3-vitl16-pretrain-lvd1689m

The second form lets a model caption and reconstruct a folder of images first; an interrupted run continues:

    python -m uae_jax.evaluate unified_bench --images=originals --checkpoint=UAE --out=bench \\
        --clip=clip-vit-large-patch14

The reference of an image has the same file name, else the same stem, else its stem after `recon_`. Images that cannot
be scored are listed under `errors` in the JSON, the others are scored, and the exit code is then 1.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from uae_jax.command_line import in_range
from uae_jax.files.json_files import read_records, write_json
from uae_jax.files.paths import to_path
from uae_jax.model_flags import add_model_flags, load_model

FLAGS = (
    ("clip", "DIR", "CLIP, as openai/clip-vit-large-patch14"),
    ("longclip", "FILE", "Long-CLIP, as longclip-L.pt or its safetensors"),
    ("dinov2", "DIR", "DINOv2, as facebook/dinov2-large"),
    ("dinov3", "DIR", "DINOv3, as facebook/dinov3-vitl16-pretrain-lvd1689m"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    encoders = parser.add_argument_group("encoders, at least one")
    for name, kind, text in FLAGS:
        encoders.add_argument(f"--{name}", metavar=kind, help=text)
    folders = parser.add_argument_group("first form: score two folders")
    folders.add_argument("--ref_dir", metavar="DIR", help="the originals")
    folders.add_argument("--gen_dir", metavar="DIR", help="the reconstructions")
    first = parser.add_argument_group("second form: run a model first")
    first.add_argument("--images", metavar="DIR", help="the originals")
    first.add_argument(
        "--out",
        type=to_path,
        metavar="DIR",
        help="folder of captions.jsonl, reconstructions/, scores and page",
    )
    add_model_flags(parser)
    parser.add_argument(
        "--output", type=to_path, metavar="FILE", help="the scores (default with --out: unified_bench.json in it)"
    )
    parser.add_argument(
        "--report", type=to_path, metavar="FILE", help="the page (default: report.html beside the scores)"
    )
    parser.add_argument("--report_pairs", default=200, metavar="N", help="pairs on the page", **in_range(int, low=0))
    parser.add_argument(
        "--encoder_batch_size",
        **in_range(int, low=1),
        default=8,
        metavar="N",
        help="pairs in one call of an encoder",
    )
    parser.set_defaults(run=run)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for conflicting flags."""
    if not any(getattr(options, name) for name, _, _ in FLAGS):
        raise ValueError(f"no encoder is given; give at least one of {', '.join('--' + name for name, _, _ in FLAGS)}")
    two, one = (options.ref_dir, options.gen_dir), (options.images, options.out)
    if any(two) == any(one) or not (all(two) or all(one)):
        raise ValueError(
            "give --ref_dir and --gen_dir to score two folders, or --images and --out to run a model first"
        )
    if all(two) and not options.output:
        raise ValueError("--output is not given; name the JSON file of the scores")


def run(options: argparse.Namespace) -> None:
    """Reconstructs the images if a model is to, and scores.

    Raises:
      ValueError: conflicting flags or an unreadable encoder; or, after all results are written, images without a score.
      FileNotFoundError: a folder is missing or empty.
    """
    from uae_jax.evaluation.encoders import open_bench_encoder

    _check(options)
    # opened before any work, so that a wrong path ends the run at once; weights are read one encoder at a time
    encoders = [open_bench_encoder(name, path) for name, _, _ in FLAGS if (path := getattr(options, name))]
    errors: list[dict[str, str]] = []
    ref_dir, gen_dir, captions = options.ref_dir, options.gen_dir, {}
    if options.images:
        from uae_jax.evaluation.drawing import CAPTIONS, PICTURES

        errors += _reconstruct(options)
        ref_dir, gen_dir = options.images, str(options.out / PICTURES)
        captions = {record["image_id"]: record["caption"] for record in read_records(options.out / CAPTIONS)}
    _score(options, encoders, ref_dir, gen_dir, captions, errors)


def _reconstruct(options: argparse.Namespace) -> list[dict[str, str]]:
    from uae_jax.evaluation.drawing import SETTINGS, write_reconstructions
    from uae_jax.evaluation.pairs import find_images
    from uae_jax.evaluation.run_settings import model_settings

    images = find_images(options.images)
    model = load_model(options, len(images))
    return write_reconstructions(model, images, options.out, model_settings(options, model, SETTINGS))


def _score(
    options: argparse.Namespace,
    encoders: Sequence,
    ref_dir: str,
    gen_dir: str,
    captions: dict[str, str],
    errors: list[dict[str, str]],
) -> None:
    """Scores two folders, writes JSON and page, and prints the means."""
    from uae_jax.evaluation.pairs import find_images, match_images, unread_images
    from uae_jax.evaluation.scores import results_json, write_page

    images, references = find_images(gen_dir), find_images(ref_dir)
    pairs = match_images(images, references)
    told = {error["image"] for error in errors}
    errors += [{"image": str(path), "error": text} for path, text in pairs.unmatched if str(path) not in told]
    skipped = [*unread_images(gen_dir), *unread_images(ref_dir)]
    warnings = [
        *pairs.warnings,
        *(f"{path} is not read: the benchmark reads .jpg .jpeg .png .bmp .tiff .webp" for path in skipped),
    ]
    output = options.output or options.out / "unified_bench.json"
    similarities: dict[str, dict[str, float | None]] = {}
    settings = {
        "ref_dir": str(ref_dir),
        "gen_dir": str(gen_dir),
        "encoder_batch_size": options.encoder_batch_size,
        "encoders": {encoder.name: str(encoder.source.path) for encoder in encoders},
    }

    def results() -> dict[str, Any]:
        scores = results_json([encoder.name for encoder in encoders], similarities)
        return {**scores, "errors": errors, "warnings": warnings, "settings": settings}

    try:
        for encoder in encoders:
            _score_encoder(
                encoder,
                [image.name for image in images],
                pairs.found,
                options.encoder_batch_size,
                similarities,
                errors,
            )
            write_json(output, results())
    finally:
        write_json(output, results())
    report = options.report or output.parent / "report.html"
    write_page(report, results(), pairs.found, captions, options.report_pairs)
    _print(results(), output, report)
    for warning in warnings:
        print(f"warning: {warning}")
    if errors:
        first = "; ".join(f"{error.get('image', error.get('model'))}: {error['error']}" for error in errors[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ValueError(
            f"{len(errors)} thing{'s' * (len(errors) > 1)} could not be scored: {first}{more}; all are listed in "
            f"{output}, with the scores of the rest"
        )


def _score_encoder(
    encoder: Any,
    names: Sequence[str],
    pairs: Sequence,
    batch_size: int,
    similarities: dict[str, dict[str, float | None]],
    errors: list[dict[str, str]],
) -> None:
    """Adds the scores of one encoder, pair by pair."""
    from uae_jax.evaluation.encoders import pair_cosines

    try:
        params = encoder.source.load()
    except ValueError as error:
        errors.append({"model": encoder.name, "error": str(error)})
        return
    similarities[encoder.name] = scores = dict.fromkeys(names)
    known = {(error.get("image"), error["error"]) for error in errors}
    for (image, _), score in tqdm(
        pair_cosines(encoder, params, pairs, batch_size), total=len(pairs), desc=encoder.name, disable=None
    ):
        if not isinstance(score, str):
            scores[image.name] = score
        elif (str(image), score) not in known:
            errors.append({"image": str(image), "error": score})


def _print(results: dict[str, Any], output: pathlib.Path, report: pathlib.Path) -> None:
    for model, entry in results["statistics_by_model"].items():
        low, high = entry["interval_95"]
        print(
            f"{model:10} {entry['average_similarity']:.4f}  [{low:.4f}, {high:.4f}]  {entry['n_valid']} of "
            f"{entry['total_images']} images"
        )
    if results["summary"]:
        print(f"{'overall':10} {results['summary']['overall_average']:.4f}")
    print(f"scores: {output}\npage: {report}")
