"""Computes what frozen parts make of a data set, once: latents of images and states of captions, in shards.

A shard is written whole or not at all, and its bytes depend on its own examples alone. A call that was ended goes on
with the first shard that is not there. Every process of a run computes a slice of each batch, of a shard of its own.
"""

import dataclasses
import itertools
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from uae_jax import sharding
from uae_jax.data.loader import RowBuilder, make_loader
from uae_jax.data.precomputed import (
    FILE,
    Distinct,
    Kind,
    Manifest,
    Picked,
    first_read,
    read_manifest,
    records_in,
    shard_examples_of,
    spread,
    write_manifest,
    write_shard,
)
from uae_jax.data.sources import SceneSource
from uae_jax.data.tokenizer import load_tokenizer
from uae_jax.files.paths import is_url, problem, to_path
from uae_jax.files.whole import remove_partial
from uae_jax.models.uae import UAE
from uae_jax.rollouts.captioning import CAPTION_FIELDS
from uae_jax.rollouts.frozen_inputs import FIELDS, encoded
from uae_jax.settings import Mistakes, differences
from uae_jax.stages.abstract import AbstractSystem
from uae_jax.stages.checks import find_mistakes, missing_captions, read_config, read_model
from uae_jax.stages.data import OpenedData, open_data, row_builder
from uae_jax.stages.precomputed import OWN_ENCODER, images_change, images_of, made_of, readers, setting_changes
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import load_frozen, model_folder, processor_folder
from uae_jax.training import processes
from uae_jax.training.lock import NAME, workdir_lock
from uae_jax.training.summary import versions

LOOKED_AT = 64  # captions whose lengths make the estimate of bytes
WEIGHTS = {"latents": "vae", "states": "language"}  # the part of the model behind each


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
      out: folder of the shards.
      parts: keys of `rollouts.frozen_inputs.FIELDS`; none for all that the stages of the run can read.
      examples: of the run's order; 0 for a whole data set, or for what the stages read of endless scenes.
      batch_size: examples that are computed at once; 0 for those of a micro-batch.
      shard_examples: of a shard; 0 for shards of 256 MiB.
      dry_run: whether to say what would be done, and end.
    """

    out: pathlib.Path
    parts: tuple[str, ...] = ()
    examples: int = 0
    batch_size: int = 0
    shard_examples: int = 0
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """What is computed.

    Attributes:
      config: of the run.
      model: the description.
      manifest: of the folder when it is complete, without the sizes of shards.
      examples: those of the training source, each once.
      numbers: of the examples, by record.
      rows: makes the fields that are encoded.
      batch: examples that are computed at once.
      tokens: of a caption on average, by a look at some.
    """

    config: RunConfig
    model: UAE
    manifest: Manifest
    examples: Distinct
    numbers: Sequence[int]
    rows: RowBuilder
    batch: int
    tokens: float

    @property
    def example_bytes(self) -> dict[str, float]:
        """Bytes of an average example by part; captions have a key of their own."""
        template = len(self.model.template.prefix) + len(self.model.template.suffix)
        lengths = {"caption_ids": self.tokens, "text_states": self.tokens - 1 + template}  # without the stop token
        size = {name: kind.byte_size(lengths.get(name, 1)) for name, kind in self.manifest.arrays.items()}
        parts = {part: sum(size.get(field, 0) for field in FIELDS[part]) for part in self.manifest.parts}
        return parts | {"captions": size["caption_ids"]}


def precompute(config: Mapping[str, Any], request: Request, mistakes: Sequence[str] = ()) -> None:
    """Computes and writes, or goes on where an earlier call was ended.

    Args:
      config: of a file in `configs/`.
      request: what to compute.
      mistakes: found before, such as those of the command line.

    Raises:
      ValueError, FileNotFoundError: settings, model, data or folder do not fit, one line each.
    """
    if config.get("data", {}).get("precomputed"):
        raise ValueError("config.data.precomputed is what this command makes; leave it out, and name a folder by --out")
    settings, system, parts = checked(config, request, mistakes)
    mesh = sharding.make_mesh(settings.mesh)
    data = open_data(settings.data, settings.seed, settings.evaluation.images)
    if found := list(missing_captions(settings, data)):
        raise ValueError(found[0])
    before = read_manifest(request.out) if (request.out / FILE).is_file() else None
    job = make_job(settings, system, data, parts, mesh, request, before)
    pending = processes.of_first(np.array(missing_shards(request.out, job.manifest, before)))
    shards = [int(shard) for shard in np.flatnonzero(pending)]
    todo = sum(job.manifest.size(shard) for shard in shards)
    tell([*data.lines, *plan_lines(job, request, todo, len(shards))])
    check_room(request.out, todo * sum(job.example_bytes.values()))
    if request.dry_run:
        return
    request.out.mkdir(exist_ok=True)
    processes.check_shared(request.out, "--out")
    with workdir_lock(request.out, "--out"):
        if shards:
            if jax.process_index() == 0:
                remove_partial(request.out)
                write_manifest(request.out, job.manifest)
            processes.wait_for_all("manifest begun")
            weights = load_frozen(
                settings.model, [WEIGHTS[part] for part in parts], mesh=mesh, frozen=settings.frozen_from_start()
            )
            write_shards(job, weights, mesh, request.out, shards)
            processes.wait_for_all("shards written")
        if jax.process_index() == 0 and (shards or before is None or before.shards == ()):
            names = [request.out / job.manifest.name(shard) for shard in range(job.manifest.count)]
            sizes = tuple(path.stat().st_size for path in names)
            write_manifest(request.out, dataclasses.replace(job.manifest, shards=sizes))
    processes.wait_for_all("manifest written")
    size = sum(read_manifest(request.out).shards)
    tell(
        [
            f"done: {request.out} holds {job.manifest.examples:,} examples in {job.manifest.count:,} "
            f"shard{'s' if job.manifest.count != 1 else ''}, {as_bytes(size)}; train with "
            f"--config.data.precomputed={request.out}"
        ]
    )


def checked(
    config: Mapping[str, Any], request: Request, mistakes: Sequence[str]
) -> tuple[RunConfig, AbstractSystem, tuple[str, ...]]:
    """The settings of the run, the shapes of its model and the parts to compute, after all checks that need no weights.

    Raises:
      Mistakes: one line each.
      ValueError, FileNotFoundError: the request does not fit the run.
    """
    settings, found = read_config(config)
    if found := [*mistakes, *found, *find_mistakes(settings, None)]:
        raise Mistakes(found)
    parts = chosen_parts(settings, request.parts)
    check_folder(settings, request.out)
    system, found = read_model(settings)
    if not isinstance(system, AbstractSystem) or found:
        raise Mistakes(found)
    if system.model.own_encoder:
        raise ValueError(f"{settings.model.folder or settings.model.sizes}: {OWN_ENCODER}")
    return settings, system, parts


def tell(lines: Iterable[str], stream: Any = None) -> None:
    """Prints lines, in the first of several processes."""
    if jax.process_index() == 0:
        for line in lines:
            print(line, file=stream or sys.stdout, flush=True)


# what is asked for


def chosen_parts(config: RunConfig, wanted: Sequence[str]) -> tuple[str, ...]:
    """The parts to compute.

    Raises:
      ValueError: an unknown part, or one that no stage of the run can read.
    """
    known = readers(config)
    possible = [part for part in FIELDS if any(part in parts for parts in known.values())]
    for part in wanted:
        if part not in FIELDS:
            raise ValueError(f"--parts names {part!r}; the parts are {', '.join(FIELDS)}")
    if not possible:
        stages = ", ".join(config.distinct_stages()) or "no stage"
        raise ValueError(
            f"this configuration runs {stages}, and that reads nothing that can be precomputed; give the one of "
            "pretrain, align or cold_start"
        )
    for part in wanted:
        if part not in possible:
            told = "; ".join(f"{stage} reads {', '.join(parts)}" for stage, parts in known.items())
            raise ValueError(f"no stage of this configuration can read {part} ({told}); leave it out of --parts")
    return tuple(part for part in possible if not wanted or part in wanted)


def check_folder(config: RunConfig, out: pathlib.Path) -> None:
    """Checks that a folder can be written to, and is none of the data.

    Raises:
      ValueError, FileNotFoundError: it cannot be used.
    """
    if found := problem(out, write=True):
        raise OSError(found)
    if not is_url(out) and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {out.absolute().parent} that --out needs does not exist; make it first")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; name a folder")
    others = [path.name for path in out.iterdir() if path.name != NAME and path.name[0] != "."] if out.is_dir() else []
    if others and FILE not in others:
        raise ValueError(f"--out={out} holds {others[0]} and no {FILE}; name a new folder")
    folders = [config.data.folder, *(folder for folder, _ in config.data.mixture_parts()), config.data.heldout_folder]
    for folder in [to_path(folder).resolve() for folder in folders if folder]:
        if out.resolve().is_relative_to(folder):
            raise ValueError(f"--out={out} lies in the data folder {folder}, and would be read as data; name another")


def counted_samples(config: RunConfig, data: OpenedData, examples: int) -> int | None:
    """How many samples of the run's order are computed; None for every example.

    Scenes have no end: without a number, those that the longest stage reads are computed.
    """
    longest = max(config.stage(stage).steps * config.stage(stage).batch_size for stage in readers(config))
    samples = examples or (longest if isinstance(data.train, SceneSource) else len(data.train))
    if samples < longest and samples < len(data.train):
        tell([f"note: a stage reads {longest:,} examples, more than --examples={samples}"], sys.stderr)
    return None if samples >= len(data.train) else samples


def make_job(
    config: RunConfig,
    system: AbstractSystem,
    data: OpenedData,
    parts: tuple[str, ...],
    mesh: Mesh,
    request: Request,
    before: Manifest | None,
) -> Job:
    """What is computed, as an earlier call in the same folder had it.

    Raises:
      ValueError: the folder holds inputs of other weights, settings or images, or a batch that does not divide.
    """
    samples = counted_samples(config, data, request.examples)
    earlier = before.made_of["data"].get("examples") if before else None
    if samples is not None and earlier is not None:
        samples = max(samples, earlier)  # a folder may grow: its order is that of the run
    examples = Distinct(data.train)
    numbers = range(len(examples)) if samples is None else first_read(data.train, config.seed, samples)
    words = processor_folder(model_folder(config.model.folder))
    rows = row_builder(config.data, load_tokenizer(words, config.data.control_tokens), system.processor)
    wanted = ("pixels", *CAPTION_FIELDS) if "latents" in parts else CAPTION_FIELDS
    manifest = Manifest(
        made_of(config, system.model, parts, samples) | {"images": {"folders": images_of(data)}},
        parts,
        kinds_of(system.model, parts),
        len(numbers),
        1,
        made_by=versions() | {"device": jax.devices()[0].device_kind},
    )
    batch = batch_of(config, mesh, request.batch_size)
    looked = [examples[numbers[at]] for at in spread(len(numbers), min(LOOKED_AT, len(numbers)))]
    lengths = [rows.caption_fields(example.caption or "")["caption_mask"].sum() for example in looked]
    job = Job(config, system.model, manifest, examples, numbers, rows.only(wanted), batch, float(np.mean(lengths)))
    size = request.shard_examples or shard_examples_of(sum(job.example_bytes.values()), len(numbers), batch)
    if before:
        check_same(request, before, manifest)
        size = before.shard_examples
    return dataclasses.replace(job, manifest=dataclasses.replace(manifest, shard_examples=size))


def kinds_of(model: UAE, parts: Sequence[str]) -> dict[str, Kind]:
    """The arrays of an example, by name."""
    moments, ((_, width), dtype) = Kind(model.latent_shape, "float32"), model.decoder.states_shape(1)
    kinds = {"caption_ids": Kind((None,), "int32")}
    kinds |= {"latent_mean": moments, "latent_log_variance": moments} if "latents" in parts else {}
    return kinds | ({"text_states": Kind((None, width), np.dtype(dtype).name)} if "states" in parts else {})


def batch_of(config: RunConfig, mesh: Mesh, wanted: int) -> int:
    """Examples that are computed at once: as asked for, or as in a micro-batch of a stage.

    Raises:
      ValueError: they do not divide over the devices.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    settings = [config.stage(stage) for stage in readers(config)]
    own = min(stage.batch_size // (stage.micro_batches * stage.updates_per_rollout) for stage in settings)
    batch = wanted or max(own // ways, 1) * ways
    if batch % ways:
        raise ValueError(f"--batch_size is {batch}; it must be a multiple of the {ways} devices that share the batch")
    return batch


def check_same(request: Request, before: Manifest, now: Manifest) -> None:
    """Checks that a folder was begun for the same inputs.

    Raises:
      ValueError: it was not; names what differs.
    """
    old, new = (dict(manifest.made_of) for manifest in (before, now))
    for made in (old, new):  # a folder may grow, and one that has all examples is another
        made["data"] = {**made["data"], "examples": "the first" if "examples" in made["data"] else "all"}
    changed = setting_changes(old, new) + differences({"--parts": before.parts}, {"--parts": now.parts})
    if images := images_change(before.made_of["images"]["folders"], now.made_of["images"]["folders"]):
        changed.append(images)
    if request.shard_examples not in (0, before.shard_examples):
        changed.append(f"--shard_examples was {before.shard_examples} and is {request.shard_examples}")
    if changed:
        raise ValueError(
            f"--out={request.out} holds inputs that were computed for others: {'; '.join(changed)}; name another "
            "folder, or delete that one"
        )


# what is there, and what is told


def missing_shards(out: pathlib.Path, manifest: Manifest, before: Manifest | None) -> list[bool]:
    """Whether each shard is still to be written: it is not there, not whole, or shorter than it is to be."""
    sizes = before.shards if before else ()

    def missing(shard: int) -> bool:
        path = out / manifest.name(shard)
        if not path.is_file() or (shard < len(sizes) and path.stat().st_size != sizes[shard]):
            return True
        return records_in(path) != manifest.size(shard)

    return [missing(shard) for shard in range(manifest.count)]


def plan_lines(job: Job, request: Request, todo: int, shards: int) -> Iterator[str]:
    """What will be computed, for whom, and how many bytes."""
    manifest, size = job.manifest, job.example_bytes
    read = [
        f"{' and '.join(part for part in parts if part in manifest.parts)} for {stage}"
        for stage, parts in readers(job.config).items()
        if set(parts) & set(manifest.parts)
    ]
    yield f"precompute: {', '.join(read)}"
    told = [f"{part} {as_bytes(size[part])}" for part in manifest.parts]
    if "states" in manifest.parts:
        told[-1] += f" ({job.tokens:.0f} tokens a caption)"
    total = manifest.examples * sum(size.values())
    line = f"precompute: {manifest.examples:,} examples; {', '.join(told)} an example; about {as_bytes(total)}"
    yield f"{line} in {manifest.count:,} shard{'s' if manifest.count != 1 else ''} of {request.out}"
    if todo < manifest.examples:
        there = manifest.count - shards
        yield f"precompute: {there:,} shard{'s are' if there != 1 else ' is'} there; {todo:,} examples are left"


def as_bytes(size: float) -> str:
    """A size in words, such as 1.3 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def check_room(out: pathlib.Path, needed: float) -> None:
    """Checks that the disk has room; a bucket has.

    Raises:
      ValueError: it has not.
    """
    if is_url(out):
        return
    free = shutil.disk_usage(out if out.is_dir() else out.absolute().parent).free
    if needed > free:
        raise ValueError(
            f"about {as_bytes(needed)} are needed, and {as_bytes(free)} are free where --out={out} lies; choose "
            "another disk, --parts=latents, or fewer --examples"
        )


# the work


def write_shards(job: Job, weights: Mapping, mesh: Mesh, out: pathlib.Path, shards: Sequence[int]) -> None:
    """Computes and writes shards; the processes take them in turn, as many at a time as there are slices of a batch."""
    index, count = sharding.batch_slice(mesh)
    first = next(process for process in range(jax.process_count()) if sharding.batch_slice(mesh, process)[0] == index)
    local, writes = job.batch // count, jax.process_index() == first
    turns = [shards[at : at + count] for at in range(0, len(shards), count)]
    steps = [-(-max(job.manifest.size(shard) for shard in turn) // local) for turn in turns]
    own = [turn[index] if index < len(turn) else None for turn in turns]
    records = itertools.chain.from_iterable(
        filled([] if shard is None else job.manifest.records(shard), number * local)
        for shard, number in zip(own, steps)
    )
    numbers = [job.numbers[record] for record in records]
    batches = make_loader(
        Picked(job.examples, numbers), job.rows, local, shuffle=False, repeat=False, reading=job.config.data.reading
    )
    rows = sum(job.manifest.size(shard) for shard in own if shard is not None)
    name = "precompute" if count == 1 else f"precompute, process {jax.process_index()} of {jax.process_count()}"
    with tqdm(total=rows, desc=name, unit="example", disable=None if jax.process_index() == 0 else True) as bar:
        results = encoded_batches(job, weights, mesh, batches)
        try:
            for shard, number in zip(own, steps):
                size = 0 if shard is None else job.manifest.size(shard)
                examples = shard_rows(results, number, size, bar)
                if shard is None or not writes:
                    for _ in examples:
                        pass
                else:
                    write_shard(out / job.manifest.name(shard), examples)
        finally:
            batches.close()


def filled(records: Sequence[int], length: int) -> list[int]:
    """Records at a fixed length, the last one (or the first of all) repeated; those more are computed in vain."""
    return [*records, *[records[-1] if records else 0] * (length - len(records))]


def encoded_batches(
    job: Job, weights: Mapping, mesh: Mesh, batches: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of every batch with what was computed of them; the next batch is computed meanwhile."""
    names, model = job.manifest.parts, job.model
    place = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    compute = jax.jit(lambda parts, batch: encoded(model, parts, batch, names), out_shardings=place)

    waiting: tuple[Mapping[str, np.ndarray], dict[str, jax.Array]] | None = None

    def on_host() -> dict[str, np.ndarray]:
        assert waiting is not None
        return {**waiting[0], **{name: sharding.local_rows(leaf) for name, leaf in waiting[1].items()}}

    for batch in batches:
        with sharding.in_use(mesh):
            begun = batch, compute(weights, sharding.shard_batch(dict(batch), mesh))
        if waiting is not None:
            yield on_host()
        waiting = begun
    if waiting is not None:
        yield on_host()


def shard_rows(
    results: Iterator[Mapping[str, np.ndarray]], steps: int, size: int, bar: tqdm
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of the first `size` examples of the next `steps` batches; all of these are taken."""
    for _ in range(steps):
        batch = next(results)
        rows = min(size, len(batch["caption_ids"]))
        for at in range(rows):
            row = {name: leaf[at] for name, leaf in batch.items()}
            yield stored_arrays(row)
            bar.update(1)
        size -= rows


def stored_arrays(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is stored of a row: tokens without their padding."""
    found = {"caption_ids": row["caption_ids"][row["caption_mask"]]}
    found |= {name: row[name] for name in FIELDS["latents"] if name in row}
    return found | ({"text_states": row["text_states"][row["text_mask"]]} if "text_states" in row else {})
