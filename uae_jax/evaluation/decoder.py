"""Scores a decoder of the built-in scenes at several guidances, and says which is best.

    python -m uae_jax.evaluate decoder --checkpoint=start --output=start.json
    python -m uae_jax.evaluate decoder --checkpoint=runs/tiny --against=start.json

Guidance sharpens a decoder without any training. So decoders are compared each at its best guidance, which is chosen on
dev texts: true captions of other test scenes, and prompts of texts that training captions have. The headline is of test
scenes, and of prompts whose texts no training caption has. The scores of a training workdir are written into it as
`decoder.json`, and into its report. `--against` names results of other decoders on the same texts, such as the start
model's; the differences are paired by text.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from uae_jax.command_line import in_range
from uae_jax.evaluation import run_settings
from uae_jax.evaluation.benchmark_commands import grouped_scores
from uae_jax.files.json_files import read_json, write_json
from uae_jax.files.paths import to_path
from uae_jax.model_flags import add_model_flags, load_model

if TYPE_CHECKING:
    from uae_jax.data.scenes import Scene
    from uae_jax.stages.engines import Engine
    from uae_jax.stages.inference import Inference

SCALES = (1.0, 2.0, 3.0, 5.0)
SCENE_SCORE, PROMPT_SCORES = "true_caption_scene_accuracy", ("geneval", "geneval_exact")
BATCH = 64  # rows of one compiled call
Scores = dict[str, dict[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    texts = parser.add_argument_group("texts")
    texts.add_argument("--scenes", default=256, metavar="N", help="test scenes", **in_range(int, low=1))
    texts.add_argument("--per_tag", default=48, metavar="N", help="prompts of each tag", **in_range(int, low=1))
    texts.add_argument(
        "--dev",
        default=0.5,
        help="dev texts as a share of the test texts, from which the guidance is chosen",
        **in_range(float, above=0, high=1),
    )
    texts.add_argument("--scene_seed", default=0, help="stream of test scenes and prompts", **in_range(int, low=0))
    texts.add_argument("--scales", type=float, nargs="+", default=list(SCALES), help="guidances; 1 is without")
    parser.add_argument("--output", type=to_path, metavar="FILE", help="the result, JSON (default: in the workdir)")
    parser.add_argument(
        "--against", type=to_path, nargs="+", default=[], metavar="FILE", help="results of other decoders"
    )
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Scores the decoder, writes the result and prints it.

    Raises:
      ValueError: no place for the result, a scale twice or below 0, or other texts in a file of --against.
      FileNotFoundError: there is no such model or file.
    """
    workdir = to_path(options.checkpoint or ".")
    trained = bool(options.checkpoint) and (workdir / "summary.json").is_file()
    output = options.output or (workdir / "decoder.json" if trained else None)
    if output is None:
        raise ValueError("give --output, a JSON file for the result; only a training workdir has a place for it")
    if len(set(options.scales)) < len(options.scales) or min(options.scales) < 0:
        raise ValueError(f"--scales are {options.scales}; give different numbers of 0 or more")
    splits = {name: make_split(name, options) for name in ("dev", "test")}
    others = {path: read_other(path, splits["test"].digest) for path in options.against}
    result = compare(load_model(options).engine, splits, sorted(options.scales), options.batch_size or BATCH)
    result |= {"model": options.checkpoint or "built-in", "texts": splits["test"].digest}
    write_json(output, result)
    print(described(result, {str(path): paired(result, other, splits["test"]) for path, other in others.items()}))
    if trained and options.output is None:
        from uae_jax.training.report import write_report

        print(f"report: {write_report(workdir)}")
    print(f"result: {output}")


class Split(NamedTuple):
    """Scenes, whose full captions are drawn, and prompts."""

    scenes: "Sequence[Scene]"
    prompts: Sequence[Mapping[str, Any]]

    @property
    def texts(self) -> list[str]:
        """What is drawn: the captions of the scenes, then the prompts."""
        from uae_jax.data.scene_captions import caption

        return [*map(caption, self.scenes), *(prompt["prompt"] for prompt in self.prompts)]

    @property
    def digest(self) -> str:
        """Of scenes and prompts."""
        return run_settings.digest(json.dumps([self.texts, list(self.prompts)]))

    def scores(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """One number a text: `SCENE_SCORE` of the scenes, and `PROMPT_SCORES` of the prompts; images `[n, S, S, 3]`."""
        from uae_jax.data.scene_checker import picture_scores
        from uae_jax.stages.evaluation import prompt_scores

        right = prompt_scores(self.prompts, drawn[len(self.scenes) :])
        own = picture_scores(self.scenes, drawn[: len(self.scenes)])
        return {SCENE_SCORE: own} | {name: right[name] for name in PROMPT_SCORES}

    def intervals(self, values: Mapping[str, Sequence[float]]) -> Scores:
        """Means with 95 % intervals, of prompts also by tag; the images of one prompt are not independent."""
        from uae_jax.training.summary import interval

        found: Scores = {SCENE_SCORE: interval(values[SCENE_SCORE])}
        for name in PROMPT_SCORES:
            scores = grouped_scores(
                (prompt["tag"], prompt["prompt"], value)
                for prompt, value in zip(self.prompts, values[name], strict=True)
            )
            found |= {name: scores["overall"]} | {f"{name}_{tag}": row for tag, row in scores["groups"].items()}
        return found


def make_split(name: str, options: argparse.Namespace) -> Split:
    """The dev or the test texts of the flags; they share no scene number and no prompt text."""
    from uae_jax.data.scene_prompts import scene_prompts
    from uae_jax.data.scenes import scene_at

    seed, test = options.scene_seed, name == "test"
    scenes, prompts = (
        count if test else max(1, round(count * options.dev)) for count in (options.scenes, options.per_tag)
    )
    first = 0 if test else options.scenes
    return Split(
        [scene_at("test", first + number, seed) for number in range(scenes)],
        scene_prompts(prompts, seed, texts="unseen" if test else "seen"),
    )


def compare(engine: "Engine", splits: Mapping[str, Split], scales: Sequence[float], batch: int) -> dict[str, Any]:
    """The scores of a decoder at every scale; one with a diffusion decoder has one compiled program for all.

    Returns:
      `scales` {scale: {"dev": means, "test": intervals}}, `best` by the mean of dev captions and dev prompts, the
      `headline` of the test texts at the best scale, and its `values`, one a text.
    """
    drawn = draw_all(engine, [text for split in splits.values() for text in split.texts], scales, batch)
    table, values = {}, {}
    for scale, pictures in zip(scales, drawn):
        dev, test = (
            split.scores(part)
            for split, part in zip(splits.values(), np.split(pictures, [len(splits["dev"].texts)]), strict=True)
        )
        values[scale] = {name: scores.tolist() for name, scores in test.items()}
        table[scale] = {
            "dev": {name: float(np.mean(scores)) for name, scores in dev.items()},
            "test": splits["test"].intervals(values[scale]),
        }
    best = max(scales, key=lambda scale: table[scale]["dev"][SCENE_SCORE] + table[scale]["dev"][PROMPT_SCORES[0]])
    return {
        "best": best,
        "headline": table[best]["test"],
        "scales": {f"{scale:g}": rows for scale, rows in table.items()},
        "values": values[best],
    }


def draw_all(engine: "Engine", texts: Sequence[str], scales: Sequence[float], batch: int) -> np.ndarray:
    """Images of all texts at all scales, uint8 `[scales, texts, S, S, 3]`; a text has one noise at every scale."""
    from uae_jax.data.loader import from_signed
    from uae_jax.stages.batching import in_batches
    from uae_jax.stages.inference import Row
    from uae_jax.stages.unified_inference import UnifiedInference

    if isinstance(engine, UnifiedInference):
        listed = [Row(number, number, engine.text_fields(text)) for number, text in enumerate(texts)]
        drawn = ({row.index: image for row, image in engine.with_guidance(scale).drawings(listed)} for scale in scales)
        return np.stack([np.stack([images[number] for number in range(len(texts))]) for images in drawn])
    rows = [engine.text_fields(text) for text in texts]
    tokens, mask = (np.stack([row[name] for row in rows]) for name in ("caption_ids", "caption_mask"))
    inputs = tokens, mask.sum(-1, dtype=np.int32) - 1, np.arange(len(texts), dtype=np.int32)
    every = [np.tile(leaf, (len(scales), *(1,) * (leaf.ndim - 1))) for leaf in inputs]
    engine = cast("Inference", engine)
    check_scales(engine, scales)
    guidances, program = np.repeat(np.array(scales, np.float32), len(texts)), guided_program(engine, scales)
    drawn = in_batches(lambda *rows: program(engine.parts, *rows), batch, *every, guidances)
    return from_signed(drawn).reshape(len(scales), len(texts), *drawn.shape[1:])


def check_scales(engine: "Inference", scales: Sequence[float]) -> None:
    """Raises ValueError for a guidance that the decoder does not know."""
    from uae_jax.models.uae import check_guidance

    try:
        for scale in scales:
            check_guidance(engine.system.model, scale)
    except ValueError as error:
        raise ValueError(f"--scales: {error}") from error


def guided_program(engine: "Inference", scales: Sequence[float]) -> Callable[..., Any]:
    """`(parts, tokens [n, t], lengths [n], sample ids [n], guidances [n]) -> images` in [-1, 1], compiled once.

    A row is what the engine would draw at its guidance, up to rounding. Without guidance the negative half is computed
    all the same, unless no scale is with guidance: a distilled decoder has none.
    """
    import jax
    import jax.numpy as jnp

    from uae_jax import trees
    from uae_jax.models import uae
    from uae_jax.rollouts.reconstruction import Denoising, draw_from, encode_condition, noise_levels, sample_keys

    config, model = engine.config, engine.system.model
    sigmas = noise_levels(model, config.steps, config.shift, config.schedule)
    one = next((scale for scale in scales if scale != 1), 1.0)
    guided = Denoising(sigmas, guidance_scale=one, condition=config.condition)
    key = trees.name_key(jax.random.key(config.seed), "noise")

    def program(parts: Mapping, tokens: Any, lengths: Any, sample_ids: Any, guidances: Any) -> Any:
        contexts = encode_condition(model, parts, guided, tokens, lengths)
        how = guided if one == 1 else dataclasses.replace(guided, guidance_scale=guidances)
        noise = sample_keys(key, sample_ids)
        return jnp.clip(draw_from(model, parts, how, contexts, uae.initial_noise(model, noise)), -1, 1)

    return jax.jit(program)


def read_other(path: pathlib.Path, digest: str) -> dict[str, Any]:
    """The result of another decoder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no result, or one of other texts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; write it by `evaluate decoder --output={path}`")
    found = read_json(path.parent, path.name)
    if not {"values", "texts", "best", "headline"} <= set(found):
        raise ValueError(f"{path} is no result of `evaluate decoder`; write it by `evaluate decoder --output={path}`")
    if found["texts"] != digest:
        raise ValueError(
            f"{path} has the scores of other texts; use the same --scenes, --per_tag and --scene_seed for both"
        )
    return found


def paired(result: Mapping[str, Any], other: Mapping[str, Any], split: Split) -> Scores:
    """Differences to another result with intervals, both at their best guidance, paired by text."""
    pairs = {name: (result["values"][name], other["values"][name]) for name in (SCENE_SCORE, *PROMPT_SCORES)}
    return split.intervals({name: np.subtract(*both).tolist() for name, both in pairs.items()})


def described(result: Mapping[str, Any], differences: Mapping[str, Scores]) -> str:
    """The result in words: a line a scale, the headline, and the differences to other decoders."""

    def shown(row: Mapping[str, float], sign: str = "") -> str:
        return f"{row['value']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"

    names = (SCENE_SCORE, *PROMPT_SCORES)
    lines = [f"{'guidance':10s}" + "".join(f"{name:32s}" for name in names)]
    for scale, rows in result["scales"].items():
        chosen = " *" if float(scale) == result["best"] else ""
        lines.append(f"{scale + chosen:10s}" + "".join(f"{shown(rows['test'][name]):32s}" for name in names))
    lines.append("* best on the dev texts; the headline:")
    lines += [f"{name:32s}{shown(row)}" for name, row in result["headline"].items()]
    for path, scores in differences.items():
        lines.append(f"above {path}, each at its best guidance, paired by text:")
        lines += [f"{name:32s}{shown(scores[name], '+')}" for name in names]
    return "\n".join(lines)
