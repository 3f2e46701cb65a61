"""One folder, one set of weights; other formats and the Hub are named with what helps."""

import json
import types

import numpy as np
import pytest

from uae_jax import convert
from uae_jax.hf import formats, hub
from uae_jax.hf.file_sets import unread_weights
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.stages.folders.parts import find_parts
from uae_jax.stages.weights import BUILTIN, model_folder

TENSORS = {f"layers.{number}.weight": np.full((4, 8), number, np.float32) for number in range(4)}
NEWER = {name: value + 1 for name, value in TENSORS.items()}


def shards_and(folder, **files):
    write_tensors(folder / "new", NEWER)
    write_tensors(folder, TENSORS, max_shard_bytes=300)
    for name in files.values():
        (folder / "new" / "model.safetensors").rename(folder / name)


@pytest.mark.parametrize("index", [True, False], ids=["with an index", "without"])
def test_old_shards_beside_a_newer_file_are_refused_and_both_are_named(tmp_path, index):
    shards_and(tmp_path, name="model.safetensors")
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="two sets of weights, .*model.*model.*; ") as stop:
        TensorFolder(tmp_path)
    assert ("model.safetensors.index.json" if index else "model-00001-of-00002") in str(stop.value)


def test_shards_of_two_exports_are_refused(tmp_path):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    (tmp_path / "model-00001-of-00007.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="two sets of weights.*00001-of-00007"):
        TensorFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="two sets of shards"):
        TensorFolder(tmp_path)


def test_two_indexes_are_refused_and_a_variant_is_not_read(tmp_path):
    write_tensors(tmp_path, TENSORS, max_shard_bytes=300)
    index = tmp_path / "model.safetensors.index.json"
    for shard in list(tmp_path.glob("model-*.safetensors")):
        (tmp_path / shard.name.replace("model-", "model.fp16-")).write_bytes(shard.read_bytes())
    named = index.read_text().replace("model-", "model.fp16-")
    (tmp_path / "model.fp16.safetensors.index.json").write_text(named)
    assert {file.name[:6] for file in TensorFolder(tmp_path).files.values()} == {"model-"}
    assert unread_weights(tmp_path)[0].startswith("model.fp16-00001")
    (tmp_path / "other.safetensors.index.json").write_text(index.read_text())
    with pytest.raises(ValueError, match="model.safetensors.index.json and other.safetensors.index.json are both"):
        TensorFolder(tmp_path)


def test_convert_check_says_so_too(tmp_path, capsys):
    import shutil

    shutil.copytree(BUILTIN / "dit", tmp_path / "dit")
    stored = TensorFolder(tmp_path / "dit")
    tensors = {name: stored.read(name) for name in stored.names()}
    write_tensors(tmp_path / "shards", tensors, stem="diffusion_pytorch_model", max_shard_bytes=200_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for file in (tmp_path / "shards").iterdir():
        file.rename(tmp_path / "dit" / file.name)
    (tmp_path / "dit" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(SystemExit) as stop:
        convert.main(["check", str(tmp_path / "dit"), "--json"])
    (row,) = json.loads(capsys.readouterr().out)["parts"]
    assert stop.value.code == 1 and "two sets of weights" in row["problems"][0]
    (tmp_path / "dit" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for file in (tmp_path / "dit").glob("diffusion_pytorch_model-*"):
        file.unlink()
    convert.main(["check", str(tmp_path / "dit"), "--json"])
    (row,) = json.loads(capsys.readouterr().out)["parts"]
    assert row["ok"] and any("not read" in note and "diffusion_pytorch_model.bin" in note for note in row["notes"])


GGUF = ("model-q4.gguf", "holds model-q4.gguf, a quantised format.*hf download")
TORCH = ("pytorch_model.bin", "holds pytorch_model.bin, a format of PyTorch.*save_pretrained")


@pytest.mark.parametrize(
    ("name", "message", "read"),
    [(*kind, read) for kind in (GGUF, TORCH) for read in (TensorFolder, model_folder)] + [(*GGUF, find_parts)],
)
def test_other_formats_are_named_with_what_helps(tmp_path, name, message, read):
    (tmp_path / name).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path)


def cache(folder, *revisions, main=""):
    root = folder / "models--org--uae"
    for revision in revisions:
        (root / "snapshots" / revision / "llm").mkdir(parents=True)
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


def test_a_cache_folder_of_the_hub_is_read_by_its_snapshot(tmp_path):
    root = cache(tmp_path, "aa", "bb", main="bb")
    assert model_folder(root) == model_folder(root / "snapshots") == root / "snapshots" / "bb"
    (root / "refs" / "main").unlink()
    with pytest.raises(ValueError, match="2 snapshots; give one.*hf download org/uae"):
        model_folder(root)
    with pytest.raises(FileNotFoundError, match="is the cache of the Hub; give the folder of one model"):
        model_folder(tmp_path)


def test_what_a_hub_id_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert formats.is_hub_id("Qwen/Qwen2.5-VL-3B-Instruct")
    assert not any(map(formats.is_hub_id, ("runs/smal", "/no/checkpoint", "a/b/c", "runs", "../a/b", "")))


class Library:
    """huggingface_hub without a network: what was asked of it."""

    def __init__(self, folder, files, error=None):
        self.constants = types.SimpleNamespace(HF_HUB_OFFLINE=True)
        self.folder, self.files, self.error, self.online = folder, files, error, []

    def HfApi(self):  # noqa: N802
        return self

    def model_info(self, name, files_metadata):
        if self.error:
            raise self.error
        files = [types.SimpleNamespace(rfilename=file, size=size) for file, size in self.files.items()]
        return types.SimpleNamespace(siblings=files, tags=["x", "license:apache-2.0"])

    def snapshot_download(self, name, local_files_only=False, ignore_patterns=()):
        if local_files_only:
            raise RuntimeError("not in the cache")
        self.online.append((self.constants.HF_HUB_OFFLINE, "*.bin" in ignore_patterns))
        return str(self.folder)


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "there" / "llm").mkdir(parents=True)
    made = Library(tmp_path / "there", {"llm/model.safetensors": 2_000_000_000, "llm/pytorch_model.bin": 10**12})
    monkeypatch.setattr(hub, "_hub", lambda name: made)
    return made


def test_a_hub_id_is_downloaded_after_size_and_licence_are_told(library, capsys):
    assert model_folder("org/uae") == library.folder
    assert capsys.readouterr().err == (
        "org/uae: 1 files, 2.00 GB, licence apache-2.0; downloading to the Hub's cache\n"
    )
    assert library.online == [(False, True)] and library.constants.HF_HUB_OFFLINE is True


def test_an_id_of_one_model_is_not_downloaded_as_a_checkpoint(library):
    library.files = {"model.safetensors": 7_500_000_000, "config.json": 10}
    with pytest.raises(ValueError, match="7.50 GB, licence apache-2.0.* of one model.*convert import --llm"):
        model_folder("Qwen/Qwen2.5-VL-3B-Instruct")
    assert not library.online
    assert hub.local_folder("Qwen/Qwen2.5-VL-3B-Instruct") == library.folder


def test_offline_is_one_line(library, monkeypatch):
    library.error = ConnectionError("no route\nto host")
    with pytest.raises(FileNotFoundError, match=r"does not exist here, and as a Hub id .*\(no route to host\)") as stop:
        model_folder("org/uae")
    assert "\n" not in str(stop.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set.*hf download org/uae"):
        model_folder("org/uae")
    library.error = None
    monkeypatch.setenv(hub.OWN_OFFLINE, "1")
    assert model_folder("org/uae") == library.folder


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "uae_jax\[hub\]"'):
        model_folder("org/uae")
