"""The README's picture: held-out pictures, captions and drawings before and after a run.

python -m benchmarks.strip runs/tiny docs/images/strip.png
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


def main() -> None:
    """Reads the first stage's samples before and the last one's after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=5)
    options = parser.parse_args()
    stages = [stage["name"] for stage in json.loads((options.workdir / "summary.json").read_text())["stages"]]
    before = samples(options.workdir / "samples" / f"{stages[0]}_before")
    after = samples(options.workdir / "samples" / f"{stages[-1]}_after")
    header, width = 24, SIDE + 2 * (TEXT + SIDE) + 5 * GAP
    strip = Image.new("RGB", (width, header + options.rows * (SIDE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(strip)
    columns = (GAP, 2 * GAP + SIDE, 4 * GAP + 2 * SIDE + TEXT)
    for left, title in zip(columns, ("picture", "caption and drawing before training", "after all four stages")):
        draw.text((left, 6), title, fill="black", font=font(11))
    for row, (first, last) in enumerate(list(zip(before, after))[: options.rows]):
        top = header + GAP + row * (SIDE + GAP)
        original = Image.open(first["folder"] / first["original"]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        strip.paste(original, (columns[0], top))
        paste(strip, draw, columns[1], top, first)
        paste(strip, draw, columns[2], top, last)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    strip.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
