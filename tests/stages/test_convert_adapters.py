"""Every adapter that a run reads is checked and exported too, and read back it is the same."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from wrapped_layout import wrapped_tensors

from uae_jax import convert, trees
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.language.model import ADAPTER_PATTERN
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.sd3.transformer import ATTENTION_ADAPTER
from uae_jax.nn.lora import init_lora
from uae_jax.stages.weights import ModelConfig, load_system

RANK = 2
CONFIG, HEADER = "adapter_config.json", "lora_adapter_metadata"


def load(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a scale that no file says
        return load_system(ModelConfig(folder=str(folder), **settings), image_size=16)


def random_adapter(params, pattern, rank=RANK):
    adapter, rng = init_lora(jax.random.key(0), params, pattern, rank), np.random.default_rng(rank)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), adapter)


def settings(rank=RANK, **values):
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 6, **values}


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def language(system):
    return dict(
        lm_weights.adapter_tensors(system.model.captioner, random_adapter(system.parts["language"], ADAPTER_PATTERN))
    )


def transformer(system, pattern=ATTENTION_ADAPTER):
    return dict(
        sd3_weights.adapter_tensors(system.model.transformer, random_adapter(system.parts["transformer"], pattern))
    )


def without_config(system, folder):
    write_tensors(folder / "llm_lora", language(system), stem="adapter_model")
    write_tensors(folder / "dit_lora", transformer(system), stem="adapter_model")


def rank_stabilised(system, folder):
    for name, tensors in (("llm_lora", language(system)), ("dit_lora", transformer(system))):
        write_tensors(folder / name, tensors, stem="adapter_model")
        (folder / name / CONFIG).write_text(json.dumps(settings(use_rslora=True)))


def ranks_by_pattern(system, folder):
    params = system.parts["language"]
    adapters = random_adapter(params, ADAPTER_PATTERN), random_adapter(params, r"layers/mlp/up", 3)
    adapter = trees.unflatten({name: leaf for tree in adapters for name, leaf in trees.flatten(tree).items()})
    write_tensors(
        folder / "llm_lora", lm_weights.adapter_tensors(system.model.captioner, adapter), stem="adapter_model"
    )
    (folder / "llm_lora" / CONFIG).write_text(
        json.dumps(settings(rank_pattern={"up_proj": 3}, target_modules=["up_proj", "q_proj"]))
    )


def diffusers_file(system, folder):
    """Any linear map, in some blocks only, with the settings in the header."""
    tensors = transformer(system, r".*(query|norm1/linear|proj_out)")
    tensors = {
        name.replace("base_model.model.", "transformer."): np.ascontiguousarray(value)
        for name, value in tensors.items()
        if "blocks.0." not in name
    }
    (folder / "dit_lora").mkdir()
    save_file(
        tensors,
        folder / "dit_lora" / "pytorch_lora_weights.safetensors",
        {"format": "pt", HEADER: json.dumps({f"transformer.{name}": value for name, value in settings().items()})},
    )


def old_diffusers_file(system, folder):
    names = ((".lora_A.", ".lora.down."), (".lora_B.", ".lora.up."), ("base_model.model.", "transformer."))
    tensors = {}
    for name, value in transformer(system).items():
        for theirs, old in names:
            name = name.replace(theirs, old)
        tensors[name] = np.ascontiguousarray(value)
        tensors[name.partition(".lora.")[0] + ".alpha"] = np.float32(3.0)
    (folder / "dit_lora").mkdir()
    save_file(
        {name: np.asarray(value) for name, value in tensors.items()},
        folder / "dit_lora" / "pytorch_lora_weights.safetensors",
    )


def wrapped(system, folder):
    base = jax.tree.map(
        lambda leaf: leaf + np.float32(0.5), {name: system.parts[name] for name in ("vision", "language", "projector")}
    )
    adapter = random_adapter(base["language"], ADAPTER_PATTERN)
    write_tensors(folder / "llm_lora", wrapped_tensors(system.model.captioner, base, adapter))


def wrapped_alone(system, folder):
    wrapped(system, folder)
    (folder / "llm" / "config.json").rename(folder / "llm_lora" / "config.json")
    shutil.rmtree(folder / "llm")


def wrapped_beside_a_config(system, folder):
    wrapped(system, folder)
    (folder / "llm" / "model.safetensors").unlink()


def wrapped_without_projector(system, folder):
    wrapped(system, folder)
    tensors = TensorFolder(folder / "llm_lora")
    kept = {name: np.array(tensors.read(name)) for name in tensors.names() if not name.startswith("projector.")}
    shutil.rmtree(folder / "llm_lora")
    write_tensors(folder / "llm_lora", kept)


LAYOUTS = (
    without_config,
    rank_stabilised,
    ranks_by_pattern,
    diffusers_file,
    old_diffusers_file,
    wrapped,
    wrapped_alone,
    wrapped_beside_a_config,
    wrapped_without_projector,
)


def run(capsys, *arguments) -> str:
    """Output of a command that succeeds."""
    capsys.readouterr()
    convert.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def assert_same_model(one, other):
    assert one.model == other.model
    jax.tree.map(np.testing.assert_array_equal, one.parts, other.parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_run_reads_is_checked_and_exported(model_folder, folder, tmp_path, capsys, layout):
    plain = load(model_folder)
    layout(plain, folder)
    system = load(folder)
    assert {"language_lora", "transformer_lora"} & set(system.parts)
    rows = {row["part"]: row for row in json.loads(run(capsys, "check", folder, "--json"))["parts"]}
    for name in ("llm", "llm_lora", "dit_lora"):
        if name in rows:
            assert rows[name]["ok"] and rows[name]["matched"] == rows[name]["expected"] > 0
    run(capsys, "export", folder, tmp_path / "official")
    assert_same_model(load(tmp_path / "official"), system)
    if "language_lora" in system.parts:
        run(capsys, "export", folder, tmp_path / "wrapped", "--llm-lora", "wrapped")
        assert_same_model(load(tmp_path / "wrapped"), system)
    run(capsys, "export", folder, tmp_path / "merged", "--merge-adapters")
    merged, expected = load(tmp_path / "merged"), load(folder, merge_adapters=True)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6), merged.parts, expected.parts
    )


def test_an_adapter_of_the_image_encoder_is_merged(model_folder, folder, tmp_path, capsys):
    plain, rng = load(model_folder), np.random.default_rng(0)
    width, fused = plain.model.captioner.vision.width, 3 * plain.model.captioner.vision.width
    factors = {
        f"base_model.model.model.visual.blocks.{layer}.attn.qkv.lora_{side}.weight": rng.standard_normal(shape).astype(
            np.float32
        )
        for layer in range(2)
        for side, shape in (("A", (RANK, width)), ("B", (fused, RANK)))
    }
    write_tensors(folder / "llm_lora", language(plain) | factors, stem="adapter_model")
    (folder / "llm_lora" / CONFIG).write_text(json.dumps(settings()))
    assert "merge it" in run(capsys, "check", folder)
    run(capsys, "export", folder, tmp_path / "merged", "--merge-adapters")
    run(capsys, "export", folder, tmp_path / "beside")
    expected = load(folder, merge_adapters=True)
    assert (
        np.abs(
            expected.parts["vision"]["blocks"]["qkv"]["kernel"] - plain.parts["vision"]["blocks"]["qkv"]["kernel"]
        ).max()
        > 0.1
    )
    assert_same_model(load(tmp_path / "beside", merge_adapters=True), expected)
    ours = load(tmp_path / "merged").parts
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5), ours, expected.parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: name.replace("layers.1.", "layers.7."), "adapts modules that this model does not have"),
        (lambda name: None if "layers.1.mlp.up_proj.lora_B" in name else name, "half of an adapter; missing: "),
        (lambda name: None if "layers.1.mlp.up_proj" in name else name, "missing: model.layers.1.mlp.up_proj"),
    ],
)
def test_a_damaged_adapter_is_named_and_nothing_is_written(model_folder, folder, tmp_path, capsys, change, message):
    tensors = {change(name): value for name, value in language(load(model_folder)).items()}
    write_tensors(folder / "llm_lora", {name: value for name, value in tensors.items() if name}, stem="adapter_model")
    with pytest.raises(SystemExit) as stop:
        run(capsys, "check", folder)
    assert stop.value.code == 1 and message in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run(capsys, "export", folder, tmp_path / "new")
    assert message in stop.value.code and str(folder / "llm_lora") in stop.value.code
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=message):
        load(folder)
