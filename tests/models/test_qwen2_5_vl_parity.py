"""Qwen2.5-VL against transformers: a random model is saved there, read through our loader, and compared part by
part.
"""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index
from wrapped_layout import wrapped_tensors

from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.language import model as lm
from uae_jax.models.language import weights as lm_weights
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.qwen2_5_vl import config as configs
from uae_jax.models.qwen2_5_vl import model, weights

IMAGE, START, END, VIDEO, PAD = 290, 286, 287, 291, 283
GRIDS = ((1, 8, 6), (1, 4, 10))  # neither side is a whole number of windows in both


def build(tied: bool = True) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    llm = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=300,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=96,
                max_position_embeddings=4096,
                bos_token_id=PAD,
                eos_token_id=285,
                pad_token_id=PAD,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
                tie_word_embeddings=tied,
            ),
            vision_config=dict(
                depth=4,
                hidden_size=32,
                num_heads=2,
                intermediate_size=48,
                out_hidden_size=64,
                fullatt_block_indexes=[1, 3],
                window_size=16,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
            ),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=tied,
        )
    )
    llm.projector = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))
    with torch.no_grad():  # default initialisers leave biases and norms at 0 and 1, where a wrong name could hide
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for parameter in llm.model.language_model.layers.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return llm.float().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    llm, folder = build(), tmp_path_factory.mktemp("qwen") / "llm"
    llm.save_pretrained(folder)
    config, params = weights.load(folder)
    return llm, folder, config, params


def relative(ours, theirs) -> float:
    theirs = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def pixels(grid, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(grid[1] * grid[2], 3 * 2 * 4 * 4, generator=generator)


def layout(grids, length: int) -> dict[str, np.ndarray]:
    """One row's positions, windows and images, computed with transformers' own functions."""
    grid = torch.tensor(grids)
    count = int(grid.prod(1).sum())
    index, borders = get_vision_window_index(grid, 2, 16, 4)
    windows = np.empty(count // 4, np.int32)
    windows[index.numpy()] = np.searchsorted(borders.numpy()[1:], np.arange(count // 4) * 4, side="right")
    pad = length - count
    return {
        "patch_positions": np.pad(get_vision_position_ids(grid, 2).numpy().astype(np.int32), ((0, pad), (0, 0))),
        "patch_windows": np.pad(np.repeat(windows, 4), (0, pad), constant_values=-1),
        "patch_images": np.pad(
            np.repeat(np.arange(len(grids), dtype=np.int32), grid.prod(1).numpy()), (0, pad), constant_values=-1
        ),
    }


def prompt_ids(grids, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(0, 280, (4 + seed,), generator=generator)]
    for _, rows, columns in grids:
        parts += [
            torch.tensor([START] + [IMAGE] * (rows * columns // 4) + [END]),
            torch.randint(0, 280, (2 + seed,), generator=generator),
        ]
    return torch.cat(parts)[None]


def row(llm, grids, seeds, prompt_seed: int, patches: int, tokens: int):
    """One row of the batch, and what transformers needs for the same prompt."""
    values = torch.cat([pixels(grid, seed) for grid, seed in zip(grids, seeds)])
    ids = prompt_ids(grids, prompt_seed)
    theirs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=values,
        image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=(ids == IMAGE).int(),
    )
    positions, _ = llm.model.get_rope_index(ids, theirs["mm_token_type_ids"], theirs["image_grid_thw"])
    positions = positions[:, 0].T.numpy().astype(np.int32)
    pad = tokens - ids.shape[1]
    ours = dict(
        layout(grids, patches),
        patches=np.pad(values.numpy(), ((0, patches - len(values)), (0, 0))),
        prompt_ids=np.pad(ids[0].numpy(), (0, pad), constant_values=IMAGE),  # a mask, not the value, says what counts
        prompt_mask=np.arange(tokens) < ids.shape[1],
        prompt_positions=np.pad(positions, ((0, pad), (0, 0))),
        prompt_next=np.int32(positions.max() + 1),
    )
    return ours, theirs


@pytest.fixture(scope="module")
def batch(saved):
    """Two images of different size as two rows, and both images in a third row; all padded."""
    llm = saved[0]
    rows = [
        row(llm, GRIDS[:1], [1], 1, 96, 48),
        row(llm, GRIDS[1:], [2], 2, 96, 48),
        row(llm, GRIDS, [1, 2], 3, 96, 48),
    ]
    ours = {name: jnp.asarray(np.stack([r[0][name] for r in rows])) for name in rows[0][0]}
    return ours, [theirs for _, theirs in rows]


def test_image_embeddings_equal_transformers(saved, batch):
    llm, _, config, params = saved
    ours, theirs = batch
    embeds = model.encode_images(
        config, params, ours["patches"], ours["patch_positions"], ours["patch_windows"], ours["patch_images"]
    )
    for index, example in enumerate(theirs):
        with torch.no_grad():
            expected = llm.model.visual(example["pixel_values"], example["image_grid_thw"]).pooler_output
        assert relative(embeds[index, : len(expected)], expected) < 1e-4


def test_hidden_states_and_logits_equal_transformers(saved, batch):
    llm, _, config, params = saved
    ours, theirs = batch
    embeds = model.encode_images(
        config, params, ours["patches"], ours["patch_positions"], ours["patch_windows"], ours["patch_images"]
    )
    embeds = lm.embed_prompt(config, params, ours["prompt_ids"], ours["prompt_mask"], embeds)
    hidden = lm.hidden_states(config, params, None, embeds, ours["prompt_positions"], ours["prompt_mask"])
    last = lm.logits(config, params, model.prompt_prefix(config, params, None, ours).last_hidden)
    for index, example in enumerate(theirs):
        with torch.no_grad():
            out = llm(**example, output_hidden_states=True)
        assert relative(hidden[index, : example["input_ids"].shape[1]], out.hidden_states[-1][0]) < 1e-4
        assert relative(last[index], out.logits[0, -1]) < 1e-4


def test_greedy_tokens_equal_transformers_exactly(saved, batch):
    llm, _, config, params = saved
    ours, theirs = batch

    @jax.jit
    def caption(params, ours):
        return generate(
            config,
            params,
            None,
            model.prompt_prefix(config, params, None, ours),
            jax.random.split(jax.random.key(0), 3),
            max_new_tokens=12,
            stop_ids=(),
            sampling=SamplingConfig(temperature=0.0),
        )

    completion = caption(params, ours)
    assert completion.mask.all() and not completion.finished.any()
    for index, example in enumerate(theirs):
        with torch.no_grad():
            expected = llm.generate(**example, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected = expected[0, example["input_ids"].shape[1] :].tolist()
        assert len(set(expected)) > 3  # a caption that varies, so that equality says something
        assert completion.tokens[index].tolist() == expected


def test_text_hidden_states_and_projector_equal_transformers(saved):
    llm, _, config, params = saved
    ids = torch.randint(0, 280, (2, 17), generator=torch.Generator().manual_seed(5))
    lengths = (17, 9)
    mask = jnp.arange(17)[None] < jnp.asarray(lengths)[:, None]
    hidden = lm.text_hidden_states(config, params, None, jnp.asarray(ids.numpy()), mask)
    context = model.project(params["projector"], hidden)
    for index, length in enumerate(lengths):
        with torch.no_grad():
            alone = ids[index : index + 1, :length]
            expected = llm(
                input_ids=alone, attention_mask=torch.ones_like(alone), output_hidden_states=True
            ).hidden_states[-1]
            assert relative(hidden[index, :length], expected[0]) < 1e-4
            assert relative(context[index, :length], llm.projector(expected)[0]) < 1e-4


def test_an_untied_head_is_read(tmp_path):
    llm = build(tied=False)
    llm.save_pretrained(tmp_path)
    config, params = weights.load(tmp_path)
    ids = torch.arange(5, 14)[None]
    hidden = lm.text_hidden_states(config, params, None, jnp.asarray(ids.numpy()), jnp.ones((1, 9), bool))
    with torch.no_grad():
        expected = llm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not config.text.tied
    assert relative(lm.logits(config, params, hidden), expected) < 1e-4


def test_both_generations_of_names_and_a_tied_copy_give_the_same_parameters(saved, tmp_path):
    _, folder, config, params = saved
    stored = TensorFolder(folder)
    old = {name: stored.read(name) for name in stored.names()}
    assert dict(weights.tensors(config, params)).keys() == old.keys()  # what transformers writes, we write
    renamed = {
        name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.")
        else f"model.{name}"
        if name.startswith("visual.")
        else name: value
        for name, value in old.items()
    }
    renamed["lm_head.weight"] = old["model.embed_tokens.weight"]
    assert any(name.startswith("model.visual.") for name in renamed)
    write_tensors(tmp_path, renamed, max_shard_bytes=100_000)
    _, again = weights.load(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_written_weights_are_those_read(saved):
    _, folder, config, params = saved
    stored = TensorFolder(folder)
    for name, tensor in weights.tensors(config, params):
        np.testing.assert_array_equal(tensor, stored.read(name))


def test_a_missing_and_an_unknown_tensor_are_named(saved, tmp_path):
    _, folder, config, _ = saved
    stored = TensorFolder(folder)
    tensors = {name: stored.read(name) for name in stored.names()}
    tensors["model.surprise.weight"] = tensors.pop("model.norm.weight")
    write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match="missing: model.norm.weight; unknown: model.surprise.weight"):
        weights.load(tmp_path, config)


def test_the_wrapped_release_layout_and_a_peft_folder_give_the_adapter(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    llm, folder, config, params = copy.deepcopy(saved[0]), *saved[1:]
    torch.manual_seed(3)
    wrapped = get_peft_model(
        llm.model.language_model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    state = {f"model.{name}": value for name, value in wrapped.state_dict().items()}
    state |= {f"visual.{name}": value for name, value in llm.model.visual.state_dict().items()}
    state |= {f"projector.{name}": value for name, value in llm.projector.state_dict().items()}
    state["lm_head.weight"] = llm.lm_head.weight.detach()
    (tmp_path / "llm_lora").mkdir()
    save_file(
        {name: value.clone().contiguous() for name, value in state.items()}, tmp_path / "llm_lora/model.safetensors"
    )
    wrapped.save_pretrained(tmp_path / "peft")
    scaled, adapter = weights.load_adapter(tmp_path / "peft", config)
    assert scaled.text.lora_alpha == 8
    _, base = weights.load(tmp_path / "llm_lora", scaled)
    jax.tree.map(np.testing.assert_array_equal, params, base)
    with pytest.warns(UserWarning, match="lora_alpha; 8 is used, twice the rank"):
        again = weights.load_adapter(tmp_path / "llm_lora", config)
    assert again[0] == scaled
    jax.tree.map(np.testing.assert_array_equal, adapter, again[1])
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    hidden = lm.text_hidden_states(scaled, params, adapter, jnp.asarray(ids.numpy()), jnp.ones((1, 9), bool))
    assert relative(hidden, expected) < 1e-4
    written = dict(wrapped_tensors(scaled, base, adapter))
    assert written.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(written[name], value.numpy())
    peft_names = TensorFolder(tmp_path / "peft").names()
    assert {name for name, _ in lm_weights.adapter_tensors(scaled, adapter)} == peft_names
    with pytest.raises(ValueError, match="no adapter"):
        weights.load_adapter(folder, config)


def test_config_is_read_in_both_generations_and_written_for_transformers(saved, tmp_path):
    _, folder, config, _ = saved
    assert "text_config" in json.loads((folder / "config.json").read_text())
    flat = configs.to_json(config)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert configs.from_folder(tmp_path) == dataclasses.replace(config, stop_token_ids=(config.stop_token_ids[0],))
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    assert theirs.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert theirs.text_config.hidden_size == 64 and theirs.vision_config.patch_size == 4


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (None, "use_sliding_window", True),
        (None, "hidden_act", "gelu"),
        (None, "rope_scaling", {"type": "yarn"}),
        ("vision_config", "hidden_act", "quick_gelu"),
        (None, "model_type", "qwen3_vl"),
        (None, "hidden_size", None),
    ],
)
def test_unsupported_settings_are_named(saved, tmp_path, part, field, value):
    data = configs.to_json(saved[2])
    (data if part is None else data[part])[field] = value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="rope_type" if field == "rope_scaling" else field):
        configs.from_folder(tmp_path)
