"""The fields of a batch that each method names are those that its compiled step reads."""

import jax
import pytest

from configs import presets
from uae_jax.methods.method import STAGES
from uae_jax.settings import frozen
from uae_jax.stages import program as program_module
from uae_jax.stages.abstract import abstract_folder, with_run_adapters
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig

READINGS = [
    ("align", {}, "pixels caption"),
    ("pretrain", {}, "pixels caption"),
    ("cold_start", {}, "pixels caption"),
    ("cold_start", {"condition": "caption_states"}, "pixels caption patches patch prompt"),
    ("gen_for_und", {}, "pixels patches patch prompt"),
    ("gen_for_und", {"objective": "supervised"}, "caption patches patch prompt"),
    ("und_for_gen", {"method": "flow_grpo", "data_captions": 0.0}, "pixels patches patch prompt"),
    ("und_for_gen", {"method": "nft", "data_captions": 0.5}, "pixels caption patches patch prompt"),
]
PRECOMPUTED = [
    ("pretrain", ("latents", "states"), "latent text", {"vae", "language"}),
    ("pretrain", ("latents",), "latent caption", {"vae"}),
    ("cold_start", ("states",), "pixels text", {"language"}),
]


@pytest.fixture(scope="module")
def builtin():
    """The configuration of the built-in model, and its description."""
    config = frozen(RunConfig, presets.preset("tiny", tuple(STAGES)).to_dict())
    return config, abstract_folder(config)


def read_by(program) -> tuple[set[str], set[str]]:
    """Fields of the batch, and frozen parts, that the compiled step of a program reads."""
    traced = jax.make_jaxpr(program.step)(*program.arguments)  # a field that is read and not there is an error
    (step,) = [equation for equation in traced.jaxpr.eqns if "jaxpr" in equation.params]
    inner = step.params["jaxpr"].jaxpr
    used = {id(value) for equation in inner.eqns for value in equation.invars}
    leaves = jax.tree_util.tree_flatten_with_path(program.arguments)[0]
    found = {1: set(), 2: set()}
    for (path, _), value in zip(leaves, inner.invars, strict=True):
        if path[0].idx in found and id(value) in used:
            found[path[0].idx].add(path[1].key)
    return found[2], found[1]


@pytest.mark.parametrize("stage, changes, kinds", READINGS)
def test_a_step_reads_exactly_the_fields_that_its_method_names(builtin, stage, changes, kinds):
    config, system = builtin
    config, system = config.with_stage(stage, **changes), with_run_adapters(config, system)
    program = make_program(config, system, system.parts, system.batch, stage)
    assert program.batch.keys() == config.reads(stage)
    assert {name.partition("_")[0] for name in program.batch} == {"sample", *kinds.split()}
    assert read_by(program)[0] == program.batch.keys()


@pytest.mark.parametrize("stage, parts, kinds, unread", PRECOMPUTED)
def test_a_step_reads_what_was_precomputed_and_not_what_makes_it(builtin, monkeypatch, stage, parts, kinds, unread):
    config, system = builtin
    system = with_run_adapters(config, system)
    plain = make_program(config, system, system.parts, system.batch, stage)
    monkeypatch.setattr(program_module, "parts_read", lambda *_: parts)
    program = make_program(config, system, system.parts, system.batch, stage)
    assert {name.partition("_")[0] for name in program.batch} == {"sample", *kinds.split()}
    (fields, frozen_parts), (_, before) = read_by(program), read_by(plain)
    assert fields == program.batch.keys()
    assert unread <= before and not unread & frozen_parts
    # the cold start of the built-in model has no guidance
    assert ("negative_states" in frozen_parts) == (stage != "cold_start" and "states" in parts)
