"""The captioner's weights and adapters under every name that transformers and peft give them."""

import copy
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from uae_jax import trees
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.language import model as lm
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.qwen2_5_vl import weights
from uae_jax.nn.lora import merge_adapter

IDS = torch.arange(5, 16)[None]
TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_TEXT = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build(tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    llm = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=120,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                max_position_embeddings=128,
                bos_token_id=100,
                eos_token_id=101,
                pad_token_id=100,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]),
            ),
            vision_config=dict(
                depth=2,
                hidden_size=32,
                num_heads=2,
                intermediate_size=40,
                out_hidden_size=32,
                window_size=16,
                patch_size=4,
                fullatt_block_indexes=[1],
            ),
            image_token_id=110,
            video_token_id=111,
            vision_start_token_id=112,
            vision_end_token_id=113,
            tie_word_embeddings=tied,
        )
    )
    llm.projector = torch.nn.Sequential(torch.nn.Linear(32, 20), torch.nn.GELU(), torch.nn.Linear(20, 12))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llm.float().eval()


def save(tied: bool, folder: pathlib.Path) -> tuple:
    llm = build(tied)
    llm.save_pretrained(folder)
    return llm, folder, *weights.load(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(True, tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save(False, tmp_path_factory.mktemp("untied"))


@pytest.fixture
def llm(saved):
    return copy.deepcopy(saved[0])


def in_memory(name: str) -> str:
    """The name that transformers 4.52 and newer have in memory."""
    name = f"model.{name}" if name.startswith("visual.") else name
    return (
        name.replace("model.", "model.language_model.", 1)
        if name.startswith(("model.layers", "model.embed", "model.norm"))
        else name
    )


def release(name: str) -> str:
    """peft around the text model of 4.50, as in the release's `llm_lora`."""
    name = f"model.base_model.{name}" if name.startswith("model.") else name
    stem, _, last = name.rpartition(".")
    return f"{stem}.base_layer.{last}" if "_proj" in name and "visual" not in name else name


NAMES = {
    "published": lambda name: name,
    "in_memory": in_memory,
    "release": release,
    "wrapped_text_model_of_today": lambda name: in_memory(name).replace(
        "language_model.", "language_model.base_model.model."
    ),
    "wrapped_whole": lambda name: f"base_model.model.{name}",
    "wrapped_whole_of_today": lambda name: f"base_model.model.{in_memory(name)}",
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head", ["saved", "untied"])
def test_every_name_and_precision_gives_one_tree(request, tmp_path, names, dtype, head):
    _, folder, config, params = request.getfixturevalue(head)
    stored = TensorFolder(folder)
    tensors = {name: stored.read(name).astype(dtype) for name in stored.names()}
    if names != "published":  # peft's state and torch's keep the tied head, the files of transformers do not
        tensors["lm_head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    write_tensors(tmp_path, {NAMES[names](name): value for name, value in tensors.items()}, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _, found = weights.load(tmp_path, config)
    jax.tree.map(lambda ours, base: np.testing.assert_array_equal(ours, base.astype(dtype)), found, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
    _, cast = weights.load(tmp_path, config, np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(np.float32)}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, adapter=None):
    ids = jnp.asarray(IDS.numpy())
    return lm.logits(config, params, lm.text_hidden_states(config, params, adapter, ids, jnp.ones(ids.shape, bool)))


def torch_logits(llm) -> np.ndarray:
    with torch.no_grad():
        return llm(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.numpy()


def difference(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def settings(**values) -> LoraConfig:
    return LoraConfig(**(dict(r=3, lora_alpha=5, init_lora_weights=False) | values))


def wrap(llm, part: str, config: LoraConfig):
    """peft around the whole, the model without its head, or the text model; returns the wrapped part."""
    torch.manual_seed(1)
    if part == "whole":
        return get_peft_model(llm, config)
    owner, name = (llm, "model") if part == "model" else (llm.model, "language_model")
    setattr(owner, name, get_peft_model(getattr(owner, name), config))
    return getattr(owner, name)


@pytest.mark.parametrize(
    ("part", "targets"),
    [
        ("text", "all-linear"),
        ("text", TEXT_MODULES),
        ("text", ["q_proj", "v_proj"]),
        ("text", ["down_proj"]),
        ("model", IN_TEXT),
        ("whole", IN_TEXT),
        ("whole", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_peft_folders_equal_peft(saved, llm, tmp_path, part, targets):
    _, _, config, params = saved
    wrapped = wrap(llm, part, settings(target_modules=targets)).eval()
    wrapped.save_pretrained(tmp_path)
    adapted, adapter = weights.load_adapter(tmp_path, config)
    expected = torch_logits(wrapped if part == "whole" else llm)
    assert adapted.text.lora_alpha == 5
    assert difference(logits(config, params), expected) > 1e-2
    assert difference(logits(adapted, params, adapter), expected) < 1e-4
    merged = {**params, "language": merge_adapter(params["language"], adapter, 5.0)}
    assert difference(logits(config, merged), logits(adapted, params, adapter)) < 1e-5
    wrapped.merge_and_unload()
    theirs = {name.replace("base_model.model.", ""): value.numpy() for name, value in llm.state_dict().items()}
    for name, value in weights.tensors(config, merged):
        np.testing.assert_allclose(value, theirs[in_memory(name)], rtol=0, atol=1e-6)


def test_what_was_read_is_written_for_peft(saved, llm, tmp_path):
    _, _, config, _ = saved
    wrapped = wrap(llm, "text", settings(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}))
    wrapped.save_pretrained(tmp_path / "theirs")
    adapted, adapter = weights.load_adapter(tmp_path / "theirs", config)
    write_tensors(tmp_path / "ours", lm_weights.adapter_tensors(adapted, adapter), stem="adapter_model")
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(lm_weights.adapter_config(adapted, adapter)))
    again = build(True)
    again.model.language_model = PeftModel.from_pretrained(again.model.language_model, tmp_path / "ours").eval()
    assert difference(torch_logits(again), torch_logits(llm)) < 1e-6


@pytest.mark.parametrize(
    ("prefix", "middle"),
    [
        ("base_model.model.", ""),
        ("base_model.model.model.", ""),
        ("base_model.model.language_model.", ""),
        ("base_model.model.model.language_model.", ""),
        ("model.base_model.model.", ".default"),
        ("model.language_model.base_model.model.", ".policy"),
    ],
)
def test_every_prefix_gives_one_adapter(saved, llm, tmp_path, prefix, middle):
    _, _, config, _ = saved
    wrap(llm, "text", settings(target_modules="all-linear")).save_pretrained(tmp_path / "peft")
    _, expected = weights.load_adapter(tmp_path / "peft", config)
    stored = TensorFolder(tmp_path / "peft")
    tensors = {name: stored.read(name) for name in stored.names()}
    for file in (tmp_path / "peft").glob("*.safetensors"):
        file.unlink()
    write_tensors(
        tmp_path / "peft",
        {
            name.replace("base_model.model.", prefix).replace(".weight", f"{middle}.weight"): value
            for name, value in tensors.items()
        },
    )
    _, found = weights.load_adapter(tmp_path / "peft", config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_scale_of_rank_stabilised_adapters(saved, llm, tmp_path):
    _, _, config, params = saved
    wrap(llm, "text", settings(target_modules="all-linear", use_rslora=True)).save_pretrained(tmp_path)
    adapted, adapter = weights.load_adapter(tmp_path, config)
    assert difference(logits(adapted, params, adapter), torch_logits(llm)) < 1e-4


def test_an_adapter_of_the_image_encoder_can_only_be_merged(saved, llm, tmp_path):
    _, _, config, params = saved
    wrapped = wrap(llm, "model", settings(target_modules=["q_proj", "gate_proj", "qkv"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge_adapters=True"):
        weights.load_adapter(tmp_path, config)
    adapter = weights.read_adapters(tmp_path, config)
    assert set(adapter.tree) == {"language", "vision"} and adapter.tensors == 2 * 2 * 4
    merged = params | {name: merge_adapter(params[name], tree, adapter.alpha) for name, tree in adapter.tree.items()}
    theirs = {f"model.{name}": value.numpy() for name, value in wrapped.merge_and_unload().state_dict().items()}
    for name, value in weights.tensors(config, {part: merged[part] for part in ("language", "vision")}):
        if not name.startswith("lm_head"):
            np.testing.assert_allclose(value, theirs[in_memory(name)], rtol=0, atol=1e-6)


def test_layers_that_are_left_out_have_zero_factors(saved, llm, tmp_path):
    _, _, config, params = saved
    wrap(llm, "whole", settings(target_modules=["q_proj"], layers_to_transform=[1])).save_pretrained(tmp_path)
    adapted, adapter = weights.load_adapter(tmp_path, config)
    assert not np.any(adapter["layers"]["attention"]["query"]["a"][0])
    assert difference(logits(adapted, params, adapter), torch_logits(llm)) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(alpha_pattern={"q_proj": 7}), "alpha_pattern"),
        (dict(bias="all"), "bias='all'"),
        (dict(peft_type="LOHA"), "peft_type='LOHA'"),
        (dict(modules_to_save=["embed_tokens"]), "modules_to_save"),
        (
            dict(target_modules=["q_proj", "k_proj"]),
            r"target_modules names; missing: model.layers.0.self_attn.k_proj, ",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(saved, llm, tmp_path, change, message):
    _, _, config, _ = saved
    wrap(llm, "text", settings(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        weights.load_adapter(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {name: value for name, value in tensors.items() if "lora_" not in name},
            "holds no adapter tensor",
        ),
        (
            lambda tensors: {name.replace("layers.1", "layers.7"): value for name, value in tensors.items()},
            "unknown: base_model.model.layers.7.self_attn.q_proj.lora_A.weight, ",
        ),
        (
            lambda tensors: {name: value for name, value in tensors.items() if "1.self_attn.q_proj.lora_B" not in name},
            "missing: base_model.model.layers.1.self_attn.q_proj.lora_B.weight. ",
        ),
        (
            lambda tensors: {name: value for name, value in tensors.items() if "layers.1" not in name},
            "missing: model.layers.1.self_attn.q_proj. ",
        ),
        (
            lambda tensors: (
                tensors | {"base_model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": np.ones(3)}
            ),
            "unknown: .*lora_magnitude_vector",
        ),
        (
            lambda tensors: {
                name: value[:2]
                if "0.self_attn.q_proj.lora_A" in name
                else value[:, :2]
                if "0.self_attn.q_proj.lora_B" in name
                else value
                for name, value in tensors.items()
            },
            r"different ranks in the layers of model.layers.\{\}.self_attn.q_proj.weight \[2, 3\]",
        ),
        (
            lambda tensors: {name: value[:, :9] if "lora_A" in name else value for name, value in tensors.items()},
            r"is \[3, 9\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, llm, tmp_path, change, message):
    _, _, config, _ = saved
    wrap(llm, "text", settings(target_modules=["q_proj"])).save_pretrained(tmp_path)
    stored = TensorFolder(tmp_path)
    tensors = {name: stored.read(name) for name in stored.names()} | {"base_model.model.norm.weight": np.ones(32)}
    save_numpy(
        {name: np.ascontiguousarray(value) for name, value in change(tensors).items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=message):
        weights.load_adapter(tmp_path, config)


def test_the_release_s_three_shards_give_captioner_projector_and_adapter(saved, llm, tmp_path):
    """The names as transformers 4.50 and peft 0.17 write them, by hand."""
    _, folder, config, params = saved
    wrap(llm, "text", settings(r=4, lora_alpha=8, target_modules="all-linear"))
    state = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.clone()
        for name, value in llm.state_dict().items()
    }
    assert "model.base_model.model.layers.1.self_attn.q_proj.base_layer.bias" in state
    assert "model.base_model.model.layers.1.mlp.up_proj.lora_A.default.weight" in state
    assert {"lm_head.weight", "projector.2.bias", "visual.blocks.0.attn.qkv.weight"} <= set(state)
    for shard in range(3):
        save_file(
            {name: state[name] for name in sorted(state)[shard::3]},
            tmp_path / f"model-{shard + 1:05d}-of-00003.safetensors",
        )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert weights.holds_base(tmp_path)
    _, base = weights.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    with pytest.warns(UserWarning, match="8 is used, twice the rank, as in the UAE release"):
        adapted, adapter = weights.load_adapter(tmp_path, config)
    assert difference(logits(adapted, base, adapter), torch_logits(llm)) < 1e-4
    assert trees.parameter_count(adapter) == sum(value.numel() for name, value in state.items() if ".lora_" in name)
