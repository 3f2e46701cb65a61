"""The presets of one network: valid configurations that repeat no default, with the published numbers of parameters."""

import pathlib
import re

import jax
import pytest
from test_presets import fields, written

from configs import unified_ar
from uae_jax import trees
from uae_jax.config_file import machine_presets
from uae_jax.planning.chips import CHIPS, GIB
from uae_jax.planning.fits import fits_of
from uae_jax.planning.system import abstract_system
from uae_jax.settings import as_dict, frozen
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig


@pytest.mark.parametrize("name", unified_ar.PRESETS)
def test_a_preset_has_every_field_and_repeats_no_default(name):
    values = unified_ar.get_config(name).to_dict()
    assert written(values).keys() == fields(RunConfig)
    settings = frozen(RunConfig, values)
    assert settings.stages == ("unified_ar",) and written(as_dict(settings)) == written(values)
    defaults, deviations = written(as_dict(RunConfig())), written(unified_ar.PRESETS[name]())
    of_size = written(unified_ar.PRESETS[name.partition("@")[0]]())  # what a machine may set back
    repeated = [field for field, value in deviations.items() if defaults[field] == value == of_size.get(field, value)]
    assert repeated == []


def test_every_machine_makes_a_step_of_the_same_size_and_fits_the_page():
    """The table of docs/janus.md is that of the estimates."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "janus.md").read_text()
    room = {"1x24GB": CHIPS["RTX4090"], "1x80GB": CHIPS["H100"], "8xH200": CHIPS["H200"]}
    named = machine_presets("unified_ar")
    assert set(re.findall(r"`(janus\w+@\w+)`", page)) == set(named)
    for name in named:
        values = unified_ar.get_config(name).to_dict()
        stage, whole = (frozen(RunConfig, v).stage("unified_ar") for v in (values, unified_ar.get_config().to_dict()))
        assert stage.batch_size == 64 and stage.group_size == whole.group_size
        if name.startswith("janus_pro_1b@1x"):
            (fit,) = fits_of(name, values)
            assert fit.fits(room[name.partition("@")[2]])
            assert f"| `{name}` | unified_ar | 64 | {fit.samples} | {fit.peak / GIB:.1f} |" in page


def test_an_unknown_preset_is_told():
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of tiny, janus_pro_1b, .*janus_pro_7b"):
        unified_ar.get_config("huge")


@pytest.mark.parametrize(
    "name, billions, adapter",
    [("janus_pro_1b", 2.077, 30.3), pytest.param("janus_pro_7b", 7.408, 75.0, marks=pytest.mark.slow)],
)
def test_a_step_of_the_published_size_is_traced(name, billions, adapter):
    config = frozen(RunConfig, unified_ar.get_config(name).to_dict())
    system = abstract_system(config)
    base = [part for kind, part in system.parts.items() if kind not in ("encoders", "language_lora")]
    # the published files also hold the tower's pooling, which nothing reads
    assert sum(map(trees.parameter_count, base)) / 1e9 == pytest.approx(billions, abs=0.005)
    program = make_program(config, system, system.parts, system.batch, "unified_ar")
    assert program.batch["pixels"].shape == (64, 384, 384, 3) and program.batch["prompt_ids"].shape == (64, 704)
    assert program.state.params.keys() == {"language_lora"}
    assert trees.parameter_count(program.state.params) / 1e6 == pytest.approx(adapter, rel=0.005)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.frozen["language"])} == {"bfloat16"}
    _, metrics = jax.eval_shape(program.step, *program.arguments)
    assert {"image_kl", "caption_kl", "between_share", "reward"} <= metrics.keys()
