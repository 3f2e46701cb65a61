"""Precomputed inputs in a run: what they depend on, whether they fit it, and the loader that reads them.

`stages.precompute` makes the folder that `config.data.precomputed` names. The position in the data, the random keys and
the order of examples are those of a run that computes. Whoever reads a folder of other weights, settings or images is
told so before the first step.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uae_jax import sharding
from uae_jax.data.folder import FolderSource
from uae_jax.data.loader import RowBuilder
from uae_jax.data.precomputed import (
    COMMAND,
    Distinct,
    PrecomputedRows,
    PrecomputedSource,
    StoredExamples,
    first_read,
    padded,
    read_manifest,
    shard_problem,
    spread,
)
from uae_jax.data.sources import Source
from uae_jax.files.json_files import json_digest
from uae_jax.files.paths import to_path
from uae_jax.models.uae import UAE
from uae_jax.nn.device import platform
from uae_jax.rollouts.captioning import CAPTION_FIELDS
from uae_jax.rollouts.frozen_inputs import FIELDS, encoded
from uae_jax.settings import differences
from uae_jax.stages.data import OpenedData
from uae_jax.stages.folders.parts import weights_digest
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import language_folders, model_folder, processor_folder
from uae_jax.training import processes

WORDS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")  # files that decide the ids of a text
COMPARED = 8  # examples that are computed again at the start of a run, at least
# bounds on the norm of a difference over the norm of what is computed. Other rows differ by the norm itself;
# accelerators multiply in less than float32, and not all of them alike
BOUNDS = {"float32": 2e-2, "bfloat16": 5e-2}
BOUND_OF_CPU = 1e-3
REMEDY = (
    f"compute them for this run by `{COMMAND}` with its --config flags and a new --out, or leave data.precomputed out"
)


def readers(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """{stage: parts of precomputed inputs that it can read} of the stages of a run that can read any."""
    found = {stage: tuple(config.precomputable(stage)) for stage in config.distinct_stages()}
    return {stage: parts for stage, parts in found.items() if parts}


def parts_read(config: RunConfig, stage: str) -> tuple[str, ...]:
    """The parts that a stage reads instead of computing them.

    Raises:
      FileNotFoundError, ValueError: `data.precomputed` names a folder without a manifest that can be read.
    """
    if not config.data.precomputed:
        return ()
    stored = read_manifest(config.data.precomputed).parts
    return tuple(part for part in config.precomputable(stage) if part in stored)


def notes(config: RunConfig) -> Iterator[str]:
    """A line that says what the stages of a run read of precomputed inputs, and which of them compute."""
    read = {stage: parts_read(config, stage) for stage in config.distinct_stages()}
    if not config.data.precomputed:
        return
    told = [f"{', '.join(parts)} in {stage}" for stage, parts in read.items() if parts]
    others = [stage for stage, parts in read.items() if not parts]
    line = f"{config.data.precomputed} is read for {' and '.join(told) or 'no stage'}"
    yield f"{line}; nothing of it serves {', '.join(others)}: computed as before" if others else line


# what the inputs depend on


def made_of(config: RunConfig, model: UAE, parts: Collection[str], samples: int | None) -> dict[str, dict[str, Any]]:
    """What precomputed inputs depend on and is known before any data is read, by sections.

    Args:
      config: of the run.
      model: the description.
      parts: keys of `rollouts.frozen_inputs.FIELDS`.
      samples: how many samples of the run's order were counted; None for all examples.

    Raises:
      FileNotFoundError, ValueError: the model folder is absent, or the negative prompt is longer than a caption may be.
    """
    data, folder = config.data, model_folder(config.model.folder)
    words = processor_folder(folder)
    found: dict[str, dict[str, Any]] = {
        "captions": {
            "data.max_caption": data.max_caption,
            "data.control_tokens": data.control_tokens,
            "the tokenizer": _files_digest([words / name for name in WORDS]),
        },
        "data": _data_settings(config, samples),
    }
    if "latents" in parts:
        found["latents"] = {
            "data.image_size": data.image_size,
            "contents of SD3/vae": weights_digest(folder, ["SD3/vae"]),
        }
        found["latents"] |= {"data.jpeg": data.jpeg} if data.source == "folder" else {}
    if "states" in parts:
        template, names = model.template, language_folders(folder, config.model)
        if len(template.negative) > data.max_caption:
            raise ValueError(
                f"the negative prompt has {len(template.negative)} tokens, more than config.data.max_caption = "
                f"{data.max_caption}: states of captions cannot be precomputed; raise data.max_caption, or give "
                "--parts=latents"
            )
        found["states"] = {
            "contents of the language model": weights_digest(folder, names),
            "precision of the language model": _language_precision(config),
            "model.dtype": config.model.dtype,
            "the chat template": json_digest([template.prefix, template.suffix]),
        }
    return found


def _language_precision(config: RunConfig) -> str:
    """In which the stages that can read states hold the language model.

    Raises:
      ValueError: not all of them in the same.
    """
    held = {stage: config.language_precision(stage) for stage, parts in readers(config).items() if "states" in parts}
    if len(set(held.values())) > 1:
        told = " and ".join(f"{stage} in {dtype}" for stage, dtype in held.items())
        raise ValueError(
            f"the language model is held by {told}: one set of states does not serve both; run these stages one by "
            "one, or give --parts=latents"
        )
    return next(iter(held.values()), config.model.frozen_dtype)


def _data_settings(config: RunConfig, samples: int | None) -> dict[str, Any]:
    """Settings that choose the examples and their captions."""
    data = config.data
    names = {
        "scenes": ("detail", "mistakes"),
        "emoji": ("detail", "mistakes"),
        "tfds": ("name", "split", "image_key", "caption_key"),
        "folder": ("caption_choice",),
    }
    found: dict[str, Any] = {f"data.{name}": getattr(data, name) for name in ("source", *names[data.source])}
    if data.source in ("scenes", "emoji"):
        found |= {"seed": config.seed, "data.image_size": data.image_size}
    return found if samples is None else found | {"seed": config.seed, "examples": samples}


def images_of(data: OpenedData) -> list[dict[str, Any]]:
    """What tells the images and captions of the training folders from others; of other sources their length."""
    if not data.trained_folders:
        return [{"images": len(data.train)}]
    sources = Distinct(data.train).sources
    found = []
    for folder, source in zip(data.folders[: data.trained_folders], sources, strict=True):
        assert folder.inspection is not None and isinstance(source, FolderSource)
        found.append(
            {
                "images": len(source),
                "names": source.digest(),
                "contents": folder.inspection.contents,
                "captions": source.captions_digest(),
            }
        )
    return found


def _files_digest(paths: list[pathlib.Path]) -> str:
    """A digest of the contents of those files that exist, 16 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=8)
    for path in paths:
        if path.is_file():
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


# whether they fit


OWN_ENCODER = (
    "inputs of a decoder with a text encoder of its own cannot be precomputed, since the states of one caption are "
    "megabytes"
)


def mistakes(config: RunConfig, model: UAE) -> Iterator[str]:
    """Why the precomputed inputs of a run cannot be used, one line each, from what is known before data is read."""
    if not config.data.precomputed:
        return
    if model.own_encoder:
        yield f"data.precomputed is {config.data.precomputed!r}: {OWN_ENCODER}; leave it out"
        return
    folder = to_path(config.data.precomputed)
    manifest = read_manifest(folder)
    if problem := shard_problem(folder, manifest):
        yield problem
        return
    used = {stage: [part for part in parts if part in manifest.parts] for stage, parts in readers(config).items()}
    parts = {part for stage in used for part in used[stage]}
    samples = manifest.made_of["data"].get("examples")
    changed = setting_changes(manifest.made_of, made_of(config, model, parts, samples))
    if changed:
        yield f"{folder} was computed for other inputs: {'; '.join(changed)}; {REMEDY}"
    for stage in [stage for stage in used if used[stage] and samples is not None]:
        settings = config.stage(stage)
        if settings.steps * settings.batch_size > samples:
            yield (
                f"{stage} reads {settings.steps * settings.batch_size:,} examples ({settings.steps:,} steps of "
                f"{settings.batch_size}), and {folder} holds the first {samples:,}; compute the rest by `{COMMAND} "
                f"--out={folder} --examples={settings.steps * settings.batch_size}` with the --config flags of the run"
            )


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The rows in which the sections of `now` differ from those of a manifest, without the images."""
    sections = [section for section in now if section != "images"]
    changed = [line for section in sections for line in differences(before.get(section, {}), now[section])]
    return list(dict.fromkeys(changed))


def images_change(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """How the images of `images_of` differ, in words; empty where they do not."""
    if before == now:
        return ""
    counts = [sum(part["images"] for part in parts) for parts in (before, now)]
    kinds = sorted({name for a, b in zip(before, now) for name in b if a.get(name) != b[name]} - {"images"})
    told = f"{counts[0]:,} images then and {counts[1]:,} now" + (f", other {' and '.join(kinds)}" if kinds else "")
    return told + (", where config.evaluation.images holds out some" if counts[0] != counts[1] else "")


@dataclasses.dataclass(frozen=True)
class PrecomputedInputs:
    """A folder that fits a run.

    Attributes:
      folder: where it lies.
      stored: its records.
      numbers: of the examples that are stored (`data.precomputed.first_read`); None for all.
      room: {array: length to which it is filled}.
    """

    folder: pathlib.Path
    stored: StoredExamples
    numbers: list[int] | None
    room: Mapping[str, int]

    @property
    def line(self) -> str:
        """What to tell of it."""
        manifest = self.stored.manifest
        size = sum(manifest.shards) / 1e9
        return f"data: {' and '.join(manifest.parts)} of {manifest.examples:,} examples are read ({size:.2f} GB)"

    def loaded(
        self, source: Source, rows: RowBuilder, reads: frozenset[str]
    ) -> tuple[PrecomputedSource, PrecomputedRows]:
        """Source and rows of a loader whose batches have the fields `reads`; what is stored is not made again.

        Args:
          source: the examples of the stage.
          rows: for the fields that are not stored.
          reads: names of fields.
        """
        stored = {field for part in self.stored.manifest.parts for field in FIELDS[part]}.union(CAPTION_FIELDS)
        made = reads - stored - {"sample_id"}
        whole = PrecomputedSource(source, self.stored, self.numbers, whole=bool(made))
        return whole, PrecomputedRows(rows.only(made), reads & stored, self.room)


def check_images(config: RunConfig, data: OpenedData) -> None:
    """Checks that the images and captions of a run are those of its precomputed inputs, before any weights are read.

    Raises:
      FileNotFoundError, ValueError: they are not, in one line.
    """
    if not config.data.precomputed or not readers(config):
        return
    before = read_manifest(config.data.precomputed).made_of["images"]["folders"]
    if told := images_change(before, images_of(data)):
        raise ValueError(f"the images are not those of {config.data.precomputed} ({told}); {REMEDY}")


def open_inputs(config: RunConfig, model: UAE, data: OpenedData) -> PrecomputedInputs | None:
    """The precomputed inputs of a run; None where it has none, or no stage that reads them.

    Raises:
      FileNotFoundError, ValueError: they do not fit, in one line.
    """
    if not config.data.precomputed or not readers(config):
        return None
    folder = to_path(config.data.precomputed)
    manifest = read_manifest(folder)
    for mistake in mistakes(config, model):
        raise ValueError(mistake)
    samples = manifest.made_of["data"].get("examples")
    numbers = None if samples is None else first_read(data.train, config.seed, samples)
    caption = config.data.max_caption
    room = {"caption_ids": caption, "text_states": model.template.length(caption)}
    return PrecomputedInputs(folder, StoredExamples(folder, manifest), numbers, room)


def compare(
    inputs: PrecomputedInputs, model: UAE, parts: Mapping, source: Source, rows: RowBuilder, mesh: Mesh
) -> None:
    """Computes a few examples again, from the first to the last, and compares them with what is stored.

    Args:
      inputs: of the run.
      model, parts: the model on its mesh.
      source: of training.
      rows: of the run.
      mesh: whose devices share the examples.

    Raises:
      ValueError: an example is not what is computed; the message names it. On every process.
    """
    names = inputs.stored.manifest.parts
    ways, (index, count) = mesh.shape["data"] * mesh.shape["fsdp"], sharding.batch_slice(mesh)
    records = spread(len(inputs.stored), -(-COMPARED // ways) * ways)
    place = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    compute = jax.jit(lambda parts, batch: encoded(model, parts, batch, names), out_shardings=place)
    needed = {"latents": "vae", "states": "language"}
    read = {needed[name]: parts[needed[name]] for name in names}
    made, examples, problem = rows.only(("pixels", *CAPTION_FIELDS)), Distinct(source), ""
    for first in range(0, len(records), ways):
        own = records[first + index * (ways // count) :][: ways // count]
        numbers = own if inputs.numbers is None else [inputs.numbers[record] for record in own]
        fields = [made(0, examples[number]) for number in numbers]
        batch = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
        with sharding.in_use(mesh):
            found = compute(read, sharding.shard_batch(batch, mesh))
        host = {name: sharding.local_rows(leaf) for name, leaf in found.items()} | batch
        for at, record in enumerate(own):
            row = {name: leaf[at] for name, leaf in host.items()}
            wrong = _difference(row, dict(padded(inputs.stored[record], inputs.room)))
            problem = problem or (wrong and f"{wrong} of example {examples[numbers[at]].id}")
    if not processes.all_agree(not problem):
        told = problem or "what another process has read"
        raise ValueError(f"{inputs.folder} does not hold what this run computes: {told}; {REMEDY}")


def _difference(computed: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]) -> str:
    """The first field of an example in which the two differ, and by how much; empty where none does."""
    for name in [name for name in stored if stored[name].dtype in (np.int32, np.bool_)]:
        if not np.array_equal(computed[name], stored[name]):
            return f"other {name}"
    for name in [name for name in stored if name not in (*CAPTION_FIELDS, "text_mask")]:
        new, old = (np.asarray(fields[name], np.float32) for fields in (computed, stored))
        if name == "text_states":
            new = new[stored["text_mask"]]
            old = old[stored["text_mask"]]
        gap = float(np.linalg.norm(new - old) / max(np.linalg.norm(new), 1e-12))
        dtype = stored[name].dtype.name
        bound = BOUND_OF_CPU if platform() == "cpu" and dtype == "float32" else BOUNDS[dtype]
        if not gap <= bound:
            return f"{name} differs by {gap:.2g} of its size (bound {bound:g})"
    return ""
