"""A painter that needs no model, and what the official evaluators read, told again from their own reading code."""

import argparse
import dataclasses
import json
import os
import re
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uae_jax import evaluate
from uae_jax.stages.inference import InferenceConfig

SIZE = 8


class Painter:
    """Draws noise that depends on the text and the sample's number alone; stops for good after `limit` samples."""

    limit: int | None = None

    def __init__(self, settings):
        self.settings, self.drawn, self.engine = settings, [], self

    def text_fields(self, text):
        if len(text) > 200:
            raise ValueError("the text is longer than 200 letters; shorten it")

    def generate(self, texts, *, sample_ids):
        found = []
        for text, number in zip(texts, sample_ids, strict=True):
            if Painter.limit is not None and len(self.drawn) >= Painter.limit:
                raise KeyboardInterrupt
            self.drawn.append((text, number))
            found.append(Image.fromarray(sample_pixels(text, number, self.settings.size)))
        return found


def sample_pixels(text, number, size=SIZE):
    return np.random.default_rng([zlib.crc32(text.encode()), number]).integers(0, 256, (size, size, 3), np.uint8)


def load_painter(options: argparse.Namespace, inputs: int):
    """In place of `model_flags.load_model`."""
    names = {field.name for field in dataclasses.fields(InferenceConfig)}
    given: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name in names and value is not None
    }
    return Painter(InferenceConfig(**{"size": SIZE, "steps": 2, "batch_size": 3, **given}))


def refused(*arguments):
    """The one line on stderr of an `evaluate` command that ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(argument) for argument in arguments])
    assert (
        isinstance(stopped.value.code, str)
        and stopped.value.code.startswith("error: ")
        and "\n" not in stopped.value.code
    )
    return stopped.value.code


def geneval_pictures(folder):
    """evaluation/evaluate_images.py: (metadata, path) of every picture that GenEval's evaluator scores, in its
    order.
    """
    for name in os.listdir(folder):
        if os.path.isdir(os.path.join(folder, name)) and name.isdigit():
            with open(os.path.join(folder, name, "metadata.jsonl")) as file:
                metadata = json.load(file)
            for picture in os.listdir(os.path.join(folder, name, "samples")):
                path = os.path.join(folder, name, "samples", picture)
                if os.path.isfile(path) and re.match(r"\d+\.png", picture):
                    Image.open(path).load()
                    yield metadata, path


def geneval_result(metadata, path, correct):
    """A line of the evaluator's results, which pandas writes with escaped slashes."""
    record = {
        "filename": path,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": "",
        "metadata": json.dumps(metadata),
        "details": "{}",
    }
    return json.dumps(record).replace("/", "\\/")


def dpg_pictures(folder, resolution, known):
    """dpg_bench/compute_dpg_bench.py: {stem: four crops}, and the names that it fails on."""
    boxes = [(x, y, x + resolution, y + resolution) for y in (0, resolution) for x in (0, resolution)]
    found, failed = {}, []
    for name in os.listdir(folder):
        try:
            picture = Image.open(os.path.join(folder, name))
            key = os.path.basename(name).split(".")[0]
            assert key in known
            found[key] = [np.asarray(picture.crop(box)) for box in boxes]
        except Exception:
            failed.append(name)
    return found, failed


def snapshot(folder):
    """{relative path: (content, time of the last change)} of all files."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(folder):
    return {name: content for name, (content, _) in snapshot(folder).items()}
