"""Long-CLIP and CLIP in OpenAI's names against a PyTorch model written from their papers, on random weights."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.torch import save_file
from torch import nn

from uae_jax import trees
from uae_jax.hf.torch_file import TorchFile
from uae_jax.models.encoders import clip, weights
from uae_jax.models.encoders.config import CLIPTextConfig, LongCLIPTextConfig
from uae_jax.rewards.similarity import load_encoder

TOLERANCE = 1e-4
POSITIONS, KEPT, VOCABULARY = 26, 20, 50
image_features = jax.jit(clip.image_features, static_argnums=0)
text_features = jax.jit(clip.text_features, static_argnums=0)


class ReferenceBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class ReferenceVision(nn.Module):
    def __init__(self, side: int = 28, patch: int = 7, width: int = 128, layers: int = 2, out: int = 20):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(ReferenceBlock(width) for _ in range(layers))})
        self.proj = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class Reference(nn.Module):
    """The published state's names are those of the attributes here; `long` has the second table of positions."""

    def __init__(self, long: bool = True, width: int = 64, layers: int = 2, out: int = 20):
        super().__init__()
        self.visual = ReferenceVision(out=out)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(ReferenceBlock(width) for _ in range(layers))})
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(POSITIONS, width))
        if long:
            self.positional_embedding_res = nn.Parameter(torch.randn(POSITIONS, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, ids):
        early = (torch.arange(POSITIONS) < KEPT)[:, None]
        table = self.positional_embedding
        table = (
            torch.where(early, table, self.positional_embedding_res)
            if hasattr(self, "positional_embedding_res")
            else table
        )
        x = self.token_embedding(ids) + table[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def reference(long: bool = True) -> Reference:
    torch.manual_seed(0)
    model = Reference(long)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def texts() -> np.ndarray:
    """A long text, one that ends in the kept positions, one that fills the table."""
    ids = np.random.default_rng(2).integers(1, VOCABULARY - 1, (3, POSITIONS))
    for row, end in enumerate((22, 5, POSITIONS - 1)):
        ids[row, end], ids[row, end + 1 :] = VOCABULARY - 1, 0
    return ids


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 28, 28, 3)).astype(np.float32)


def relative_error(ours, theirs) -> float:
    theirs = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def check_features(model: Reference, config, params):
    pixels, ids = images(), texts()
    theirs = model.visual(torch.tensor(pixels.transpose(0, 3, 1, 2).copy()))
    assert relative_error(image_features(config, params, jnp.asarray(pixels)), theirs) < TOLERANCE
    assert (
        relative_error(text_features(config, params, jnp.asarray(ids)), model.encode_text(torch.tensor(ids)))
        < TOLERANCE
    )


@pytest.fixture(scope="module")
def long() -> Reference:
    return reference()


def test_safetensors_folder_gives_the_features_of_both_towers(long, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in long.state_dict().items()}, tmp_path / "model.safetensors")
    config, params = weights.load_clip(tmp_path)
    assert isinstance(config.text, LongCLIPTextConfig)
    assert (config.vision.num_attention_heads, config.text.num_attention_heads) == (2, 1)
    assert params["logit_scale"].shape == ()
    check_features(long, config, params)


@pytest.mark.parametrize("whole", [True, False])
def test_torch_file_is_read_by_folder_and_by_path(long, tmp_path, whole):
    torch.save(long.state_dict(), tmp_path / "longclip-L.pt")
    check_features(long, *weights.load_clip(tmp_path if whole else tmp_path / "longclip-L.pt"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_states_become_float32(tmp_path, stored):
    model = reference().to(stored)
    torch.save(model.state_dict(), tmp_path / "longclip-L.pt", _use_new_zipfile_serialization=stored is torch.float16)
    config, params = weights.load_clip(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    check_features(model.float(), config, params)


def test_original_clip_state_has_one_table_of_positions(tmp_path):
    model = reference(long=False)
    sizes = dict(input_resolution=28, context_length=POSITIONS, vocab_size=VOCABULARY)
    sizes = {name: torch.tensor(value) for name, value in sizes.items()}
    torch.save(model.state_dict() | sizes, tmp_path / "ViT-L-14.pt")
    config, params = weights.load_clip(tmp_path)
    assert type(config.text) is CLIPTextConfig and weights.open_encoder(tmp_path).kind == "clip"
    check_features(model, config, params)


def test_saved_as_a_clip_model_it_opens_in_transformers_with_the_same_features(long, tmp_path):
    torch.save(long.state_dict(), tmp_path / "longclip-L.pt")
    weights.save_clip(tmp_path / "out", *weights.load_clip(tmp_path))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "kept_positions" not in raw["text_config"] and raw["text_config"]["max_position_embeddings"] == POSITIONS
    check_features(long, *weights.load_clip(tmp_path / "out"))
    theirs, ids = transformers.CLIPModel.from_pretrained(tmp_path / "out"), torch.tensor(texts())
    features = theirs.get_text_features(input_ids=ids)
    features = features if torch.is_tensor(features) else features.pooler_output
    torch.testing.assert_close(features, long.encode_text(ids), rtol=1e-4, atol=1e-4)


def test_the_reward_reads_the_folder_with_its_own_image_processing(long, tmp_path):
    torch.save(long.state_dict(), tmp_path / "longclip-L.pt")
    encoder, params = load_encoder(tmp_path)
    assert (encoder.name, encoder.kind, encoder.preprocess.crop_offset) == ("longclip", "clip", "round")
    assert encoder.preprocess.size == (28,) and set(params) == {"vision"}
    features = encoder.features(params, jnp.zeros((1, 40, 30, 3)))
    assert features.shape == (1, 20) and abs(float(jnp.linalg.norm(features)) - 1) < 1e-4
    assert load_encoder(tmp_path, variant="uae")[0].preprocess.size == (28, 28)
    torch.save({**long.state_dict(), "other": torch.zeros(1)}, tmp_path / "longclip-L.pt")
    with pytest.raises(ValueError, match="unknown: other"):
        load_encoder(tmp_path)


def test_pieces_of_fused_tensors_go_to_their_shards(long, tmp_path):
    torch.save(long.state_dict(), tmp_path / "longclip-L.pt")
    mesh = jax.make_mesh((2,), ("tensor",))
    split, whole = NamedSharding(mesh, P(None, None, "tensor")), NamedSharding(mesh, P())

    def placement(tree):
        return trees.map_with_name(lambda name, _: split if re.search("attention/.*kernel", name) else whole, tree)

    _, placed = weights.load_clip(tmp_path, placement=placement)
    assert placed["text"]["layers"]["attention"]["key"]["kernel"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, placed, weights.load_clip(tmp_path)[1])


class Payload:
    """What a malicious file holds: unpickling it makes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(long, tmp_path, zipped):
    state = long.state_dict() | {"visual.proj": Payload(tmp_path / "made")}
    torch.save(state, tmp_path / "longclip-L.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="longclip-L.pt holds code .*not run; save the model's state_dict") as error:
        weights.load_clip(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


def test_files_that_are_no_states_are_refused_in_one_line(long, tmp_path):
    whole, file = tmp_path / "whole.pt", tmp_path / "longclip-L.pt"
    for content, message in (
        ({"epoch": 3, **long.state_dict()}, "'epoch', which is not a tensor"),
        ([torch.zeros(2)], "holds a list"),
        ({"a.weight": torch.zeros(2)}, "tensors such as a.weight, not a CLIP state"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            weights.load_clip(file)
    with pytest.raises(
        FileNotFoundError, match="config.json not found, and tensors such as a.weight are not Long-CLIP's"
    ):
        weights.load_clip(tmp_path)
    torch.jit.script(nn.Linear(2, 2)).save(str(file))
    with pytest.raises(ValueError, match="TorchScript program, which is not run"):
        weights.load_clip(tmp_path)
    torch.save(long.state_dict(), whole)
    file.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="longclip-L.pt is not a complete PyTorch file"):
        weights.load_clip(file)
    with pytest.raises(ValueError, match="longclip-L.pt and whole.pt; give the path"):
        weights.load_clip(tmp_path)


def test_a_state_with_a_wrong_tensor_names_it(long, tmp_path):
    state, file, fused = (
        long.state_dict(),
        tmp_path / "longclip-L.pt",
        "visual.transformer.resblocks.1.attn.in_proj_weight",
    )

    def refuse(changed, message):
        torch.save(changed, file)
        with pytest.raises(ValueError, match=message):
            weights.load_clip(file)

    refuse({name: tensor for name, tensor in state.items() if name != "ln_final.bias"}, "missing: ln_final.bias")
    refuse({name: tensor for name, tensor in state.items() if name != "text_projection"}, "text_projection is missing")
    refuse(
        {name: tensor for name, tensor in state.items() if name != fused},
        r"missing: .*resblocks.1.attn.in_proj_weight\[key\]",
    )
    refuse(state | {"visual.other": torch.zeros(1)}, "unknown: visual.other")
    refuse(state | {"visual.proj": torch.full((128, 20), torch.nan)}, "longclip-L.pt: visual.proj holds NaN")
    refuse(state | {fused: torch.zeros(385, 128)}, r"in_proj_weight\[query\] in .* is \[385, 128\]")


def test_without_pytorch_the_remedy_is_said(long, tmp_path, monkeypatch):
    torch.save(long.state_dict(), tmp_path / "longclip-L.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pip install torch"):
        weights.load_clip(tmp_path)


def test_torch_file_says_names_shapes_and_precisions(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16).t(), "c": torch.tensor(2)}
    torch.save(tensors, tmp_path / "some.bin")
    file = TorchFile(tmp_path / "some.bin")
    assert file.names() == {"a", "b", "c"} and file.shape("a") == (2, 3)
    assert [file.dtype(name) for name in "abc"] == ["F32", "BF16", "I64"]
    np.testing.assert_array_equal(file.read("a"), tensors["a"].numpy())
    assert file.read("b").dtype.name == "bfloat16" and file.read("c").shape == ()
    with pytest.raises(FileNotFoundError, match="other.pt does not exist"):
        TorchFile(tmp_path / "other.pt")
