"""A complete configuration as frozen dataclasses: what a file in `configs/` becomes."""

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

from uae_jax.data.formats import CAPTION_CHOICES, FORMATS
from uae_jax.data.loader import Reading
from uae_jax.methods import STAGES
from uae_jax.methods.stage_settings import DecodedRollouts, SamplerConfig, StageSettings
from uae_jax.methods.trained import COPY, LORA, STORABLE, copied_parts
from uae_jax.rollouts.frozen_inputs import FIELDS
from uae_jax.settings import LAST_SEED, Settings, as_dict, free_fields, sections, setting
from uae_jax.sharding import MeshConfig
from uae_jax.stages.evaluation import EvaluationConfig
from uae_jax.stages.inference_config import deciding_condition
from uae_jax.stages.weights import PRECISIONS, ModelConfig
from uae_jax.training.guard import GuardConfig
from uae_jax.training.watch import traced_steps

# of the official demo.py
CAPTION_PROMPT = (
    "You are an expert vision-language model.  \nYour task is: Given an input image, generate a **textual "
    'description** of the image. If there is text in the image, transcribe it inside double quotes "".  \nNow, '
    "carefully analyze the input image and output the full description. "
)
NEGATIVE_PROMPT = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
DETAILS = ("full", "detail", "mixed", "short")


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where images come from, and fixed shapes."""

    source: str = setting(
        "folder",
        "built-in scenes, emoji of fetch_emoji, a folder, or TFDS",
        choices=("scenes", "emoji", "folder", "tfds"),
    )
    folder: str = setting("", "folder of images in any format of docs/data.md, or of emoji", free=True)
    format: str = setting("", "of the folder; empty to find it out", choices=("", *FORMATS))
    mixture: tuple[str, ...] = setting((), "several folders instead of one, FOLDER=WEIGHT each, in any formats")
    name: str = setting("", "of a TFDS data set")
    split: str = setting("train", "of a TFDS data set, or of files that tell several, for training")
    data_dir: str = setting("", "where TFDS prepared the data set; empty for the default of TFDS", free=True)
    image_key: str = setting("image", "feature, column or field of the image")
    caption_key: str = setting("caption", "feature, column or field of the caption; in folders several, with commas")
    caption_choice: str = setting(
        "each", "which of several captions in a folder: in turn by image, or by length", choices=CAPTION_CHOICES
    )
    min_side: int = setting(8, "images of a folder with a shorter side are bad", unit="pixels", low=1)
    max_aspect: float = setting(20.0, "images of a folder whose sides differ by more than this factor are bad", low=1)
    bad_images: str = setting(
        "skip", "leave out broken, small, thin and duplicate images of a folder, or refuse", choices=("skip", "refuse")
    )
    heldout_folder: str = setting(
        "", "folder for scores; empty to hold out the last images of the training folder", free=True
    )
    heldout_split: str = setting("test", "of a TFDS data set, for scores")
    image_size: int = setting(512, "side of the square images", unit="pixels", low=8)
    max_prompt: int = setting(
        0, "room for the caption prompt with its image; 0 for what it needs", unit="tokens", low=0
    )
    max_caption: int = setting(512, "room for a caption with its stop token", unit="tokens", low=2)
    detail: str = setting("full", "captions of scenes and emoji in the supervised stages", choices=DETAILS)
    rl_detail: str = setting("mixed", "captions of scenes and emoji in the RL stages", choices=DETAILS)
    mistakes: float = setting(
        0.0, "probability that a fact of a scene's caption is wrong, in the supervised stages", low=0, high=1
    )
    caption_prompt: str = setting(CAPTION_PROMPT, "what the captioner is asked", source="released UAE demo")
    caption_system: str = setting("", "the system turn before it; empty for that of the chat template")
    negative_prompt: str = setting(NEGATIVE_PROMPT, "what guidance moves away from", source="released UAE demo")
    control_tokens: bool = setting(
        False, "names such as <|im_end|> in texts are control tokens, as in the release, and not plain text"
    )
    jpeg: str = setting(
        "scaled",
        "JPEGs of a folder that are more than twice as large as needed are decoded at 1/2, 1/4 or 1/8, or in full",
        choices=("scaled", "full"),
    )
    precomputed: str = setting(
        "",
        "folder of python -m uae_jax.precompute, whose latents and states the supervised stages read; empty to compute "
        "them in every step",
        free=True,
    )
    threads: int = setting(
        0,
        "that read and decode images, in each process that does; 0 shares the cores among them; speed alone",
        low=0,
        free=True,
    )
    workers: int = setting(
        0,
        "processes that read and decode beside each process of a run, 0 for none; speed alone",
        low=0,
        high=256,
        free=True,
    )

    @property
    def reading(self) -> Reading:
        """Threads and worker processes."""
        return Reading(self.threads, self.workers)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and a mixture that is not one."""
        yield from super().problems()
        for entry in self.mixture:
            try:
                folder, weight = _part(entry)
            except ValueError:
                folder, weight = "", 0.0
            if not folder or not (math.isfinite(weight) and weight > 0):
                yield f"mixture has the entry {entry!r}; write FOLDER=WEIGHT, with a weight above 0"
        if self.mixture and (self.folder or self.source != "folder"):
            what = f"folder={self.folder!r}" if self.folder else f"source={self.source!r}"
            yield f"mixture names the folders of a run; {what} cannot be set beside it"

    def mixture_parts(self) -> list[tuple[str, float]]:
        """(folder, weight) of each entry of the mixture."""
        return [_part(entry) for entry in self.mixture]


def _part(entry: str) -> tuple[str, float]:
    folder, _, weight = entry.rpartition("=")
    return folder.strip(), float(weight)


@dataclasses.dataclass(frozen=True)
class LoopSettings(Settings):
    """How often things are written, and how a run is watched."""

    log_every: int = setting(1, "steps between lines of metrics", unit="steps", low=1)
    save_every: int = setting(100, "steps between checkpoints; 0 for the end alone", unit="steps", low=0)
    eval_every: int = setting(100, "steps between held-out scores of the RL stages; 0 for never", unit="steps", low=0)
    save_every_minutes: float = setting(
        30.0, "a checkpoint also so long after the last one; 0 for never", unit="minutes", low=0
    )
    keep: int = setting(2, "newest checkpoints that are kept", low=1)
    hang_minutes: float = setting(
        30.0, "all stacks are written after so long without a step or score; 0 for never", unit="minutes", low=0
    )
    profile: str = setting("", "FIRST:LAST, the steps of each stage that are traced for a profiler; empty for none")
    export_dtype: str = setting("float32", "precision of the trained weights in export/", choices=PRECISIONS)
    wandb_project: str = setting("", "Weights & Biases project; empty for none")

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and steps of a trace that are none."""
        yield from super().problems()
        try:
            traced_steps(self.profile)
        except ValueError as error:
            yield str(error)


def _stage_sections() -> dict[str, type]:
    return {name: stage.settings for name, stage in STAGES.items()}


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings):
    """A complete configuration file. The section of each stage has the stage's name, as in `config.pretrain`."""

    preset: str = setting("", "name of the preset that the file was made from")
    seed: int = setting(0, "of all random numbers", low=0, high=LAST_SEED)
    stages: tuple[str, ...] = setting((), "stages in order; none to score a model alone")
    rounds: int = setting(1, "how often the RL stages are run, in turn", low=1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampler: SamplerConfig = SamplerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loop: LoopSettings = LoopSettings()
    guard: GuardConfig = GuardConfig()
    stage_settings: dict[str, Any] = sections(_stage_sections)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and stages that do not exist."""
        yield from super().problems()
        for name in self.stages:
            if name not in STAGES:
                yield f"stages names {name!r}; the stages are {', '.join(STAGES)}"
            elif self.model.decoder_weights == "int8" and {"transformer", f"transformer{COPY}"} & {*self.trains(name)}:
                yield f"{name} trains the transformer, which model.decoder_weights=int8 has rounded; train an adapter"

    def stage(self, name: str) -> Any:
        """The settings of a stage."""
        return self.stage_settings[name]

    def with_stage(self, name: str, **changes: Any) -> "RunConfig":
        """The configuration with other settings of a stage."""
        changed = dataclasses.replace(self.stage_settings[name], **changes)
        return dataclasses.replace(self, stage_settings={**self.stage_settings, name: changed})

    def order(self) -> list[tuple[str, str]]:
        """(run name, stage) in order; the RL stages repeat for every round, with the round's number from 2 on."""
        listed = [(stage, stage) for stage in self.stages]
        again = [stage for stage in self.stages if is_rl(stage, self)]
        return listed + [(f"{stage}_{number}", stage) for number in range(2, self.rounds + 1) for stage in again]

    def distinct_stages(self) -> list[str]:
        """The stages of `order`, each once."""
        return list(dict.fromkeys(stage for _, stage in self.order()))

    def trains(self, stage: str) -> tuple[str, ...]:
        """Names of the parts that a stage trains, see `methods.method.Method.trains`."""
        settings: StageSettings = self.stage_settings[stage]
        return STAGES[stage].method(settings).trains(settings)

    def needs_captions(self, stage: str) -> bool:
        """Whether a stage learns from the data set's captions, see `methods.method.Method.needs_captions`."""
        settings: StageSettings = self.stage_settings[stage]
        return STAGES[stage].method(settings).needs_captions(settings)

    def reads(self, stage: str, precomputed: Collection[str] = ()) -> frozenset[str]:
        """Names of the fields of a batch that a stage reads, see `methods.method.Method.reads`.

        Args:
          stage: its name.
          precomputed: parts that it reads instead of computing them (`precomputable`).
        """
        settings: StageSettings = self.stage_settings[stage]
        fields = {"sample_id", *STAGES[stage].method(settings).reads(settings)}
        replaced = {field for part in precomputed for field in self.precomputable(stage)[part]}
        return frozenset(fields - replaced).union(*(FIELDS[part] for part in precomputed))

    def precomputable(self, stage: str) -> dict[str, tuple[str, ...]]:
        """Parts that a stage can read instead of computing them, see `methods.method.Stage.precomputable`."""
        return STAGES[stage].precomputable(self.stage_settings[stage])

    def trained_from(self, stage: str) -> set[str]:
        """Parts that a stage or a later one trains as they are, and parts that a later one copies to fine-tune them.

        Adapters and copies have names of their own.
        """
        stages = [kind for _, kind in self.order()]
        first = stages.index(stage)
        later, begin = stages[first:], set(stages[first + 1 :]) - set(stages[: first + 1])
        trained = {name for kind in later for name in self.trains(kind) if not name.endswith((LORA, COPY))}
        return trained.union(*(copied_parts(self.trains(kind)) for kind in begin))

    def frozen_from_start(self) -> set[str]:
        """Parts that may be read in `model.frozen_dtype`: no stage trains them, and none copies them to train."""
        order = self.order()
        if not order:
            return set()
        copied = set().union(*(copied_parts(self.trains(stage)) for _, stage in order))
        return set(STORABLE) - self.trained_from(order[0][1]) - copied

    def language_precision(self, stage: str) -> str:
        """Precision in which a stage holds the reference language model, which encodes captions for the decoder."""
        return "float32" if "language" in self.trained_from(stage) else self.model.frozen_dtype

    def condition(self) -> str:
        """What the decoder reads of a caption when it is scored: what it reads in the RL stages of the run.

        Of several stages the last that is not `reference` decides.
        """
        known = [name for name, settings in self.stage_settings.items() if isinstance(settings, DecodedRollouts)]
        stages = [stage for stage in known if stage in self.stages] or known
        return deciding_condition([self.stage_settings[stage].condition for stage in stages])

    def identity(self, name: str) -> dict[str, Any]:
        """Everything that changes the numbers of a stage; a checkpoint of another identity is refused.

        That is what all stages share, and the settings of this stage and of those before it. What comes later may still
        change.

        Args:
          name: of the run's `order`.
        """
        order = self.order()
        upto = order[: [run_name for run_name, _ in order].index(name) + 1]
        values: dict[str, Any] = {part: as_dict(getattr(self, part)) for part in ("model", "data", "sampler", "guard")}
        if self.data.source == "folder" and not self.data.heldout_folder:
            values["evaluation"] = {"images": self.evaluation.images}  # these are taken from the training set
        if self.evaluation.questions and self.guard.understanding_fall:  # the answers may end a stage
            names = ("questions", "questions_during", "questions_by")
            values["questions"] = {name: getattr(self.evaluation, name) for name in names}
        values |= {"seed": self.seed, "order": [run_name for run_name, _ in upto]}
        return values | {stage: as_dict(self.stage_settings[stage]) for _, stage in upto}

    def free(self, name: str) -> set[str]:
        """Fields of `identity` that may change when a stage continues.

        Other folders count as the same ones, where their contents are compared (`stages.data.check_same_images`). The
        steps of the stage itself may change, unless an earlier round has used them.

        Args:
          name: of the run's `order`.
        """
        order = self.order()
        upto = [stage for _, stage in order[: [run_name for run_name, _ in order].index(name) + 1]]
        sections = {part: getattr(self, part) for part in ("model", "data", "sampler", "guard")}
        sections |= {stage: self.stage_settings[stage] for stage in upto}
        found = {field for path, section in sections.items() for field in free_fields(section, path)}
        if self.data.source != "folder":
            found.discard("data.folder")
        return found | ({f"{upto[-1]}.steps"} if upto.count(upto[-1]) == 1 else set())


def is_rl(stage: str, config: RunConfig) -> bool:
    """Whether a stage learns from rewards: it then repeats in rounds, and is scored while it runs."""
    return STAGES[stage].method(config.stage(stage)).reinforcement
