"""The transformer's adapters in the files of diffusers and peft, for any of its linear maps."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from sd3_pieces import torch_transformer, torch_velocity, velocity

from uae_jax import trees
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.sd3 import weights
from uae_jax.nn.lora import merge_adapter

SIZES = {
    "like_medium": dict(pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm"),
    "like_large": dict(pos_embed_max_size=6, dual_attention_layers=(), qk_norm="rms_norm"),
    "like_sd3_medium": dict(pos_embed_max_size=6, dual_attention_layers=(), qk_norm=None),
}
ATTENTION = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]
# diffusers' own training scripts name modules without `attn.`, so that the second attention is adapted too
BOTH_ATTENTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *BOTH_ATTENTIONS,
    *ATTENTION[4:],
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm1_context.linear",
    "context_embedder",
    "norm_out.linear",
    "proj_out",
    "linear_1",
    "linear_2",
]


def difference(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Function from a size to its config and parameters."""

    @functools.cache
    def read(size):
        folder = tmp_path_factory.mktemp(size)
        torch_transformer(**SIZES[size]).save_pretrained(folder)
        return weights.load_transformer(folder)

    return read


def with_adapter(size: str, **settings) -> SD3Transformer2DModel:
    """A model of diffusers with an adapter that its own `add_adapter` made."""
    model = torch_transformer(**SIZES[size])
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(**(dict(r=3, lora_alpha=5, init_lora_weights=False) | settings)))
    return model.eval()


@pytest.mark.parametrize(
    ("size", "targets"),
    [
        ("like_medium", BOTH_ATTENTIONS),
        ("like_medium", EVERYTHING),
        ("like_large", ATTENTION),
        ("like_sd3_medium", ["ff.net.2"]),
    ],
)
def test_the_adapter_that_diffusers_saves_gives_its_velocity(base, tmp_path, size, targets):
    model = with_adapter(size, target_modules=targets)
    model.save_lora_adapter(tmp_path)
    config, params = base(size)
    adapted, adapter = weights.load_adapter(tmp_path, config)
    expected = torch_velocity(model)
    assert adapted.lora_alpha == 5
    assert difference(velocity(config, params), expected) > 1e-3
    assert difference(velocity(adapted, params, adapter), expected) < 1e-4
    assert ("image_attention" in str(jax.tree.structure(adapter))) == (size == "like_medium" and "to_q" in targets)
    merged = merge_adapter(params, adapter, 5.0)
    assert difference(velocity(config, merged), velocity(adapted, params, adapter)) < 1e-5
    model.fuse_lora(safe_fusing=True)
    model.unload_lora()
    for name, tensor in weights.published_tensors(merged, weights.transformer_rules(config)):
        np.testing.assert_allclose(tensor, model.state_dict()[name].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("said", ["header", "tensors", "nothing"])
def test_the_file_that_diffusers_pipelines_save(base, tmp_path, said):
    """The scale stands in the header today, in `alpha` tensors in files of other trainers, and nowhere in older
    files.
    """
    model = with_adapter("like_medium", target_modules=BOTH_ATTENTIONS)
    layers = get_peft_model_state_dict(model)
    if said == "tensors":
        layers |= {
            name.replace("lora_A.weight", "alpha"): torch.tensor(5.0) for name in list(layers) if "lora_A" in name
        }
    metadata = (
        dict(transformer_lora_adapter_metadata=model.peft_config["default"].to_dict()) if said == "header" else {}
    )
    SD3LoraLoaderMixin.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert all(name.startswith("transformer.transformer_blocks.") for name in TensorFolder(file).names())
    config, params = base("like_medium")
    if said == "nothing":
        with pytest.warns(UserWarning, match="lora_alpha; 3 is used, the rank, as diffusers does"):
            adapted, _ = weights.load_adapter(tmp_path, config)
        again = torch_transformer(**SIZES["like_medium"])
        again.load_lora_adapter(load_file(file), prefix="transformer")
        scales = {module.scaling["default_0"] for module in again.modules() if hasattr(module, "scaling")}
        assert scales == {1.0} and adapted.lora_alpha == 3
        return
    for path in (tmp_path, file):
        adapted, adapter = weights.load_adapter(path, config)
        assert adapted.lora_alpha == 5
        assert difference(velocity(adapted, params, adapter), torch_velocity(model)) < 1e-4


def test_blocks_without_an_adapter_are_as_the_base(base, tmp_path):
    """The training scripts of diffusers can adapt some blocks only."""
    targets = [f"transformer_blocks.{block}.attn.{name}" for block in (1, 2) for name in ("to_q", "add_k_proj")]
    model = with_adapter("like_large", target_modules=targets)
    SD3LoraLoaderMixin.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    config, params = base("like_large")
    adapted, adapter = weights.load_adapter(tmp_path, config)
    assert difference(velocity(adapted, params, adapter), torch_velocity(model)) < 1e-4
    query = adapter["blocks_0"]["attention"]["query"]
    assert np.any(query["a"][1]) and not np.any(query["a"][0]) and not np.any(query["b"][0])


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [
        (ATTENTION, {}),
        (BOTH_ATTENTIONS, {}),
        (EVERYTHING, {"ff.net.2": 2}),
        (["transformer_blocks.2.attn.to_q"], {}),
        (ATTENTION, {"transformer_blocks.2.attn.to_k": 1}),
    ],
    ids=["attn", "both", "all", "one", "ranks"],
)
def test_what_was_read_is_written_for_peft(base, tmp_path, targets, ranks):
    wrapped = get_peft_model(
        torch_transformer(**SIZES["like_medium"]),
        LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, rank_pattern=ranks),
    )
    wrapped.save_pretrained(tmp_path / "theirs")
    config, _ = base("like_medium")
    adapted, adapter = weights.load_adapter(tmp_path / "theirs", config)
    write_tensors(tmp_path / "ours", weights.adapter_tensors(adapted, adapter), stem="adapter_model")
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(weights.adapter_config(adapted, adapter)))
    stored, written = TensorFolder(tmp_path / "theirs"), TensorFolder(tmp_path / "ours")
    assert stored.names() == written.names()
    for name in stored.names():
        np.testing.assert_array_equal(stored.read(name), written.read(name))
    again = PeftModel.from_pretrained(torch_transformer(**SIZES["like_medium"]), tmp_path / "ours").eval()
    assert difference(torch_velocity(again), torch_velocity(wrapped.eval())) < 1e-6


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("lora_", "hada_"), "holds no adapter tensor"),
        (
            lambda name: name.replace("transformer.", "text_encoder.", 1),
            "unknown: text_encoder.transformer_blocks.0.attn.add_k_proj.lora_A",
        ),
        (
            lambda name: name.replace("attn.to_q", "attn.to_qkv"),
            "unknown: transformer.transformer_blocks.0.attn.to_qkv.lora_A",
        ),
    ],
)
def test_an_adapter_of_something_else_is_refused(base, tmp_path, rename, message):
    layers = get_peft_model_state_dict(with_adapter("like_large", target_modules=ATTENTION))
    write_tensors(
        tmp_path,
        {rename(f"transformer.{name}"): value.numpy() for name, value in layers.items()},
        stem="pytorch_lora_weights",
    )
    with pytest.raises(ValueError, match=message):
        weights.load_adapter(tmp_path, base("like_large")[0])


def test_scales_that_differ_between_modules_are_refused(base, tmp_path):
    layers = get_peft_model_state_dict(with_adapter("like_large", target_modules=ATTENTION))
    alphas = {
        name.replace("lora_A.weight", "alpha"): np.float32(number)
        for number, name in enumerate(sorted(layers), 1)
        if "lora_A" in name
    }
    tensors = {f"transformer.{name}": np.asarray(value) for name, value in (layers | alphas).items()}
    write_tensors(tmp_path, tensors, stem="pytorch_lora_weights")
    with pytest.raises(ValueError, match="different alpha tensors"):
        weights.load_adapter(tmp_path, base("like_large")[0])


def test_merging_keeps_the_stored_precision(base, tmp_path):
    config, params = base("like_large")
    with_adapter("like_large", target_modules=ATTENTION).save_lora_adapter(tmp_path)
    _, adapter = weights.load_adapter(tmp_path, config)
    for dtype in (np.float16, jax.numpy.bfloat16):
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        on_host, on_device = (
            merge_adapter(low, adapter, 5.0),
            merge_adapter(jax.tree.map(jax.numpy.asarray, low), adapter, 5.0),
        )
        exact = trees.flatten(merge_adapter(jax.tree.map(lambda leaf: leaf.astype(np.float32), low), adapter, 5.0))
        for name, leaf in trees.flatten(on_host).items():
            assert leaf.dtype == dtype and isinstance(leaf, np.ndarray)
            np.testing.assert_array_equal(leaf, exact[name].astype(dtype))
        for name, leaf in trees.flatten(on_device).items():
            assert leaf.dtype == dtype and isinstance(leaf, jax.Array)
            np.testing.assert_allclose(np.float32(leaf), exact[name], rtol=1e-2, atol=1e-3)
