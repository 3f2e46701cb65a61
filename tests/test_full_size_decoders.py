"""Published sizes of the decoders with a text encoder of their own: each tensor has one published name."""

import json
import re

import diffusers
import jax
import pytest
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from test_full_size import check_both_ways, on_meta, shapes_of

from uae_jax import trees
from uae_jax.hf.adapters import adapter_rules, settings_of
from uae_jax.models.decoders import PUBLISHED
from uae_jax.models.flux2 import config as flux2
from uae_jax.models.flux2 import decoder as klein
from uae_jax.models.flux2 import transformer, vae, weights
from uae_jax.models.language import encoder
from uae_jax.models.qwen3 import config as qwen3
from uae_jax.models.qwen_image import config as q_config
from uae_jax.models.qwen_image import transformer as q_transformer
from uae_jax.models.qwen_image import vae as q_vae
from uae_jax.models.qwen_image import weights as q_weights
from uae_jax.models.z_image import config as z_config
from uae_jax.models.z_image import transformer as z_transformer
from uae_jax.models.z_image import weights as z_weights
from uae_jax.nn.lora import init_lora

RANK = 32
# black-forest-labs/FLUX.2-klein-4B: transformer, text_encoder and vae, config.json
KLEIN = dict(
    patch_size=1,
    in_channels=128,
    out_channels=None,
    num_layers=5,
    num_single_layers=20,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=7680,
    timestep_guidance_channels=256,
    mlp_ratio=3.0,
    axes_dims_rope=[32, 32, 32, 32],
    rope_theta=2000,
    eps=1e-6,
    guidance_embeds=False,
)
KLEIN_VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    latent_channels=32,
    batch_norm_eps=1e-4,
    patch_size=[2, 2],
)
QWEN3_4B = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1000000,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)


def written(folder, name: str, content: dict):
    (folder / "config.json").write_text(json.dumps({name: content.pop("kind"), **content}))
    return folder


@pytest.mark.trap(70)
def test_klein_4b_and_its_adapter(tmp_path):
    stored_config = KLEIN | {"kind": flux2.TransformerConfig.published_class}
    config = flux2.TransformerConfig.from_folder(written(tmp_path, "_class_name", stored_config))
    assert config == flux2.TransformerConfig()
    model = on_meta(lambda: diffusers.Flux2Transformer2DModel(**KLEIN))
    stored, abstract = shapes_of(model), transformer.abstract_params(config)
    assert len(stored) == 169 and round(trees.parameter_count(abstract) / 1e9, 3) == 3.876
    rules = weights.transformer_rules(config)
    check_both_ways(rules, abstract, stored)
    names = "to_q|to_k|to_v|to_out.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj"
    # `attn.to_out` alone would be the list in which the output of blocks with two streams lies, too
    targets = rf".*\.attn\.({names})|single_transformer_blocks\.\d+\.attn\.to_out"
    wrapped = on_meta(lambda: get_peft_model(model, LoraConfig(r=RANK, lora_alpha=64, target_modules=targets)))
    saved = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(wrapped).items()}
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract, transformer.ATTENTION_ADAPTER, RANK))
    check_both_ways(adapter_rules(rules, adapter), adapter, saved)
    assert len(saved) == 2 * (5 * 8 + 20 * 2)
    told = settings_of(adapter, adapter_rules(rules, adapter), rules, 64.0)
    again = on_meta(lambda: get_peft_model(diffusers.Flux2Transformer2DModel(**KLEIN), LoraConfig(**told)))
    assert {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(again).items()} == saved


def test_the_auto_encoder_of_klein(tmp_path):
    config = flux2.VAEConfig.from_folder(written(tmp_path, "_class_name", KLEIN_VAE | {"kind": flux2.VAE}))
    assert config == flux2.VAEConfig() and (config.downsampling, config.channels) == (16, 128)
    stored, abstract = (
        shapes_of(on_meta(lambda: diffusers.AutoencoderKLFlux2(**KLEIN_VAE))),
        vae.abstract_params(config),
    )
    assert len(stored) == 251 and stored.pop("bn.num_batches_tracked") == ()
    check_both_ways(weights.vae_rules(config), abstract, stored)


def test_the_text_encoder_of_klein(tmp_path):
    """All of Qwen3-4B is known; an embedding and 27 of its 36 layers are read."""
    text = qwen3.from_folder(written(tmp_path, "model_type", QWEN3_4B | {"kind": "qwen3"}))
    assert text == qwen3.QWEN3_4B
    stored = shapes_of(on_meta(lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3_4B))))
    stored.pop("lm_head.weight", None)  # the embedding
    whole = encoder.whole_table(text)
    assert len(stored) == 398 and round(trees.parameter_count(whole.abstract) / 1e9, 2) == 4.02
    check_both_ways(whole.rules, whole.abstract, stored)
    read = encoder.read_table(klein.encoder_sizes(text))
    wanted = {source for rule in read.rules for source in rule.sources()}
    assert wanted <= set(stored) and len(wanted) == 1 + 27 * 11
    assert round(trees.parameter_count(read.abstract) / 1e9, 2) == 3.11
    assert klein.encoder_sizes(text).width == KLEIN["joint_attention_dim"]


# Tongyi-MAI/Z-Image: transformer/config.json
Z_IMAGE = dict(
    all_patch_size=[2],
    all_f_patch_size=[1],
    in_channels=16,
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    n_kv_heads=30,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=2560,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512],
)


@pytest.mark.trap(70)
def test_z_image_and_its_adapter(tmp_path):
    config = z_config.TransformerConfig.from_folder(
        written(tmp_path, "_class_name", Z_IMAGE | {"kind": z_config.TransformerConfig.published_class})
    )
    assert config == z_config.TransformerConfig()
    model = on_meta(lambda: diffusers.ZImageTransformer2DModel(**Z_IMAGE))
    stored, abstract = shapes_of(model), z_transformer.abstract_params(config)
    assert len(stored) == 521 and round(trees.parameter_count(abstract) / 1e9, 3) == 6.155
    rules = z_weights.transformer_rules(config)
    check_both_ways(rules, abstract, stored)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    wrapped = on_meta(lambda: get_peft_model(model, LoraConfig(r=RANK, lora_alpha=64, target_modules=targets)))
    saved = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(wrapped).items()}
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract, z_transformer.ATTENTION_ADAPTER, RANK))
    check_both_ways(adapter_rules(rules, adapter), adapter, saved)


# Qwen/Qwen-Image: transformer and vae, config.json
QWEN_IMAGE = dict(
    patch_size=2,
    in_channels=64,
    out_channels=16,
    num_layers=60,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=3584,
    guidance_embeds=False,
    axes_dims_rope=[16, 56, 56],
)
QWEN_VAE = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0)


@pytest.mark.trap(70)
def test_qwen_image_and_its_adapter(tmp_path):
    stored_config = QWEN_IMAGE | {"kind": q_config.TransformerConfig.published_class}
    config = q_config.TransformerConfig.from_folder(written(tmp_path, "_class_name", stored_config))
    assert config == q_config.TransformerConfig()
    model = on_meta(lambda: diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE))
    stored, abstract = shapes_of(model), q_transformer.abstract_params(config)
    assert len(stored) == 1933 and round(trees.parameter_count(abstract) / 1e9, 2) == 20.43
    rules = q_weights.transformer_rules(config)
    check_both_ways(rules, abstract, stored)
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    options = LoraConfig(r=RANK, lora_alpha=64, target_modules=[f"attn.{name}" for name in names])
    wrapped = on_meta(lambda: get_peft_model(model, options))
    saved = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(wrapped).items()}
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract, q_transformer.ATTENTION_ADAPTER, RANK))
    check_both_ways(adapter_rules(rules, adapter), adapter, saved)


def test_the_auto_encoder_of_qwen_image(tmp_path):
    config = q_config.VAEConfig.from_folder(written(tmp_path, "_class_name", QWEN_VAE | {"kind": q_config.VAE}))
    stored = shapes_of(on_meta(lambda: diffusers.AutoencoderKLQwenImage(**QWEN_VAE)))
    assert len(stored) == 194
    kept = {name: shape for name, shape in stored.items() if not re.fullmatch(q_weights.TIME, name)}
    assert len(stored) - len(kept) == 8
    abstract, rules = q_vae.abstract_params(config), q_weights.vae_rules(config)
    leaves = trees.flatten(abstract)
    assert sorted(rule.ours for rule in rules) == sorted(leaves)
    assert {rule.theirs: rule.our_shape(kept[rule.theirs]) for rule in rules} == {
        rule.theirs: leaves[rule.ours].shape for rule in rules
    }
    assert {rule.theirs for rule in rules} == set(kept)


@pytest.mark.parametrize("field, value", [("guidance_embeds", True), ("patch_size", 2), ("axes_dims_rope", [64, 64])])
def test_another_flux2_is_refused(tmp_path, field, value):
    changed = KLEIN | {"kind": flux2.TransformerConfig.published_class, field: value}
    with pytest.raises(ValueError, match=f"{field}=.* is not supported"):
        flux2.TransformerConfig.from_folder(written(tmp_path, "_class_name", changed))


# of the latents of 512 pixels, of the states of a prompt, and parameters of text encoder and transformer in 1e9
SHAPES = {
    "klein_4b": ((32, 32, 128), (512, 7680), (3.11, 3.88)),
    "klein_base_4b": ((32, 32, 128), (512, 7680), (3.11, 3.88)),
    "z_image": ((64, 64, 16), (508, 2560), (3.92, 6.15)),
    "z_image_turbo": ((64, 64, 16), (508, 2560), (3.92, 6.15)),
    "qwen_image": ((64, 64, 16), (505, 3584), (7.07, 20.43)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_a_published_decoder(name):
    decoder, (latent, states, counts) = (
        PUBLISHED[name].make(dtype="bfloat16", remat="none", lora_alpha=64.0),
        SHAPES[name],
    )
    assert decoder.latent_shape(512, 512) == latent and decoder.states_shape(500) == (states, "bfloat16")
    parts = decoder.abstract_parts()
    assert (
        tuple(round(trees.parameter_count(parts[part]) / 1e9, 2) for part in ("text_encoder", "transformer")) == counts
    )
    shapes = (1, *latent), (1,), (1, *states), (1, states[0])
    latents, sigma, context, mask = (
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, ("float32", "float32", "bfloat16", "bool"))
    )
    found = jax.eval_shape(
        lambda *given: decoder.velocity(given[0], *given[1:3], given[3:]), parts, latents, sigma, context, mask
    )
    assert (found.shape, found.dtype) == (latents.shape, "float32")
    pixels = jax.eval_shape(lambda parts, x: decoder.decode(parts, x), parts, latents)
    assert pixels.shape == (1, 512, 512, 3)
