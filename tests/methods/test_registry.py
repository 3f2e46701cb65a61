"""The registry of stages and methods, and the one compiled program of each."""

import inspect

import jax
import pytest

from configs import presets
from uae_jax.methods.method import STAGES, build_step, make_method
from uae_jax.settings import frozen
from uae_jax.stages.abstract import abstract_folder
from uae_jax.stages.run_config import RunConfig
from uae_jax.training.guard import GuardConfig
from uae_jax.training.optimizer import make_optimizer

KINDS = [(stage, name) for stage, known in STAGES.items() for name in known.methods]


@pytest.fixture(scope="module")
def builtin():
    """The configuration of the built-in model, and its description."""
    config = frozen(RunConfig, presets.preset("tiny", tuple(STAGES)).to_dict())
    return config, abstract_folder(config)


def test_the_stages_are_those_of_the_paper_and_the_methods_those_of_their_files():
    assert KINDS == [
        ("align", ""),
        ("pretrain", ""),
        ("cold_start", ""),
        ("gen_for_und", ""),
        ("und_for_gen", "flow_grpo"),
        ("und_for_gen", "nft"),
        ("und_for_gen", "joint"),
        ("und_for_gen", "matching"),
        ("unified_ar", ""),
    ]
    modules = {f"{stage}.{name}": STAGES[stage].methods[name].__module__.split(".")[-1] for stage, name in KINDS}
    assert modules == {
        "align.": "align",
        "pretrain.": "pretrain",
        "cold_start.": "cold_start",
        "gen_for_und.": "gen_for_und",
        "und_for_gen.flow_grpo": "flow_grpo",
        "und_for_gen.nft": "diffusion_nft",
        "und_for_gen.joint": "joint",
        "und_for_gen.matching": "caption_matching",
        "unified_ar.": "unified_ar",
    }


@pytest.mark.parametrize("stage, name", KINDS)
def test_a_stage_compiles_exactly_one_train_step(builtin, monkeypatch, stage, name):
    config, system = builtin
    if name:
        config = config.with_stage(stage, method=name, data_captions=0.0)
    settings, jitted, jit = config.stage(stage), [], jax.jit

    def counted(function, **options):
        jitted.append(options)
        return jit(function, **options)

    monkeypatch.setattr("uae_jax.methods.method.jax.jit", counted)
    method = make_method(stage, settings, config.sampler, system)
    step = build_step(method, make_optimizer(settings.optimizer, settings.total_updates))
    assert type(method) is STAGES[stage].methods[name]
    assert hasattr(step, "lower") and list(inspect.signature(step).parameters) == ["state", "frozen", "batch", "key"]
    assert [options["donate_argnames"] for options in jitted] == ["state"]


@pytest.mark.parametrize("stage, name", KINDS)
def test_a_method_says_what_it_trains_and_what_bounds_its_kl(builtin, stage, name):
    config, _ = builtin
    changes = {"method": name, "data_captions": 0.0} if name else {}
    both = ("projector", "transformer")
    trained = {"align": ("projector",), "pretrain": both, "cold_start": both}
    kind = STAGES[stage].methods[name]
    assert kind.reinforcement == (stage not in trained)
    assert kind.kl_bound == ("flow_kl" if stage == "und_for_gen" else "kl") and hasattr(GuardConfig(), kind.kl_bound)
    if stage in trained:
        assert config.trains(stage) == trained[stage]
        return
    bases = {
        "gen_for_und": ("language",),
        "unified_ar": ("language",),
        "joint": ("language", "transformer"),
    }.get(name or stage, ("transformer",))
    for train, ending in (("lora", "lora"), ("full", "policy")):
        expected = tuple(f"{base}_{ending}" for base in bases)
        assert config.with_stage(stage, train=train, **changes).trains(stage) == expected


def test_a_frozen_projector_is_not_trained(builtin):
    config, _ = builtin
    assert config.with_stage("pretrain", train_projector=False).trains("pretrain") == ("transformer",)
