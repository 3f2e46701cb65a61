"""Presets: each has every setting, each can be changed from the command line, and none repeats a default."""

import dataclasses
import itertools
import typing

import pytest

from configs import presets
from uae_jax.config_file import apply_overrides, split_overrides
from uae_jax.settings import as_dict, frozen
from uae_jax.stages.run_config import RunConfig

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
LARGE = "qwen2_5_vl_3b_sd3_5_large"


def fields(cls, path: str = "") -> set[str]:
    """Paths of all fields of nested dataclasses, such as `gen_for_und.reward.clamp` or `und_for_gen.nft.levels`."""
    hints, found = typing.get_type_hints(cls), set()
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if "sections" in field.metadata:
            for name, kind in field.metadata["sections"]().items():
                found |= fields(kind, f"{path}{name}.")
        elif dataclasses.is_dataclass(inner):
            found |= fields(inner, f"{path}{field.name}.")
        else:
            found.add(path + field.name)
    return found


def written(values: dict, path: str = "") -> dict:
    """The values of a nested dictionary by the same paths, lists as tuples."""
    found = {}
    for name, value in values.items():
        inner = written(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: plain(value)}
        found |= inner
    return found


def plain(value):
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_has_every_field_and_is_a_valid_configuration(name):
    values = presets.preset(name, STAGES).to_dict()
    assert written(values).keys() == fields(RunConfig)
    settings = frozen(RunConfig, values)
    assert settings.preset == name and written(as_dict(settings)) == written(values)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_repeats_no_default(name):
    """A value that a preset writes, and that the settings have anyway, would hide where it comes from."""
    defaults = written(as_dict(RunConfig()))
    deviations = written(presets.PRESETS[name]())
    assert deviations and deviations.keys() <= defaults.keys()
    base = name.partition("@")[0] if "@" in name else {"emoji": "tiny"}.get(name)
    replaced = written(presets.PRESETS[base]()) if base else {}  # a value of another preset may be set back
    usual = defaults | replaced
    own = {path: value for path, value in deviations.items() if path not in replaced or value != replaced[path]}
    assert own and not {path for path, value in own.items() if value == usual[path]}


@pytest.mark.parametrize(
    "base, machine",
    [pair for pair in itertools.product(presets.FULL, presets.SLICES) if "@".join(pair) not in presets.TOO_LARGE],
)
def test_a_machine_repeats_no_value_of_the_preset(base, machine):
    before = written(as_dict(RunConfig())) | written(presets.PRESETS[base]())
    values = written(presets.SLICES[machine])
    assert values and not {path for path, value in values.items() if before[path] == value}


@pytest.mark.parametrize("name", presets.OWN)
def test_a_preset_with_a_decoder_of_its_own_encoder_trains_what_is_not_distilled(name):
    decoder, sizes, machine = presets.OWN[name]
    settings = frozen(RunConfig, presets.preset(name, STAGES).to_dict())
    learns = "und_for_gen" in decoder.machines.get(machine, {})
    stages = ("gen_for_und", "und_for_gen") if learns else ("gen_for_und",)
    assert settings.stages == stages and settings.model.sizes == sizes
    assert learns == (bool(machine) and "qwen_image" in sizes)
    for stage in stages:
        assert settings.stage(stage).guidance_scale == settings.evaluation.guidance_scale
    assert not learns or settings.trains("und_for_gen") == ("transformer_lora",)
    if machine:
        own = written(decoder.machines[machine])
        usual = written(as_dict(RunConfig())) | written(presets.PRESETS[sizes]())
        assert own and not {path for path, value in own.items() if usual[path] == value}
    with pytest.raises(ValueError, match=f"runs {' and '.join(stages)}, not pretrain"):
        presets.preset(name, ("pretrain",))


def test_a_decoder_that_a_card_does_not_hold_has_no_preset_for_it():
    for name in presets.own_decoders.too_large():
        with pytest.raises(ValueError, match="more than such a card holds"):
            presets.preset(name, STAGES)


def test_the_emoji_preset_repeats_no_value_of_the_tiny_one():
    tiny, emoji = (written(presets.PRESETS[name]()) for name in ("tiny", "emoji"))
    defaults = written(as_dict(RunConfig()))
    changed = {path for path, value in emoji.items() if value != tiny.get(path, defaults[path])}
    assert changed == {
        "model.folder",
        "data.source",
        "data.folder",
        "data.image_size",
        "data.mistakes",
        "evaluation.geneval_per_tag",
        "und_for_gen.flow_grpo.clip_range",
    }


def test_the_full_size_is_that_of_the_papers_where_it_names_them():
    settings = frozen(RunConfig, presets.preset(LARGE, STAGES).to_dict())
    flow, nft = (settings.stage("und_for_gen").methods[name] for name in ("flow_grpo", "nft"))
    assert (flow.kl_weight, flow.kl_kind, flow.clip_range, flow.window) == (4e-4, "velocity", 1e-5, 3)
    assert (flow.step_rule, flow.noise_level, flow.guidance_scale, flow.updates_per_rollout) == ("cps", 0.8, 1.0, 2)
    assert (nft.kl_weight, nft.updates_per_rollout, nft.levels, nft.strength) == (1e-4, 1, 10, 1.0)
    assert (nft.advantage_scale, flow.advantage_scale, nft.ema_decay) == ("group", "batch", 0.9)
    assert (nft.old_decay, nft.old_decay_rate) == (0.5, 1e-3)


def test_the_chosen_method_brings_its_own_settings():
    values, mistakes = apply_overrides(presets.preset(LARGE, STAGES).to_dict(), [("und_for_gen.method", "nft")])
    stage = frozen(RunConfig, values).stage("und_for_gen")
    assert not mistakes and stage.own is stage.methods["nft"]
    assert (stage.own.kl_weight, stage.updates_per_rollout, stage.own.levels) == (1e-4, 1, 10)
    assert stage.total_updates == stage.steps and stage.guidance_scale == 1.0


@pytest.mark.parametrize(
    "setting, value, read",
    [
        ("gen_for_und.objective", "supervised", lambda config: config.stage("gen_for_und").objective == "supervised"),
        (
            "und_for_gen.reward.pixel_weight",
            "0.5",
            lambda config: config.stage("und_for_gen").reward.pixel_weight == 0.5,
        ),
        (
            "cold_start.reward.names",
            "('dinov2',)",
            lambda config: config.stage("cold_start").reward.names == ("dinov2",),
        ),
        ("und_for_gen.nft.levels", "3", lambda config: config.stage("und_for_gen").methods["nft"].levels == 3),
        ("model.adapters", "False", lambda config: config.model.adapters is False),
        (
            "pretrain.optimizer.multipliers",
            "(('projector',0.1),)",
            lambda config: config.stage("pretrain").optimizer.multipliers == (("projector", 0.1),),
        ),
    ],
)
def test_a_field_is_set_from_the_command_line(setting, value, read):
    base = presets.preset("tiny", STAGES).to_dict()
    assert not read(frozen(RunConfig, base))
    for arguments in ([f"--config.{setting}={value}"], [f"--config.{setting}", value]):
        pairs, others = split_overrides(arguments)
        values, mistakes = apply_overrides(base, pairs)
        assert not others and not mistakes and read(frozen(RunConfig, values))


def test_a_preset_of_a_small_card_has_the_stages_that_fit():
    name = "qwen2_5_vl_3b_sd3_5_medium@1x24GB"
    assert presets.preset(name, STAGES).stages == ("gen_for_und", "und_for_gen")
    assert presets.preset(name, ()).stages == ()
    with pytest.raises(ValueError, match="trains adapters only.*too small for pretrain"):
        presets.preset(name, ("pretrain",))
    with pytest.raises(ValueError, match="the model is more than such a card"):
        presets.preset("qwen2_5_vl_3b_sd3_5_large@1x24GB", ())
