"""The export of a run: the same bytes on every mesh, one tensor at a time, and the older one until it is complete."""

import gc
import os
import pathlib
import weakref

import jax
import numpy as np
import pytest
from stage_pieces import changed, make_run, nudged
from transformers import Qwen2_5_VLForConditionalGeneration

from uae_jax import sharding, trees
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.stages import export
from uae_jax.stages import run as run_module
from uae_jax.stages.export import export_system
from uae_jax.stages.folders import files
from uae_jax.stages.weights import ModelConfig, load_system

ADAPTERS = ("language_lora", "transformer_lora")


@pytest.fixture(scope="module")
def model(whole):
    """The small model with both adapters, on one device."""
    return dict(whole.parts) | {name: nudged(whole.parts[name]) for name in ADAPTERS}


@pytest.fixture(scope="module")
def exported(whole, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_system(whole.system, model, folder)
    return contents(folder)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def on_mesh(parts: dict) -> dict:
    """The parts cut over all faked devices."""
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices()[:8])
    return sharding.shard_tree(parts, mesh)


def test_all_weights_are_those_of_a_writer_that_holds_the_whole_model(whole, model, exported, tmp_path):
    captioner, transformer, host = whole.system.model.captioner, whole.system.model.transformer, jax.device_get(model)
    tensors = {
        "llm/model": qwen_weights.tensors(captioner, host),
        "llm_lora/adapter_model": lm_weights.adapter_tensors(captioner, host["language_lora"]),
        "dit/diffusion_pytorch_model": published_tensors(
            host["transformer"], sd3_weights.transformer_rules(transformer)
        ),
        "dit_lora/adapter_model": sd3_weights.adapter_tensors(transformer, host["transformer_lora"]),
    }
    for name, pairs in tensors.items():
        write_tensors(tmp_path / name, pairs, stem="all")
        assert exported[f"{name}.safetensors"] == (tmp_path / name / "all.safetensors").read_bytes()


def test_eight_devices_write_the_same_bytes_and_keep_no_copy(whole, model, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 256)  # even a tiny model is cut
    parts = on_mesh(model)
    leaves = jax.tree.leaves({name: part for name, part in parts.items() if name not in ("vae", "encoders", "pooled")})
    assert any(not leaf.is_fully_replicated for leaf in leaves)
    alive, most, fetch = set(), 0, sharding.first_process_value

    def counted(leaf, row=None):
        nonlocal most
        value = fetch(leaf, row)
        alive.add(id(value))
        weakref.finalize(value, alive.discard, id(value))
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(sharding, "first_process_value", counted)
    export_system(whole.system, parts, tmp_path / "export")
    assert contents(tmp_path / "export") == exported
    gc.collect(0)
    assert most <= 2 and not alive  # from jaxlib 0.12 on the tensor before may go a call later
    # jax keeps the host's copy of an array in it; none of the model's has one
    assert all(leaf._npy_value is None for leaf in leaves)


def test_a_bfloat16_export_is_rounded_once_and_opens_elsewhere(whole, model, tmp_path):
    export_system(whole.system, on_mesh(model), tmp_path / "export", "bfloat16")
    again = load_system(ModelConfig(folder=str(tmp_path / "export")), image_size=16).parts
    for name in ("vision", "language", "projector", "transformer", *ADAPTERS):
        theirs = trees.flatten(jax.device_get(model[name]))
        for leaf, value in trees.flatten(again[name]).items():
            np.testing.assert_array_equal(value, theirs[leaf].astype("bfloat16").astype(np.float32), err_msg=leaf)
    stored = TensorFolder(tmp_path / "export" / "llm")
    assert {stored.dtype(name) for name in stored.names()} == {"BF16"}
    opened, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "export" / "llm", dtype="auto", output_loading_info=True
    )
    assert str(opened.dtype) == "torch.bfloat16" and not info["missing_keys"]


def test_a_run_writes_the_precision_of_its_settings(config, tmp_path):
    run = make_run(changed(config, loop=dict(export_dtype="bfloat16")), tmp_path)
    run_module._write_outputs(run, [])
    stored = TensorFolder(tmp_path / "export" / "dit")
    assert {stored.dtype(name) for name in stored.names()} == {"BF16"}


@pytest.mark.parametrize("folder", ["llm", "llm_lora", "dit", "dit_lora"])
def test_a_kill_while_writing_leaves_the_older_export(whole, model, exported, tmp_path, monkeypatch, folder):
    out, write = tmp_path / "export", export.write_items
    export_system(whole.system, model, out)

    def killed(path, items, **settings):
        if path.name == folder:
            (path.parent / "half").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(path, items, **settings)

    monkeypatch.setattr(export, "write_items", killed)
    with pytest.raises(KeyboardInterrupt):
        export_system(whole.system, nudged_all(model), out)
    assert contents(out) == exported
    monkeypatch.undo()
    export_system(whole.system, model, out)  # what the kill left is no hindrance
    assert contents(out) == exported and [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_kill_between_the_names_is_mended_by_the_next_export(whole, model, exported, tmp_path, monkeypatch):
    out, rename = tmp_path / "export", pathlib.Path.rename
    export_system(whole.system, model, out)

    def killed(self, target):
        if self.name == ".export.tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        export_system(whole.system, model, out)
    assert not out.exists()
    monkeypatch.undo()
    files.step_back(out)
    assert contents(out) == exported


def test_unchanged_files_of_the_older_export_are_not_copied_again(whole, model, exported, tmp_path):
    out = tmp_path / "export"
    export_system(whole.system, model, out)
    vae = out / "SD3" / "vae" / "diffusion_pytorch_model.safetensors"
    numbers = {path: path.stat().st_ino for path in (vae, out / "dit" / "diffusion_pytorch_model.safetensors")}
    touched = out / "SD3" / "vae" / "config.json"
    text = touched.read_bytes()
    touched.write_bytes(b"#" * len(text))
    os.utime(touched, ns=(0, 0))
    export_system(whole.system, model, out)
    assert {path: path.stat().st_ino == number for path, number in numbers.items()} == dict(zip(numbers, (True, False)))
    assert contents(out) == exported


def nudged_all(parts: dict) -> dict:
    return parts | {name: nudged(parts[name]) for name in ("language", "projector", "transformer", *ADAPTERS)}
