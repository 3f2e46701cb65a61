"""Every setting that the stages have can be changed from the command line: the configuration is locked, so it must be
there.
"""

import dataclasses
import sys
import typing

import pytest
from absl import flags
from ml_collections import config_flags

from configs import presets
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.settings import frozen
from uae_jax.training.optimizer import OptimizerConfig

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


def fields(cls, path: str = "") -> set[str]:
    """Paths of all fields of nested dataclasses, such as `gen_for_und.reward.clamp`."""
    hints, found = typing.get_type_hints(cls), set()
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        found |= fields(inner, f"{path}{field.name}.") if dataclasses.is_dataclass(inner) else {path + field.name}
    return found


def written(values: dict, path: str = "") -> set[str]:
    """The same of a dictionary."""
    found = set()
    for name, value in values.items():
        found |= written(value, f"{path}{name}.") if isinstance(value, dict) else {path + name}
    return found


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_has_every_field(name):
    values = presets.preset(name, STAGES).to_dict()
    assert written(values) == fields(RunConfig)
    frozen(RunConfig, values)


def test_the_written_defaults_of_adam_are_those_of_the_optimizer():
    values = presets.preset("tiny", STAGES).pretrain.optimizer.to_dict()
    default = dataclasses.asdict(OptimizerConfig())
    chosen = {"learning_rate", "schedule", "warmup_steps", "weight_decay"}
    assert {name: value for name, value in values.items() if name not in chosen} == {
        name: value for name, value in default.items() if name not in chosen
    }


@pytest.mark.parametrize(
    "setting, value, read",
    [
        ("gen_for_und.objective", "supervised", lambda config: config.gen_for_und.objective == "supervised"),
        ("und_for_gen.reward.pixel_weight", "0.5", lambda config: config.und_for_gen.reward.pixel_weight == 0.5),
        ("cold_start.reward.names", "('dinov2',)", lambda config: config.cold_start.reward.names == ("dinov2",)),
        ("model.adapters", "False", lambda config: config.model.adapters is False),
        (
            "pretrain.optimizer.multipliers",
            "(('projector',0.1),)",
            lambda config: config.pretrain.optimizer.multipliers == (("projector", 0.1),),
        ),
    ],
)
def test_a_field_is_set_from_the_command_line(monkeypatch, setting, value, read):
    arguments = ["main", "--config=configs/unified_grpo.py", f"--config.{setting}={value}"]
    monkeypatch.setattr(sys, "argv", arguments)  # where overrides are looked up
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(arguments)
    assert read(frozen(RunConfig, holder.value.to_dict()))


def test_a_preset_of_a_small_card_has_the_stages_that_fit():
    name = "qwen2_5_vl_3b_sd3_5_medium@1x24GB"
    assert presets.preset(name, ("pretrain", "cold_start", "gen_for_und", "und_for_gen")).stages == (
        "gen_for_und",
        "und_for_gen",
    )
    assert presets.preset(name, ()).stages == ()
    with pytest.raises(ValueError, match="trains adapters only.*too small for pretrain"):
        presets.preset(name, ("pretrain",))
    with pytest.raises(ValueError, match="weights alone are more"):
        presets.preset("qwen2_5_vl_3b_sd3_5_large@1x24GB", ())
