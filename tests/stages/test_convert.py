"""Folders that are checked, exported and built: what a person sees, what is refused, and that no bit changes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from stage_pieces import exported, nudged

from uae_jax import convert, infer
from uae_jax.data import scenes
from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.encoders import clip, openai
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig, LongCLIPTextConfig
from uae_jax.stages.export import export_system
from uae_jax.stages.weights import ModelConfig, load_system

SIDE = 16


def converted(*arguments):
    """Runs the command; anything but success is an error here."""
    convert.main([str(argument) for argument in arguments])


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        converted(*arguments)
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def checked(folder, capsys, *flags) -> tuple[int, dict]:
    """Exit code and rows by part."""
    code = 0
    try:
        converted("check", folder, "--json", *flags)
    except SystemExit as stop:
        code = stop.code
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] == (code == 0)
    return code, {row["part"]: row for row in result["parts"]}


def stored(folder) -> dict[str, np.ndarray]:
    """All tensors of a part."""
    tensors = TensorFolder(folder)
    return {name: np.array(tensors.read(name)) for name in tensors.names()}


def rewrite(folder, change):
    tensors = stored(folder)
    change(tensors)
    stem = next(folder.glob("*.safetensors")).name.split(".")[0]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_tensors(folder, tensors, stem=stem)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def adapted(whole, tmp_path_factory):
    """A workdir with both adapters, none of them zero; the model read back, and the workdir."""
    workdir = tmp_path_factory.mktemp("runs")
    parts = dict(whole.parts) | {name: nudged(whole.parts[name]) for name in ("language_lora", "transformer_lora")}
    export_system(whole.system, parts, workdir / "export")
    return load_system(ModelConfig(folder=str(workdir)), image_size=SIDE), workdir


@pytest.fixture(scope="module")
def hub(adapted, tmp_path_factory):
    """The workdir's export for the PyTorch libraries, in files of at most 20 kB."""
    return exported(adapted[1], tmp_path_factory.mktemp("converted") / "hub")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the whole model, to be damaged."""
    return shutil.copytree(model_folder, tmp_path / "model")


def test_sharded_files_have_an_index_and_keep_the_limit(hub):
    for part, stem in (("llm", "model"), ("SD3/transformer", "diffusion_pytorch_model")):
        index = json.loads((hub / part / f"{stem}.safetensors.index.json").read_text())
        tensors = stored(hub / part)
        assert set(index["weight_map"]) == set(tensors) and len(set(index["weight_map"].values())) > 2
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        largest = max(tensor.nbytes for tensor in tensors.values())
        assert all(file.stat().st_size < max(20_000, largest) + 10_000 for file in (hub / part).glob("*.safetensors"))


@pytest.mark.parametrize("llm_lora", ["peft", "wrapped"])
def test_the_official_layout_reads_back_bit_equal(adapted, tmp_path, llm_lora):
    system, workdir = adapted
    converted("export", workdir, tmp_path / "official", "--llm-lora", llm_lora)
    if llm_lora == "wrapped":
        assert len(list((tmp_path / "official" / "llm_lora").glob("model-0000?-of-00003.safetensors"))) == 3
    again = load_system(ModelConfig(folder=str(tmp_path / "official")), image_size=SIDE)
    assert again.model == system.model
    jax.tree.map(np.testing.assert_array_equal, again.parts, system.parts)


def sources(folder, pipeline, *, encoders=("clip", "dinov2")) -> list:
    """Arguments of `import` for the parts of a hub export."""
    flags = {"llm": folder / "llm", "sd3": pipeline} | {
        name: folder / name for name in ("projector", "llm_lora", "dit_lora", *encoders) if (folder / name).is_dir()
    }
    return [text for name, path in flags.items() for text in (f"--{name}", path)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_export_import_is_bit_exact(adapted, tmp_path, dtype, capsys):
    converted("export", adapted[1], tmp_path / "first", "--dtype", dtype)
    rewrite(
        tmp_path / "first" / "dit",
        lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].astype(np.float32)}),
    )  # files may mix precisions
    converted("export", tmp_path / "first", tmp_path / "hub", "--layout", "hub", "--max-shard-gb", "2e-5")
    converted("import", *sources(tmp_path / "hub", tmp_path / "hub" / "SD3"), tmp_path / "second")
    converted("export", tmp_path / "second", tmp_path / "third", "--llm-lora", "wrapped")
    capsys.readouterr()
    for part in ("llm", "dit", "dit_lora", "SD3/vae", "SD3/text_encoder", "SD3/text_encoder_2", "clip", "dinov2"):
        first = stored(tmp_path / "first" / part)
        assert {tensor.dtype.name for tensor in first.values()} <= {dtype, "float32"}
        for other in ("second", "third"):
            assert_same_bits(first, stored(tmp_path / other / part))
    code, rows = checked(tmp_path / "third", capsys)
    assert code == 0 and rows["llm"]["dtypes"] == {dtype: rows["llm"]["expected"]}
    declared = json.loads((tmp_path / "hub" / "llm" / "config.json").read_text())
    assert dtype in (declared.get("dtype"), declared.get("torch_dtype"))


def test_casting_rounds_once_and_refuses_what_does_not_fit(folder, tmp_path):
    converted("export", folder, tmp_path / "half", "--dtype", "bfloat16")
    before, after = stored(folder / "dit"), stored(tmp_path / "half" / "dit")
    for name in before:
        assert after[name].tobytes() == torch.tensor(before[name]).bfloat16().view(torch.int16).numpy().tobytes()
    rewrite(folder / "dit", lambda tensors: tensors["proj_out.bias"].__setitem__(0, 1e6))
    assert "proj_out.bias has numbers that float16 cannot hold" in refused(
        "export", folder, tmp_path / "new", "--dtype", "float16"
    )
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_plain_models_become_a_folder_that_runs(hub, tmp_path, capsys):
    plain = tmp_path / "plain"
    for part in ("llm", "SD3", "clip"):
        shutil.copytree(hub / part, plain / part)
    out = tmp_path / "new"
    flags = ["--llm", plain / "llm", "--sd3", plain / "SD3", "--clip", plain / "clip"]
    converted("import", *flags, "--seed", "3", "--link", out)
    said = capsys.readouterr().out
    assert "32 -> 128 -> 16" in said and "seed 3" in said and "pretrain" in said
    assert (out / "clip" / "config.json").stat().st_ino == (plain / "clip" / "config.json").stat().st_ino
    assert checked(out, capsys)[0] == 0
    again = tmp_path / "again"
    converted("import", *flags, "--seed", "3", again)
    assert_same_bits(stored(out / "llm"), stored(again / "llm"))
    assert not any(name.startswith("projector") for name in stored(plain / "llm"))  # links did not change the source
    capsys.readouterr()
    Image.fromarray(scenes.draw(scenes.scene_at("test", 0), 32)).save(tmp_path / "scene.png")
    infer.main(
        [
            "reconstruct",
            str(tmp_path / "scene.png"),
            "--checkpoint",
            str(out),
            "--out",
            str(tmp_path / "drawn"),
            "--size",
            "16",
            "--steps",
            "2",
            "--max_new_tokens",
            "4",
            "--prompt",
            "describe",
            "--guidance_scale",
            "1",
        ]
    )
    assert (tmp_path / "drawn" / "scene_strip.png").exists()


@pytest.mark.parametrize(
    "published",
    [{"max_pixels": 12845056}, {"max_pixels": None, "size": {"shortest_edge": 64, "longest_edge": 12845056}}],
)
def test_import_lowers_the_published_number_of_pixels(hub, tmp_path, capsys, published):
    llm = shutil.copytree(hub / "llm", tmp_path / "llm")
    settings = json.loads((llm / "preprocessor_config.json").read_text()) | published
    (llm / "preprocessor_config.json").write_text(json.dumps(settings))
    converted("import", "--llm", llm, "--sd3", hub / "SD3", "--fast", "--link", tmp_path / "new")
    assert "lowered from 12845056 to the release's 65536" in capsys.readouterr().out
    for name in ("llm_processor", "llm"):
        assert load_image_processor(tmp_path / "new" / name, 16) == dataclasses.replace(
            load_image_processor(llm, 16), max_pixels=65536
        )
    assert json.loads((llm / "preprocessor_config.json").read_text()) == settings  # links did not change the source
    converted("import", "--llm", tmp_path / "new" / "llm", "--sd3", hub / "SD3", "--fast", tmp_path / "again")
    assert "lowered" not in capsys.readouterr().out


def test_check_reads_every_kind_of_folder(adapted, hub, model_folder, capsys):
    _, workdir = adapted
    code, rows = checked(workdir, capsys)
    assert code == 0 and {
        "llm",
        "llm_lora",
        "llm_processor",
        "dit",
        "dit_lora",
        "SD3/vae",
        "SD3/scheduler",
        "clip",
    } <= set(rows)
    for row in rows.values():
        assert row["matched"] == row["expected"] and not row["missing"] and not row["unknown"]
    assert rows["llm"]["dtypes"] == {"float32": rows["llm"]["expected"]}
    assert rows["dit"]["parameters"] == sum(tensor.size for tensor in stored(workdir / "export" / "dit").values())
    alone = {
        model_folder / "dit": {"dit"},
        model_folder / "clip": {"clip"},
        model_folder / "dinov2": {"dinov2"},
        hub / "llm": {"llm", "llm_processor"},
        hub / "llm_lora": {"llm_lora"},
        hub / "dit_lora": {"dit_lora"},
        hub / "projector": {"projector"},
        model_folder / "SD3" / "vae": {"SD3/vae"},
        model_folder / "SD3" / "text_encoder": {"SD3/text_encoder"},
        hub / "SD3": {f"SD3/{name}" for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler")},
    }
    for folder, parts in alone.items():
        code, rows = checked(folder, capsys)
        assert code == 0 and set(rows) == parts


def test_the_table_is_readable_when_piped(model_folder, capsys):
    converted("check", model_folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("official layout") and lines[1].split()[:2] == ["part", "files"]
    assert any(line.startswith("llm ") and "float32" in line for line in lines) and lines[-1].endswith("all complete")


def test_licences_are_found(folder, capsys):
    (folder / "SD3" / "LICENSE.md").write_text("community")
    (folder / "dit" / "README.md").write_text("---\ntags: [a]\nlicense: openrail++\n---\ntext\n")
    (folder / "clip" / "README.md").write_text("no front matter\nlicense: not this\n")
    _, rows = checked(folder, capsys, "--fast")
    assert [rows[name]["licence"] for name in ("SD3/vae", "dit", "clip")] == ["LICENSE.md", "README: openrail++", None]


def pop(name):
    return lambda tensors: tensors.pop(name)


def rename(name):
    return lambda tensors: tensors.update({f"{name}_old": tensors.pop(name)})


def spoil(name):
    return lambda tensors: tensors[name].reshape(-1).__setitem__(1, np.nan)


def narrow(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


NORM = "transformer_blocks.0.attn.norm_added_k.weight"


@pytest.mark.parametrize(
    "part, name, change, message",
    [
        ("llm", "model.layers.1.mlp.up_proj.weight", pop, "misses model.layers.1.mlp.up_proj.weight"),
        ("dit", NORM, rename, f"{NORM}_old"),
        ("SD3/vae", "decoder.conv_in.weight", spoil, "decoder.conv_in.weight has 1 of"),
        ("clip", "visual_projection.weight", narrow, "visual_projection.weight is [7, 16]"),
    ],
)
def test_a_damaged_tensor_is_named_and_nothing_is_written(folder, tmp_path, capsys, part, name, change, message):
    rewrite(folder / part, change(name))
    code, rows = checked(folder, capsys)
    assert code == 1 and any(message in problem for problem in rows[part]["problems"])
    assert str(folder / part) in rows[part]["problems"][0] and name in rows[part]["problems"][0]
    assert [name for name, row in rows.items() if row["problems"]] == [part]  # all others are still told
    text = refused("export", folder, tmp_path / "new", "--layout", "hub")
    assert name in text and str(folder / part) in text
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_a_file_cut_short_is_named_with_what_is_lost(folder, tmp_path, capsys):
    file = folder / "dit" / "diffusion_pytorch_model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    code, rows = checked(folder, capsys)
    problem = rows["dit"]["problems"][0]
    assert code == 1 and str(file) in problem and f"of {size:,} bytes" in problem and "copy it again" in problem
    assert str(file) in refused("export", folder, tmp_path / "new")


@pytest.mark.parametrize(
    "part, other, message",
    [
        ("llm", "clip", "'clip'"),
        ("dit", "SD3/vae", "holds a 'AutoencoderKL' model"),
        ("clip", "dinov2", "dinov2, not clip"),
        ("SD3/vae", "dit", "holds a 'SD3Transformer2DModel' model"),
    ],
)
def test_another_model_in_the_place_of_a_part_is_named(folder, tmp_path, capsys, part, other, message):
    shutil.rmtree(folder / part)
    shutil.copytree(folder / other, folder / part)
    code, rows = checked(folder, capsys)
    assert code == 1 and message in rows[part]["problems"][0] and str(folder / part) in rows[part]["problems"][0]
    refused("export", folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_parts_that_do_not_fit_each_other_are_named(folder, capsys):
    rewrite(
        folder / "llm",
        lambda tensors: tensors.update(
            {"projector.2.weight": np.zeros((20, 24), np.float32), "projector.2.bias": np.zeros(20, np.float32)}
        ),
    )
    assert "joint_attention_dim 16" in checked(folder, capsys)[1]["llm"]["problems"][0]


def test_a_projector_without_its_tensors_is_named(hub, tmp_path, capsys):
    alone = shutil.copytree(hub / "projector", tmp_path / "projector")
    rewrite(alone, pop("projector.2.weight"))
    code, rows = checked(alone, capsys)
    assert code == 1 and "has no projector.0 and projector.2 tensors" in rows["projector"]["problems"][0]


def test_absent_parts_are_rows(folder, capsys):
    shutil.rmtree(folder / "SD3" / "vae")
    code, rows = checked(folder, capsys)
    assert code == 1 and "is not there" in rows["SD3/vae"]["problems"][0]


def test_import_refuses_what_is_not_that_model(hub, tmp_path):
    flags = ["--llm", hub / "llm", "--sd3", hub / "SD3"]
    assert "--clip" in refused("import", *flags, "--clip", hub / "dinov2", tmp_path / "new")
    assert "not llm" in refused("import", "--llm", hub / "clip", "--sd3", hub / "SD3", tmp_path / "new")
    assert "--sd3" in refused("import", "--llm", hub / "llm", "--sd3", hub / "clip", tmp_path / "new")
    broken = shutil.copytree(hub / "clip", tmp_path / "clip")
    for file in broken.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert "truncated" in refused("import", *flags, "--clip", broken, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_long_clip_comes_from_its_published_file(hub, tmp_path, capsys):
    small = dict(hidden_size=64, intermediate_size=16, projection_dim=8, num_hidden_layers=1, num_attention_heads=1)
    config = CLIPConfig(
        CLIPVisionConfig(**small, image_size=16, patch_size=8),
        LongCLIPTextConfig(**small, vocab_size=9, max_position_embeddings=12),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float16), clip.abstract_params(config))
    tensors = dict(published_tensors(params, openai.rules(config)))
    for name in [name for name in tensors if name.endswith("[query]")]:
        fused = name.removesuffix("[query]")
        tensors[fused] = np.concatenate([tensors.pop(f"{fused}[{piece}]") for piece in openai.PARTS])
    torch.save({name: torch.tensor(np.array(tensor)) for name, tensor in tensors.items()}, tmp_path / "longclip-L.pt")
    code, rows = checked(tmp_path / "longclip-L.pt", capsys)
    assert code == 0 and rows["longclip"]["dtypes"] == {"float16": rows["longclip"]["expected"]}
    converted(
        "import", "--llm", hub / "llm", "--sd3", hub / "SD3", "--longclip", tmp_path / "longclip-L.pt", tmp_path / "new"
    )
    converted("export", tmp_path / "new", tmp_path / "official")
    capsys.readouterr()
    assert checked(tmp_path / "official", capsys)[1]["longclip"]["problems"] == []
    assert_same_bits(tensors, stored(tmp_path / "official" / "longclip"))


def test_folders_are_not_overwritten_unless_asked(folder, model_folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert "is not empty" in refused("export", model_folder, folder, "--parts", "dit")
    assert "not a model folder" in refused("export", model_folder, tmp_path / "notes", "--overwrite")
    assert "holds the source" in refused("export", folder, folder, "--overwrite")
    assert "make it first" in refused("export", folder, tmp_path / "no" / "parent")
    converted("export", model_folder, folder, "--parts", "dit", "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "dit"]
    assert "no part 'decoder'" in refused("export", model_folder, tmp_path / "new", "--parts", "decoder")


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path):
    assert "holds no part of a model" in refused("check", tmp_path)
    assert "does not exist" in refused("check", tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "'t5', which is no part of UAE" in refused("check", tmp_path)
