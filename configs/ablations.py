"""Ablations and controls of the built-in model: one changed setting an arm.

    python -m benchmarks.ablations --workdir=runs/ablations
    python -m uae_jax.main --config=configs/ablations.py:group_size_4 --workdir=runs/group_size_4
    --config.model.folder=runs/cold_start

The first command runs all of them, each from the arm that it starts from; the second runs one, from any model folder or
workdir. Settings are those of the `tiny` preset but for the `changes` of the arm.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from configs import bootstrap, presets

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
Changes = Mapping[str, Any | Callable[[ml_collections.ConfigDict], Any]]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
      topic: of `TOPICS`.
      label: what it has, in a few words: its row in the tables.
      stages: that it runs; or phases of the bootstrap, when none of them is a stage.
      changes: config field to value, or to a function of the unchanged configuration.
      start: config field to the arm whose workdir goes there.
    """

    topic: str
    label: str
    stages: tuple[str, ...]
    changes: Changes
    start: Mapping[str, str]

    @property
    def bootstraps(self) -> bool:
        """Whether it makes a part of a model from nothing instead of running stages."""
        return self.stages[0] not in STAGES


@dataclasses.dataclass(frozen=True)
class Topic:
    """A table: its title, the question that it answers, the arm that the others are compared with, and `und` or `gen`
    scores.
    """

    title: str
    question: str
    reference: str
    scores: str


TOPICS = {
    "recipe": Topic("The recipe", "What does each stage change?", "base_pretrain", "both"),
    "reward": Topic(
        "Reward",
        "Does it matter what judges the drawings: a language-supervised encoder, a self-supervised one, pixels, or "
        "mixes?",
        "base_gen_for_und",
        "und",
    ),
    "group": Topic(
        "Group size", "How many captions of a picture, at an equal number of drawings?", "base_gen_for_und", "und"
    ),
    "noise": Topic(
        "Decoder noise", "Should the drawings of a group begin with the same noise?", "base_gen_for_und", "und"
    ),
    "cold_start": Topic(
        "Cold start",
        "Is the differentiable start needed, and should the decoder read text or the answer's states?",
        "base_gen_for_und",
        "und",
    ),
    "kl": Topic("KL weight", "How close must captions stay to the reference?", "base_gen_for_und", "und"),
    "loss": Topic("GRPO variants", "Which aggregation, advantage scale and clip range?", "base_gen_for_und", "und"),
    "decoder": Topic(
        "Captions in pretraining",
        "Must the decoder be pretrained on long captions? A decoder from nothing each, then gen_for_und.",
        "decoder_mixed_und",
        "und",
    ),
    "controls": Topic(
        "Controls of gen_for_und",
        "Is it reconstruction that makes captions grow, or any image-text similarity? What does telling the answers "
        "teach?",
        "base_gen_for_und",
        "und",
    ),
    "gen_reward": Topic("Reward in und_for_gen", "As above, for the decoder.", "gen_nft", "gen"),
    "gen_group": Topic(
        "Group size in und_for_gen",
        "How many drawings of a caption, at an equal number of drawings?",
        "gen_nft",
        "gen",
    ),
    "gen_method": Topic(
        "Method of und_for_gen",
        "DiffusionNFT, or Flow-GRPO at as many drawings, their groups beginning with one noise or with one each? "
        "What is trained, and on what?",
        "gen_nft",
        "gen",
    ),
    "gen_loss": Topic(
        "KL and advantages in und_for_gen",
        "How close to the reference, and what scales the advantages?",
        "gen_nft",
        "gen",
    ),
    "gen_controls": Topic(
        "Controls of und_for_gen",
        "What does flow matching on true captions do in the same time? Do the two RL stages help each other in turn?",
        "gen_nft",
        "gen",
    ),
}

# seconds of one gen_for_und step over those of a supervised step with four times its pictures, and of one und_for_gen
# step over those of a pretrain step, measured on two cores; the tables show the seconds that each arm took
STEPS_FOR_CAPTIONS, STEPS_FOR_DRAWINGS = 2.5, 10


def _drawings(stage: str, size: int) -> Changes:
    """Groups of `size` with the same number of drawings a step, rounded down to whole groups."""
    return {
        f"{stage}.group_size": size,
        f"{stage}.batch_size": lambda c: max(1, c[stage].batch_size * c[stage].group_size // size),
    }


def _reward(
    stage: str, *names: str, weights: tuple[float, ...] | None = None, pixels: float = 0.0, caption: float = 0.0
) -> Changes:
    weights = tuple(1 / len(names) for _ in names) if weights is None else weights
    values = dict(names=names, weights=weights, pixel_weight=pixels, caption_weight=caption)
    return {f"{stage}.reward.{name}": value for name, value in values.items()}


def _base(label: str, stage: str, start: str | None) -> Arm:
    return Arm("recipe", label, (stage,), {}, {} if start is None else {"model.folder": start})


def _und(topic: str, label: str, changes: Changes, start: str = "base_cold_start", **more: str) -> Arm:
    return Arm(
        topic,
        label,
        ("gen_for_und",),
        changes,
        {"model.folder": start} | {name.replace("__", "."): arm for name, arm in more.items()},
    )


# Most questions about und_for_gen are asked of DiffusionNFT on short prompts, with the reward that those need.
_NFT: dict[str, Any] = {
    "und_for_gen.method": "nft",
    "und_for_gen.steps": 60,
    "und_for_gen.optimizer.learning_rate": 3e-4,
    "und_for_gen.data_captions": 0.75,
    "und_for_gen.reward.contrast": 1.0,
    "und_for_gen.reward.contrast_temperature": 0.05,
}


def _gen(topic: str, label: str, changes: Changes) -> Arm:
    return Arm(topic, label, ("und_for_gen",), {**_NFT, **changes}, {"model.folder": "base_gen_for_und"})


def _bootstrap(topic: str, label: str, phase: str, **changes: Any) -> Arm:
    return Arm(
        topic,
        label,
        (phase,),
        {f"{phase}.{name}": value for name, value in changes.items()},
        {},
    )


def _condition(label: str, condition: str) -> Arm:
    # long enough, at a rate high enough, to see what the stage does to the decoder
    changes = {"cold_start.condition": condition, "cold_start.steps": 100, "cold_start.optimizer.learning_rate": 1e-4}
    return Arm("cold_start", label, ("cold_start", "gen_for_und"), changes, {"model.folder": "base_pretrain"})


_DR_GRPO = {"gen_for_und.aggregation": "dr_grpo", "gen_for_und.advantage_scale": "none"}
_GSPO = {"gen_for_und.aggregation": "gspo", "gen_for_und.clip_low": 3e-4, "gen_for_und.clip_high": 4e-4}
# at its best rate of those tried in dev/results.md
_FLOW_GRPO = {
    "und_for_gen.method": "flow_grpo",
    "und_for_gen.sampler_steps": 8,
    "und_for_gen.train": "lora",
    "und_for_gen.optimizer.learning_rate": 1e-3,
    "und_for_gen.flow_grpo.one_replay": False,
    "und_for_gen.flow_grpo.starts": 1,
    "und_for_gen.flow_grpo.window": 2,
    "und_for_gen.flow_grpo.window_high": 4,
    "und_for_gen.flow_grpo.grpo_guard": False,
    "und_for_gen.flow_grpo.kl_kind": "gaussian_nodt",
    "und_for_gen.flow_grpo.kl_weight": 0.1,
}
_TWICE = {"gen_for_und.updates_per_rollout": 2}

ARMS: dict[str, Arm] = {
    "base_pretrain": _base("pretrain", "pretrain", None),
    "base_cold_start": _base("cold_start", "cold_start", "base_pretrain"),
    "base_gen_for_und": _base("gen_for_und", "gen_for_und", "base_cold_start"),
    "base_und_for_gen": _base("und_for_gen", "und_for_gen", "base_gen_for_und"),
    "caption_scorer": _bootstrap("controls", "the scorer of captions", "caption_scorer"),
    "decoder_mixed": _bootstrap("decoder", "full, partial and short", "decoder", steps=1000),
    "decoder_long": _bootstrap("decoder", "full alone", "decoder", steps=1000, full_fraction=1.0),
    "decoder_short": _bootstrap("decoder", "short alone", "decoder", steps=1000, full_fraction=0.0, detail_high=0.35),
    # the reviewers' questions first
    "caption_similarity": _und(
        "controls",
        "similarity of caption and picture, no drawing",
        _reward("gen_for_und", caption=1.0),
        model__caption_scorer="caption_scorer",
    ),
    "supervised_captions": _und(
        "controls",
        "cross-entropy of full captions, same seconds",
        {
            "gen_for_und.objective": "supervised",
            "data.rl_detail": "full",
            "gen_for_und.batch_size": lambda c: 4 * c.gen_for_und.batch_size,
            "gen_for_und.steps": lambda c: int(STEPS_FOR_CAPTIONS * c.gen_for_und.steps),
        },
    ),
    "decoder_mixed_und": _und("decoder", "full, partial and short", {}, "decoder_mixed"),
    "decoder_long_und": _und("decoder", "full alone", {}, "decoder_long"),
    "decoder_short_und": _und("decoder", "short alone", {}, "decoder_short"),
    "reward_clip": _und("reward", "CLIP", _reward("gen_for_und", "clip")),
    "reward_dinov2": _und("reward", "DINOv2", _reward("gen_for_und", "dinov2")),
    "reward_pixels": _und("reward", "pixels", _reward("gen_for_und", pixels=1.0)),
    "reward_clip_dinov2": _und("reward", "CLIP and DINOv2", _reward("gen_for_und", "clip", "dinov2")),
    "reward_clip_pixels": _und("reward", "CLIP and pixels", _reward("gen_for_und", "clip", weights=(0.5,), pixels=0.5)),
    **{f"group_size_{size}": _und("group", str(size), _drawings("gen_for_und", size)) for size in (2, 4, 8, 16)},
    "noise_shared": _und("noise", "shared", {"gen_for_und.shared_noise": True}),
    "noise_independent": _und("noise", "independent", {"gen_for_und.shared_noise": False}),
    "without_cold_start": _und("cold_start", "no cold start", {}, "base_pretrain"),
    "condition_text": _condition("long cold start, text", "reference"),
    "condition_caption_states": _condition("long cold start, caption states", "caption_states"),
    "kl_0": _und("kl", "0", {"gen_for_und.kl_weight": 0.0}),
    "kl_0.02": _und("kl", "0.02", {"gen_for_und.kl_weight": 0.02}),
    "kl_0.1": _und("kl", "0.1", {"gen_for_und.kl_weight": 0.1}),
    "advantage_batch": _und("loss", "advantages over the batch's deviation", {"gen_for_und.advantage_scale": "batch"}),
    "dr_grpo": _und("loss", "Dr. GRPO: no deviation, no length", _DR_GRPO),
    "token_mean": _und("loss", "mean over tokens (DAPO)", {"gen_for_und.aggregation": "token_mean"}),
    "gspo": _und("loss", "one ratio a caption (GSPO), two updates", _GSPO | _TWICE),
    "two_updates": _und("loss", "two updates a rollout", _TWICE),
    "clip_higher": _und("loss", "two updates, clip-higher .2/.28 (DAPO)", _TWICE | {"gen_for_und.clip_high": 0.28}),
    "gen_supervised": Arm(
        "gen_controls",
        "flow matching on true captions, same seconds",
        ("pretrain",),
        {
            "data.detail": "mixed",
            "pretrain.steps": STEPS_FOR_DRAWINGS * _NFT["und_for_gen.steps"],
        },
        {"model.folder": "base_gen_for_und"},
    ),
    "alternating": Arm(
        "gen_controls",
        "both RL stages in turn, half as long, twice",
        ("gen_for_und", "und_for_gen"),
        {
            **_NFT,
            "rounds": 2,
            "gen_for_und.steps": lambda c: c.gen_for_und.steps // 2,
            "und_for_gen.steps": _NFT["und_for_gen.steps"] // 2,
        },
        {"model.folder": "base_cold_start"},
    ),
    "gen_nft": _gen("gen_method", "DiffusionNFT on short prompts", {}),
    "gen_reward_plain": _gen("gen_reward", "CLIP, no contrast to the batch", {"und_for_gen.reward.contrast": 0.0}),
    "gen_reward_mean_contrast": _gen(
        "gen_reward", "CLIP, contrast to the batch's mean", {"und_for_gen.reward.contrast_temperature": 0.0}
    ),
    "gen_reward_dinov2": _gen("gen_reward", "DINOv2", _reward("und_for_gen", "dinov2")),
    "gen_reward_pixels": _gen("gen_reward", "pixels", _reward("und_for_gen", pixels=1.0)),
    "gen_reward_clip_dinov2": _gen("gen_reward", "CLIP and DINOv2", _reward("und_for_gen", "clip", "dinov2")),
    **{
        f"gen_group_size_{size}": _gen("gen_group", str(size), _drawings("und_for_gen", size)) for size in (2, 4, 8, 16)
    },
    "gen_flow_grpo_shared": _gen(
        "gen_method", "Flow-GRPO, shared noise", _FLOW_GRPO | {"und_for_gen.flow_grpo.shared_noise": True}
    ),
    "gen_flow_grpo_independent": _gen("gen_method", "Flow-GRPO, independent noise", _FLOW_GRPO),
    "gen_adapter": _gen("gen_method", "an adapter of rank 32", {"und_for_gen.train": "lora"}),
    "gen_own_captions": _gen("gen_method", "the captioner's captions alone", {"und_for_gen.data_captions": 0.0}),
    "gen_kl_0": _gen("gen_loss", "KL weight 0", {"und_for_gen.nft.kl_weight": 0.0}),
    "gen_kl_1": _gen("gen_loss", "KL weight 1", {"und_for_gen.nft.kl_weight": 1.0}),
    "gen_advantage_batch": _gen(
        "gen_loss", "advantages over the batch's deviation", {"und_for_gen.nft.advantage_scale": "batch"}
    ),
    "gen_advantage_none": _gen("gen_loss", "advantages as they are", {"und_for_gen.nft.advantage_scale": "none"}),
}


def _stages_config(arm: Arm) -> ml_collections.ConfigDict:
    config = presets.preset("tiny", arm.stages)
    # generation from short prompts is scored where the decoder is what learns
    draws = TOPICS[arm.topic].scores != "und"
    config.evaluation.images, config.evaluation.geneval_per_tag = 256, 32 if draws else 0
    config.loop.eval_every = 0
    # an arm that goes wrong is shown going wrong
    config.guard.update(dict(reward_fall=0.0, kl=0.0, flow_kl=0.0, truncated=0.0))
    return config


def get_config(arm: str | None = None) -> ml_collections.ConfigDict:
    """The configuration of an arm.

    Raises:
      ValueError: no arm was named, or one that does not exist.
    """
    if arm not in ARMS:
        raise ValueError(
            f"configs/ablations.py needs an arm after a colon, not {arm!r}; choose one of {', '.join(ARMS)}"
        )
    chosen = ARMS[arm]
    if chosen.bootstraps:
        config = bootstrap.get_config()
        config.phases, config.start = chosen.stages, "builtin"
    else:
        config = _stages_config(chosen)
    config.update_from_flattened_dict(
        {name: value(config) if callable(value) else value for name, value in chosen.changes.items()}
    )
    return config
