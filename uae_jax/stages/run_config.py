"""A whole configuration as frozen dataclasses: what a file in `configs/` becomes."""

import dataclasses

from uae_jax.files.json_files import json_digest
from uae_jax.sharding import MeshConfig
from uae_jax.stages import cold_start, gen_for_und, pretrain, und_for_gen
from uae_jax.stages.evaluation import EvaluationConfig
from uae_jax.stages.steps import HELD, RL_STAGES, STAGES, SamplerConfig
from uae_jax.stages.weights import ModelConfig
from uae_jax.training.guard import GuardConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where pictures come from, and fixed shapes.

    Attributes:
      source: `scenes` (built in), `emoji` (of `uae_jax.fetch_emoji`), `folder` or `tfds`.
      folder: of `captions.jsonl` and images, or of emoji; heldout_folder: the same for scores, or empty to hold out the
        last rows.
      name, split, data_dir, image_key, caption_key: of a TFDS data set; heldout_split: for scores.
      image_size: side of the square pictures in pixels.
      max_prompt: room for the caption prompt with its image tokens; 0 for what it needs.
      max_caption: room for a caption with its stop token.
      detail, rl_detail: captions of scenes and emoji in the supervised and in the RL stages: `full`, `detail`, `mixed`
        or `short`.
      mistakes: probability that a fact is wrong in the scenes' captions of the supervised stages.
      caption_prompt, negative_prompt: texts.
    """

    source: str = "scenes"
    folder: str = ""
    name: str = ""
    split: str = "train"
    data_dir: str = ""
    image_key: str = "image"
    caption_key: str = "caption"
    heldout_folder: str = ""
    heldout_split: str = "test"
    image_size: int = 512
    max_prompt: int = 0
    max_caption: int = 512
    detail: str = "full"
    rl_detail: str = "mixed"
    mistakes: float = 0.0
    caption_prompt: str = ""
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How often things are written: in steps; `keep` newest checkpoints. `eval_every` is of the RL stages; 0 for
    never.
    """

    log_every: int = 1
    save_every: int = 50
    eval_every: int = 0
    keep: int = 2
    wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole configuration file, frozen."""

    preset: str
    seed: int
    stages: tuple[str, ...]
    rounds: int
    model: ModelConfig
    data: DataConfig
    sampler: SamplerConfig
    mesh: MeshConfig
    evaluation: EvaluationConfig
    loop: LoopSettings
    pretrain: pretrain.PretrainConfig
    cold_start: cold_start.ColdStartConfig
    gen_for_und: gen_for_und.GenForUndConfig
    und_for_gen: und_for_gen.UndForGenConfig
    guard: GuardConfig = GuardConfig()

    def __post_init__(self):
        """Raises ValueError for a stage that does not exist or fewer than one round."""
        for name in self.stages:
            if name not in STAGES:
                raise ValueError(f"config.stages names {name!r}; the stages are {', '.join(STAGES)}")
        if self.rounds < 1:
            raise ValueError(f"config.rounds is {self.rounds}; it must be at least 1")

    def order(self) -> list[tuple[str, str]]:
        """(run name, stage) in order; the RL stages repeat for every round, with the round's number from 2 on."""
        listed = [(stage, stage) for stage in self.stages]
        again = [stage for stage in self.stages if stage in RL_STAGES]
        return listed + [(f"{stage}_{number}", stage) for number in range(2, self.rounds + 1) for stage in again]

    def trained_from(self, stage: str) -> set[str]:
        """Parts that a stage or one after its first turn trains as they are, and parts that a later one copies to train
        them whole.

        Adapters and copies have names of their own.
        """
        stages = [kind for _, kind in self.order()]
        first = stages.index(stage)
        later, begin = stages[first:], set(stages[first + 1 :]) - set(stages[: first + 1])
        own = {
            "pretrain": ("transformer", "projector") if self.pretrain.train_projector else ("transformer",),
            "cold_start": ("transformer", "projector"),
        }
        copied = {
            name
            for kind, name in (("gen_for_und", "language"), ("und_for_gen", "transformer"))
            if kind in begin and getattr(self, kind).train == "full"
        }
        return {name for kind in later for name in own.get(kind, ())} | copied

    def frozen_from_start(self) -> set[str]:
        """Parts that may be held in `model.frozen_dtype` from the first stage on: nothing trains them, and nothing
        copies them to train.
        """
        order = self.order()
        if not order:
            return set()
        copies = {"gen_for_und": "language", "und_for_gen": "transformer"}
        copied = {copies[stage] for _, stage in order if stage in copies and getattr(self, stage).train == "full"}
        return set(HELD) - self.trained_from(order[0][1]) - copied

    def policy_condition(self) -> bool:
        """Whether scores are drawn through the captioner as it is trained: where an RL stage, of this run or before it,
        draws so.
        """
        stages = [stage for stage in RL_STAGES if stage in self.stages] or RL_STAGES
        return any(getattr(self, stage).condition_model == "policy" for stage in stages)

    def digest(self, name: str) -> str:
        """Of everything that changes the numbers of a stage; a checkpoint of another digest is refused.

        That is what all stages share, and the settings of this stage and of those before it: what comes later may still
          change.

        Args:
          name: of the run's `order`.
        """
        order = self.order()
        upto = order[: [run_name for run_name, _ in order].index(name) + 1]
        values = {part: dataclasses.asdict(getattr(self, part)) for part in ("model", "data", "sampler", "guard")}
        if self.data.source == "folder" and not self.data.heldout_folder:
            values["heldout"] = self.evaluation.images  # these pictures are taken from the training set
        values |= {
            "seed": self.seed,
            "stages": [(run_name, dataclasses.asdict(getattr(self, stage))) for run_name, stage in upto],
        }
        return json_digest(values)
