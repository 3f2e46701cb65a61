"""Low-rank adapters of the transformer against peft."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from programs import jit_as_users_do
from sd3_pieces import torch_transformer, torch_velocity, velocity

from uae_jax import trees
from uae_jax.hf.adapters import adapter_rules
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.models.sd3 import transformer as sd3
from uae_jax.models.sd3.weights import load_adapter, load_transformer, transformer_rules
from uae_jax.nn.lora import init_lora, merge_adapter

SIZES = dict(pos_embed_max_size=6, dual_attention_layers=(0, 1), qk_norm="rms_norm")
TARGETS = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Velocity of a peft-wrapped model, and base and adapter through our loaders."""
    root = tmp_path_factory.mktemp("adapted")
    model = torch_transformer(**SIZES)
    model.save_pretrained(root / "base")
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False))
    wrapped.save_pretrained(root / "adapter")
    config, params = load_transformer(root / "base")
    config, adapter = load_adapter(root / "adapter", config)
    return root, torch_velocity(wrapped.eval()), config, params, adapter


def test_adapted_velocity_equals_peft(adapted):
    _, theirs, config, params, adapter = adapted
    assert config.lora_alpha == 5
    scale = np.max(np.abs(theirs))
    assert np.max(np.abs(velocity(config, params, adapter) - theirs)) <= 1e-4 * scale
    assert np.max(np.abs(velocity(config, merge_adapter(params, adapter, config.lora_alpha)) - theirs)) <= 1e-4 * scale
    assert np.max(np.abs(velocity(config, params) - theirs)) > 1e-2 * scale


def test_export_writes_the_published_adapter(adapted, tmp_path):
    root, theirs, config, _, adapter = adapted
    written = dict(published_tensors(adapter, adapter_rules(transformer_rules(config), adapter)))
    stored = TensorFolder(root / "adapter")
    assert set(written) == stored.names()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, stored.read(name))
    write_tensors(tmp_path, written, stem="adapter_model")
    (tmp_path / "adapter_config.json").write_text((root / "adapter" / "adapter_config.json").read_text())
    again = PeftModel.from_pretrained(torch_transformer(**SIZES), tmp_path).eval()
    np.testing.assert_allclose(torch_velocity(again), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("base_model.model.", "transformer."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_other_published_names_are_read(adapted, tmp_path, rename):
    root, _, config, _, adapter = adapted
    write_tensors(
        tmp_path,
        {
            rename(name): tensor
            for name, tensor in published_tensors(adapter, adapter_rules(transformer_rules(config), adapter))
        },
    )
    (tmp_path / "adapter_config.json").write_text((root / "adapter" / "adapter_config.json").read_text())
    _, again = load_adapter(tmp_path, config)
    for name, leaf in trees.flatten(adapter).items():
        np.testing.assert_array_equal(leaf, trees.flatten(again)[name])


def test_adapters_other_than_plain_lora_are_refused(adapted, tmp_path):
    root, _, config, _, adapter = adapted
    stored = json.loads((root / "adapter" / "adapter_config.json").read_text())
    write_tensors(tmp_path, published_tensors(adapter, adapter_rules(transformer_rules(config), adapter)))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_adapter(tmp_path, config)


def test_new_adapter_equals_the_base_bit_for_bit_and_can_learn(adapted):
    _, _, config, params, adapter = adapted
    fresh = init_lora(jax.random.key(0), params, sd3.ATTENTION_ADAPTER, rank=3)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapter)
    exact = jit_as_users_do(velocity.__wrapped__, static_argnums=0)
    np.testing.assert_array_equal(exact(config, params, fresh), exact(config, params))

    def energy(adapter):
        return jnp.sum(jnp.square(velocity(config, params, adapter)))

    # the last block's context is not updated, so its queries reach nothing
    idle = "last_block/attention/context_query/"
    for name, leaf in trees.flatten(jax.grad(energy)(fresh)).items():
        assert np.any(leaf) == (name.endswith("/b") and not name.startswith(idle)), name


def test_pattern_takes_the_modules_of_the_release(adapted):
    *_, params, _ = adapted
    modules = {name.removesuffix("/kernel") for name in trees.flatten(params) if name.endswith("/kernel")}
    taken = {module for module in modules if re.fullmatch(sd3.ATTENTION_ADAPTER, module)}
    # one scanned group with eight modules, and the last block without an output for the context
    assert len(taken) == 8 + 7 and not any("image_attention" in module for module in taken)
