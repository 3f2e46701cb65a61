"""A bootstrap's workdir belongs to one configuration a phase: the same one goes on, another one is refused, copies are
no results.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from configs import bootstrap as config_file
from uae_jax.methods.method import Supervised
from uae_jax.settings import frozen
from uae_jax.stages.bootstrap import run as bootstrap_run
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.run import bootstrap
from uae_jax.stages.bootstrap.settings import BootstrapConfig
from uae_jax.stages.weights import BUILTIN


def one_number(params, frozen, rollout, key):
    del frozen, key
    return jnp.sum((params["weight"] - rollout["samples"]["wanted"]) ** 2), jnp.float32(2), {}


@pytest.fixture
def phases(monkeypatch):
    """Each phase trains one number by two steps and writes one line; the list has the phases that wrote, and `broken`
    one that cannot.
    """
    wrote, broken = [], []

    def phase(name, part):
        def make(run):
            for training in bootstrap_run.trainings(name):
                data = scene_stream.stream(lambda index: {"wanted": np.float32(index)}, 2)
                state = bootstrap_run.train(
                    run,
                    training,
                    Supervised(one_number),
                    {"weight": jnp.zeros(())},
                    {},
                    data,
                    steps=getattr(run.config, training).steps,
                )
            if name in broken:
                raise KeyboardInterrupt
            wrote.append(name)
            (run.model / part).parent.mkdir(parents=True, exist_ok=True)
            (run.model / part).write_text(f"{name} {float(state.params['weight'])}")

        return part, make

    monkeypatch.setattr(
        bootstrap_run, "PHASES", {name: phase(name, part) for name, (part, _) in bootstrap_run.PHASES.items()}
    )
    return wrote, broken


def quick_config(**changes):
    config = config_file.get_config()
    for name in (*config.phases, "mistakes", "caption_scorer"):
        config[name].steps, config[name].optimizer.warmup_steps = 2, 0
    for name, value in changes.items():
        config[name] = value
    return config


def contents(folder: pathlib.Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(phases, tmp_path):
    """A workdir in which all phases are finished."""
    bootstrap(quick_config(), tmp_path / "run")
    assert phases[0] == list(quick_config().phases)
    phases[0].clear()
    return tmp_path / "run"


CHANGES = [
    ("vae.steps", 3, "vae"),
    ("clip.vision.hidden_size", 48, "clip"),
    ("captioner.optimizer.learning_rate", 1.0, "captioner"),
    ("mistakes.steps", 9, "decoder"),
    ("mistakes.probability", 0.5, "decoder"),
    ("seed", 1, "vae"),
    ("side", 64, "vae"),
    ("caption_tokens", 40, "vae"),
    ("data.source", "emoji", "vae"),
]


def test_another_configuration_of_a_finished_phase_is_refused(finished, monkeypatch):
    monkeypatch.setattr(bootstrap_run, "open_world", lambda data: scene_stream.SHAPE_WORLD)
    before = contents(finished)
    for field, value, phase in CHANGES:
        config = quick_config()
        config.update_from_flattened_dict({field: value})
        with pytest.raises(
            ValueError, match=f"the phase {phase} of .* another configuration .*config.json, or a new --workdir"
        ):
            bootstrap(config, finished)
        assert contents(finished) == before


def test_the_same_configuration_does_nothing_and_how_often_things_are_written_may_change(finished, phases, monkeypatch):
    model = contents(finished / "model")
    monkeypatch.setattr(bootstrap_run, "train", lambda *_, **__: pytest.fail("a finished phase was trained"))
    bootstrap(quick_config(save_every=7, log_every=1), finished)
    assert contents(finished / "model") == model and phases[0] == []
    assert json.loads((finished / "config.json").read_text())["save_every"] == 7


def test_a_phase_that_has_not_begun_may_change(phases, tmp_path):
    bootstrap(quick_config(phases=("vae", "clip", "captioner")), tmp_path)
    config = quick_config()
    config.decoder.steps = config.mistakes.steps = 3
    bootstrap(config, tmp_path)
    assert phases[0] == ["vae", "clip", "captioner", "dinov2", "decoder"]
    # what it reads was made by phases that this configuration does not name
    bootstrap(quick_config(phases=("caption_scorer",)), tmp_path)
    config.phases = (*config.phases, "caption_scorer")
    bootstrap(config, tmp_path)
    assert phases[0][5:] == ["caption_scorer"]


def test_what_a_phase_reads_belongs_to_its_configuration():
    def digest(config, name):
        return bootstrap_run.digest(frozen(BootstrapConfig, config), {}, name)

    config, other = quick_config(), quick_config()
    other.captioner.steps = 3
    trainings = (*bootstrap_run.PHASES, "mistakes")
    changed = {name for name in trainings if digest(config, name) != digest(other, name)}
    assert changed == {"captioner", "decoder", "mistakes"}
    config.phases = other.phases = ("decoder",)
    assert digest(config, "decoder") == digest(other, "decoder")
    other.start = "builtin"
    assert digest(config, "decoder") != digest(other, "decoder")


def test_an_interrupted_phase_goes_on_with_its_own_configuration_alone(phases, tmp_path, monkeypatch):
    wrote, broken = phases
    broken.append("clip")
    with pytest.raises(KeyboardInterrupt):
        bootstrap(quick_config(), tmp_path)
    before, config = contents(tmp_path), quick_config()
    config.clip.optimizer.learning_rate = 1.0
    with pytest.raises(
        ValueError, match="bootstrap_clip was written .*: clip.optimizer.learning_rate was 0.001 and is 1.0; use"
    ):
        bootstrap(config, tmp_path)
    assert contents(tmp_path) == before and wrote == ["vae"]
    broken.clear()
    bootstrap(quick_config(), tmp_path)
    assert wrote == list(quick_config().phases)


def test_workdirs_from_before_configurations_were_recorded_are_read_back(phases, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bootstrap_run, "identity", lambda *_: None)
        bootstrap(quick_config(), tmp_path)
    (tmp_path / "phases.json").unlink()
    model, lines = contents(tmp_path / "model"), (tmp_path / "metrics.jsonl").read_text()
    bootstrap(quick_config(), tmp_path)
    assert contents(tmp_path / "model") == model and (tmp_path / "metrics.jsonl").read_text() == lines
    assert set(json.loads((tmp_path / "phases.json").read_text())) == {*quick_config().phases, "mistakes"}


def test_a_part_of_which_nothing_says_how_it_was_made_is_left_alone(phases, tmp_path):
    (tmp_path / "model" / "clip").mkdir(parents=True)
    (tmp_path / "model" / "clip" / "preprocessor_config.json").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="say how it was made; leave the phase clip out"):
        bootstrap(quick_config(), tmp_path)
    assert contents(tmp_path) == before
    bootstrap(quick_config(phases=("vae",)), tmp_path)
    assert phases[0] == ["vae"]


def test_a_copied_part_is_not_one_that_a_phase_has_made(phases, tmp_path):
    config = quick_config(start="builtin", phases=("vae", "captioner"))
    model = bootstrap(config, tmp_path)
    assert phases[0] == ["vae", "captioner"]
    assert (model / "llm" / "model.safetensors").read_text().startswith("captioner ")
    assert (model / "SD3" / "vae" / "config.json").read_text().startswith("vae ")
    for path in ("dit/config.json", "SD3/vae/diffusion_pytorch_model.safetensors", "clip/model.safetensors"):
        assert (model / path).read_bytes() == (BUILTIN / path).read_bytes()
    bootstrap(config, tmp_path)
    assert phases[0] == ["vae", "captioner"]
