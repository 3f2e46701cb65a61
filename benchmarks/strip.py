"""The README's picture, and an animation: held-out pictures, captions and drawings before, during and after a run.

python -m benchmarks.strip runs/tiny docs/images/strip.png
python -m benchmarks.strip runs/tiny docs/images/training.gif --rows=3
"""

import argparse
import json
import pathlib

from PIL import Image, ImageDraw

from uae_jax.files.strips import font, wrapped

SIDE, GAP, TEXT = 96, 10, 190


def samples(folder: pathlib.Path) -> list[dict]:
    """The samples of a stage with their folder."""
    return [sample | {"folder": folder} for sample in json.loads((folder / "samples.json").read_text())]


def paste(strip: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, sample: dict) -> None:
    """A caption and its drawing, side by side."""
    text = "\n".join(wrapped(sample["caption"], font(11), TEXT - GAP, 6))
    draw.multiline_text((left, top + SIDE // 2), text, fill="black", spacing=3, anchor="lm", font=font(11))
    picture = Image.open(sample["folder"] / sample["reconstruction"]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    strip.paste(picture, (left + TEXT, top))


def step_of(folder: pathlib.Path) -> float:
    """Place of a folder of samples in its stage: before, at a step, after."""
    name = folder.name.rpartition("_")[2]
    return {"before": -1.0, "after": float("inf")}.get(name) or float(name.removeprefix("step"))


def moments(workdir: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """(title, folder) of all samples of a run in order; those before a stage are those after the one before it."""
    stages = [stage["name"] for stage in json.loads((workdir / "summary.json").read_text())["stages"]]
    found = []
    for number, stage in enumerate(stages):
        for folder in sorted((workdir / "samples").glob(f"{stage}_*"), key=step_of):
            if number and step_of(folder) < 0:
                continue
            title = folder.name.removeprefix(f"{stage}_").replace("step", "step ")
            found.append(("before training" if title == "before" else f"{stage}: {title}", folder))
    return found


def picture(rows: int, columns: list[tuple[str, list[dict]]]) -> Image.Image:
    """The originals, and beside them a column of captions and drawings for each (title, samples)."""
    header, width = 24, SIDE + GAP + len(columns) * (TEXT + SIDE + 2 * GAP)
    strip = Image.new("RGB", (width, header + rows * (SIDE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 6), "picture", fill="black", font=font(11))
    for number, (title, column) in enumerate(columns):
        left = 2 * GAP + SIDE + number * (TEXT + SIDE + 2 * GAP)
        draw.text((left, 6), title, fill="black", font=font(11))
        for row, sample in enumerate(column[:rows]):
            top = header + GAP + row * (SIDE + GAP)
            original = Image.open(sample["folder"] / sample["original"]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            strip.paste(original, (GAP, top))
            paste(strip, draw, left, top, sample)
    return strip


def main() -> None:
    """Reads the first stage's samples before and the last one's after, or all in between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path, help="a picture, or the animation .gif")
    parser.add_argument("--rows", type=int, default=5)
    options = parser.parse_args()
    every = moments(options.workdir)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix == ".gif":
        frames = [picture(options.rows, [(title, samples(folder))]) for title, folder in every]
        pauses = [1500 if title.endswith(("after", "training")) else 400 for title, _ in every]
        frames[0].save(options.out, save_all=True, append_images=frames[1:], duration=pauses, loop=0, optimize=True)
    else:
        titles = "caption and drawing before training", "after all stages"
        columns = [(title, samples(folder)) for title, (_, folder) in zip(titles, (every[0], every[-1]))]
        picture(options.rows, columns).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
