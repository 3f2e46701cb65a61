"""What a run does between its steps: held-out scores, checkpoints, and the export at its end."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from uae_jax.nn.attention import use_attention
from uae_jax.planning.chips import Topology
from uae_jax.planning.estimate import share
from uae_jax.planning.flops import Count, count_work
from uae_jax.planning.loading import held_parts
from uae_jax.planning.roofline import MeshSizes, Rollout, roofline
from uae_jax.stages.batching import whole_batch
from uae_jax.stages.kinds import AnyAbstract, kind_of_model
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Scoring:
    """One pass of held-out scores.

    Counted are captions, reconstructions at each guidance scale, and similarities. Drawings of true captions, prompts
    and questions are left out: only the data decide whether there are any.

    Attributes:
      name: of the pass; when: what starts it.
      images: that are scored; batch: of one compiled call, over all devices.
      flops: of the pass, over all chips.
      seconds: the least, see `roofline`.
    """

    name: str
    when: str
    images: int
    batch: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Writing:
    """What is written to the workdir.

    Attributes:
      name: of what is written; when: what starts it.
      size: bytes over all devices.
      device: bytes of each device; those of an export pass through the first process alone.
    """

    name: str
    when: str
    size: int
    device: float


@dataclasses.dataclass(frozen=True)
class Between:
    """All of a run, in order."""

    scoring: tuple[Scoring, ...]
    writing: tuple[Writing, ...]

    def lines(self) -> list[str]:
        """Two tables in Markdown."""
        lines = ["Between the steps, at least:", "", "| scores | when | images | batch | FLOPs | bound s |"]
        lines.append("|---|---|---|---|---|---|")
        for row in self.scoring:
            seconds = f"{row.seconds:.2f}" if math.isfinite(row.seconds) else "-"
            lines.append(f"| {row.name} | {row.when} | {row.images} | {row.batch} | {row.flops:.2e} | {seconds} |")
        lines += ["", "| written | when | GB | GB a device |", "|---|---|---|---|"]
        for row in self.writing:
            lines.append(f"| {row.name} | {row.when} | {row.size / GB:.2f} | {row.device / GB:.2f} |")
        return lines


def plan_between(config: RunConfig, system: AnyAbstract, topology: Topology, sizes: MeshSizes) -> Between:
    """Counts what happens between the steps of a configuration's stages.

    Args:
      config: of the run.
      system: without weights, with the run's adapters.
      topology: where it runs.
      sizes: of the mesh.
    """
    return Between(_scoring(config, system, topology, sizes), _writing(config, system, sizes))


def _scoring(config: RunConfig, system: AnyAbstract, topology: Topology, sizes: MeshSizes) -> tuple[Scoring, ...]:
    settings, every = config.evaluation, config.loop.eval_every
    batch = whole_batch(settings.batch_size, sizes)
    once, again, rollout = _batch_work(config, system, batch)
    passes = [("complete", "before and after each stage", settings.images, once + again)]
    if every:
        images = min(settings.images_during, settings.images)
        passes.append(("during", f"every {every} steps of RL", images, once))
    found = []
    for name, when, images, work in passes:
        count = work * -(-images // batch)
        bound = roofline(count, count.flops, topology, sizes, rollout)
        found.append(Scoring(name, when, images, batch, count.flops, bound.seconds))
    return tuple(found)


def _batch_work(config: RunConfig, system: AnyAbstract, batch: int) -> tuple[Count, Count, Rollout]:
    """Work of one batch, that of reconstructions at another guidance scale, and the captioner's layout."""
    no_rows: Any = None
    evaluator = kind_of_model(system.model).evaluator(config, system, (), no_rows, None)
    parts, room = held_parts(config, system), config.data.max_caption
    rows = {name: leaf for name, leaf in system.batch(batch).items() if not name.startswith("caption")}
    said = {
        "tokens": jax.ShapeDtypeStruct((batch, room), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, room), bool),
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    with use_attention("plain"):
        written = count_work(lambda parts, rows: evaluator.write(parts, rows).tokens, (parts, rows), (0,), trips=room)
        image = jax.ShapeDtypeStruct((batch, config.data.image_size, config.data.image_size, 3), jnp.float32)
        compared = count_work(evaluator.compare, (parts["encoders"], image, image), (0,))

        def drawn(how: Any) -> Count:
            draw = lambda parts, rows, said: evaluator.rebuild(how, parts, rows, said)  # noqa: E731
            return compared + count_work(draw, (parts, rows, said), (0,), trips=room)

        other = config.evaluation.also_guidance_scale
        again = drawn(dataclasses.replace(evaluator.drawing, guidance_scale=other)) if other else Count()
        once = written + drawn(evaluator.drawing)
    return once, again, Rollout(0.0) if evaluator.gather_weights else Rollout()


def _writing(config: RunConfig, system: AnyAbstract, sizes: MeshSizes) -> tuple[Writing, ...]:
    saved, trained = "every {} steps, or {:g} minutes", "at its end"
    loop, found, exported = config.loop, [], dict(system.parts)
    when = saved.format(loop.save_every, loop.save_every_minutes) if loop.save_every else trained
    for stage in config.distinct_stages():
        program = make_program(config, system, system.parts, system.batch, stage)
        found.append(_written(f"checkpoint of {stage}", when, program.state, sizes))
        found.append(_written(f"what {stage} trained", trained, program.state.params, sizes))
        exported |= program.state.params
    names = kind_of_model(system.model).exported(exported)
    width = jnp.dtype(loop.export_dtype).itemsize
    size = sum(width * leaf.size for name in names for leaf in jax.tree.leaves(exported[name]))
    return (*found, Writing("export", "at the end of the run, by the first process", size, float(size)))


def _written(name: str, when: str, tree: Any, sizes: MeshSizes) -> Writing:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return Writing(name, when, size, share(tree, sizes))
