"""Captions pictures, draws texts, or does both and shows the result side by side.

    python -m uae_jax.infer caption photo.png more/*.jpg
    python -m uae_jax.infer generate "gray background , top left large red circle" --out drawings
    python -m uae_jax.infer reconstruct folder_of_images --checkpoint runs/tiny --out strips

Without --checkpoint the built-in model of 32-pixel scenes is used. --checkpoint takes an official UAE folder or a
training workdir; the defaults are then the release's: 1024 pixels, 40 steps, guidance 5, temperature 0.7, seed 42.
"""

import argparse
import json
import os
import pathlib
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RELEASE_PROMPT = (
    "You are an expert vision-language model.  \nYour task is: Given an input image, generate a **textual description** "
    'of the image. If there is text in the image, transcribe it inside double quotes "".  \nNow, carefully analyze the '
    "input image and output the full description. ")
RELEASE_NEGATIVE = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m uae_jax.infer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("caption", "generate", "reconstruct"))
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|TEXT", help="image files, folders or patterns; texts for `generate`")
    parser.add_argument("--checkpoint", default="", help="official UAE folder or training workdir (default: the built-in model)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    for name, kind, text in (
        ("seed", int, "of captions and noise"), ("steps", int, "denoising steps"), ("guidance_scale", float, "1 is without guidance"),
        ("size", int, "side of the drawings in pixels"), ("temperature", float, "of captions; 0 is greedy"),
        ("top_p", float, "share of the probability that captions are drawn from"), ("max_new_tokens", int, "longest caption"),
        ("prompt", str, "what the captioner is asked"), ("negative_prompt", str, "what guidance moves away from"),
        ("batch_size", int, "pictures in one compiled call"), ("shift", float, "static shift of the noise levels")):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of activations")
    return parser


def _settings(options: argparse.Namespace) -> dict:
    """The run's own settings for a training workdir, the built-in or the release's; flags win."""
    from uae_jax.stages.inference import builtin_settings

    config = pathlib.Path(options.checkpoint) / "config.json"
    run = json.loads(config.read_text()) if options.checkpoint and config.is_file() else {}
    if not options.checkpoint:
        values = builtin_settings()
    elif {"data", "evaluation", "sampler"} <= set(run):  # not the config.json of a single model
        data, evaluation = run["data"], run["evaluation"]
        values = dict(
            size=data["image_size"], steps=evaluation["sampler_steps"], guidance_scale=evaluation["guidance_scale"],
            shift=run["sampler"]["shift"], schedule=run["sampler"]["schedule"], max_new_tokens=data["max_caption"],
            prompt=data["caption_prompt"], negative_prompt=data["negative_prompt"], batch_size=evaluation["batch_size"])
    else:
        values = dict(prompt=RELEASE_PROMPT, negative_prompt=RELEASE_NEGATIVE)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return values | {name: given[name] for name in given if name not in ("command", "inputs", "checkpoint", "out", "json", "dtype")}


def _strip(original, caption: str, drawn):
    """Original | caption | reconstruction as one picture, each square 256 pixels."""
    import textwrap

    from PIL import Image, ImageDraw

    from uae_jax.data.loader import square_image

    side, gap = 256, 8
    strip = Image.new("RGB", (3 * side + 4 * gap, side + 2 * gap), "white")
    for column, pixels in ((0, square_image(original, min(original.shape[:2]))), (2, drawn)):
        filter_ = Image.Resampling.NEAREST if pixels.shape[0] < side else Image.Resampling.LANCZOS
        strip.paste(Image.fromarray(pixels).resize((side, side), filter_), (gap + column * (side + gap), gap))
    ImageDraw.Draw(strip).multiline_text((2 * gap + side, gap), "\n".join(textwrap.wrap(caption, 40)[:17]), fill="black", spacing=4)
    return strip


def _save(picture, path: pathlib.Path, caption: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("caption", caption)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)


def _names(paths: list[pathlib.Path]) -> list[str]:
    """A file stem for each input; repeated stems get a number."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        seen[path.stem] = seen.get(path.stem, 0) + 1
        names.append(path.stem if seen[path.stem] == 1 else f"{path.stem}_{seen[path.stem]}")
    return names


def run(options: argparse.Namespace) -> None:
    """Does one command; results are printed and written as they come.

    Raises:
      ValueError, FileNotFoundError: a bad image, folder or setting; what was written before stays.
    """
    from tqdm import tqdm

    from uae_jax.data.sources import read_images
    from uae_jax.stages.inference import Inference, InferenceConfig
    from uae_jax.stages.weights import ModelConfig

    images = read_images(options.inputs) if options.command != "generate" else []
    model = Inference(ModelConfig(folder=options.checkpoint, dtype=options.dtype), InferenceConfig(**_settings(options)))
    total = len(images) or len(options.inputs)
    bar = tqdm(total=total, desc=options.command, file=sys.stderr, disable=not sys.stderr.isatty())

    def report(record: dict, text: str) -> None:
        bar.update(1)
        tqdm.write(json.dumps(record) if options.json else text, file=sys.stdout)

    pictures = [picture for _, picture in images]
    names = _names([path for path, _ in images])
    if options.command == "caption":
        for (path, _), caption in zip(images, model.caption(pictures)):
            report({"image": str(path), "caption": caption}, f"{path}: {caption}")
    elif options.command == "generate":
        for number, (text, drawn) in enumerate(zip(options.inputs, model.generate(options.inputs))):
            file = options.out / f"{number:04d}.png"
            _save(drawn, file, text)
            report({"text": text, "image": str(file)}, f"{file}: {text}")
    else:
        for (path, picture), name, (caption, drawn) in zip(images, names, model.reconstruct(pictures)):
            file, strip = options.out / f"{name}.png", options.out / f"{name}_strip.png"
            _save(drawn, file, caption)
            _save(_strip(picture, caption, drawn), strip, caption)
            report({"image": str(path), "caption": caption, "reconstruction": str(file), "strip": str(strip)}, f"{path}: {caption}\n  -> {strip}")
    bar.close()


def main(arguments: list[str] | None = None) -> None:
    """The command line; every expected error is one line and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: print(f"warning: {message}", file=sys.stderr)
            run(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
