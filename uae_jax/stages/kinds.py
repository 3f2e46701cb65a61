"""The kinds of models that a run can train: how each is read, described, fed, scored and written.

A folder decides which kind it is. A stage names the network that its method trains (`methods.method.network_of`). A
stranger's kind is one more entry of `KINDS`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from numpy.typing import DTypeLike

from uae_jax.data.loader import RowBuilder
from uae_jax.data.sources import Example
from uae_jax.methods import STAGES
from uae_jax.methods.method import network_of
from uae_jax.methods.stage_settings import denoising
from uae_jax.models.janus import config as janus_config
from uae_jax.models.janus.unified import Unified
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.uae import UAE, check_guidance, check_size
from uae_jax.rollouts.unified import DrawingConfig
from uae_jax.stages import abstract, export, unified_system, weights
from uae_jax.stages.abstract import AbstractSystem
from uae_jax.stages.data import row_builder
from uae_jax.stages.evaluation import DecoderEvaluator, Evaluator, UnifiedEvaluator
from uae_jax.stages.export import export_system
from uae_jax.stages.run_config import DataConfig, RunConfig
from uae_jax.stages.unified_system import (
    AbstractUnified,
    UnifiedSystem,
    abstract_unified,
    export_unified,
    load_unified,
    unified_rows,
)
from uae_jax.stages.weights import ModelConfig, System, model_folder

AnySystem = System | UnifiedSystem
AnyAbstract = AbstractSystem | AbstractUnified
EvaluatorOf = Callable[[RunConfig, Any, Sequence[Example], RowBuilder, Mesh | None], Evaluator]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of model; a `System` below is what `load` or `describe` gives.

    Attributes:
      title: in messages.
      network: type of its description, which methods name.
      holds: whether a model folder is of this kind.
      load: `weights.load_system` for it.
      describe: `abstract.abstract_folder` for it.
      rows: `(data settings, system)` to what turns examples into rows of a batch.
      evaluator: `(configuration, system, held-out images, rows, mesh)` to the scores of a run.
      export: `export.export_system` for it.
      exported: `export.written_parts` for it.
      questions: whether it answers the questions of `stages.understanding`.
      mistakes: `(configuration, description)` to the settings of all stages that the model cannot draw with.
    """

    title: str
    network: type
    holds: Callable[[pathlib.Path], bool]
    load: Callable[..., Any]
    describe: Callable[[RunConfig], Any]
    rows: Callable[[DataConfig, Any], RowBuilder]
    evaluator: EvaluatorOf
    export: Callable[[Any, Mapping, pathlib.Path, DTypeLike], None]
    exported: Callable[[Mapping], list[str]]
    questions: bool = False
    mistakes: Callable[[RunConfig, Any], Iterator[str]] = lambda config, model: iter(())

    @property
    def stages(self) -> list[str]:
        """The stages that train such a model."""
        return [name for name, stage in STAGES.items() if self.network in map(network_of, stage.methods.values())]


def _decoder_evaluator(
    config: RunConfig, system: System, heldout: Sequence[Example], rows: RowBuilder, mesh: Mesh | None
) -> Evaluator:
    scores = config.evaluation
    how = denoising(
        system.model, config.sampler, scores.sampler_steps, scores.guidance_scale, condition=config.condition()
    )
    room, gather = config.data.max_caption, config.stage("gen_for_und").gather_weights
    return DecoderEvaluator(system, scores, how, heldout, rows, room, config.seed, mesh=mesh, gather_weights=gather)


def _unified_evaluator(
    config: RunConfig, system: UnifiedSystem, heldout: Sequence[Example], rows: RowBuilder, mesh: Mesh | None
) -> Evaluator:
    stage = config.stage("unified_ar")
    how = DrawingConfig(config.evaluation.guidance_scale, SamplingConfig(stage.image_temperature), stage.vae_chunk)
    room, gather = config.data.max_caption, stage.gather_weights
    return UnifiedEvaluator(
        system, config.evaluation, how, heldout, rows, room, config.seed, mesh=mesh, gather_weights=gather
    )


def _drawing_mistakes(config: RunConfig, model: UAE) -> Iterator[str]:
    """Sizes and guidances that the decoder does not have; those of a stage are found in its program."""
    scores = config.evaluation
    given = {"guidance_scale": scores.guidance_scale, "also_guidance_scale": scores.also_guidance_scale or 1}
    checks: dict[str, Callable[[], None]] = {"data.image_size": lambda: check_size(model)}
    checks |= {f"evaluation.{name}": functools.partial(check_guidance, model, scale) for name, scale in given.items()}
    for name, check in checks.items():
        try:
            check()
        except ValueError as error:
            yield f"config.{name}: {error}"


def _load_unified(config: ModelConfig, *, negative_prompt: str = "", max_caption: int = 0, **options: Any) -> Any:
    """`load_unified`; the prompt without a caption is the network's own, and it has no scorer of captions."""
    return load_unified(config, **options)


DECODER = Kind(
    "UAE, a captioner with a diffusion decoder",
    UAE,
    lambda folder: True,  # the last of `KINDS`; `load` says what a folder lacks
    weights.load_system,
    abstract.abstract_folder,
    lambda data, system: row_builder(data, system.tokenizer, system.processor),
    _decoder_evaluator,
    export_system,
    export.written_parts,
    questions=True,
    mistakes=_drawing_mistakes,
)
UNIFIED = Kind(
    "Janus, one network that captions and draws",
    Unified,
    janus_config.holds,
    _load_unified,
    abstract_unified,
    unified_rows,
    _unified_evaluator,
    export_unified,
    unified_system.written_parts,
)
# the first that holds a folder is taken
KINDS = [UNIFIED, DECODER]


def kind_of(path: str | pathlib.Path) -> Kind:
    """The kind of the model behind a path, see `weights.model_folder`.

    Raises:
      FileNotFoundError, ValueError: there is no model.
    """
    folder = model_folder(path)
    return next(kind for kind in KINDS if kind.holds(folder))


def kind_of_model(model: Any) -> Kind:
    """The kind of a model's description."""
    return next(kind for kind in KINDS if isinstance(model, kind.network))


def load_system(config: ModelConfig, **options: Any) -> Any:
    """`weights.load_system` of whatever kind the folder holds."""
    return kind_of(config.folder).load(config, **options)


def abstract_folder(config: RunConfig) -> Any:
    """`abstract.abstract_folder` of whatever kind the folder holds."""
    return kind_of(config.model.folder).describe(config)
