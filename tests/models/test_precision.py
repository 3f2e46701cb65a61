"""bfloat16 computation on float32 parameters: which operations are in which precision, in every model."""

import jax
import jax.numpy as jnp
import pytest
from programs import equations

from uae_jax.diffusion.sampler import guided_velocity, sample
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPVisionConfig, Dinov2Config, Dinov3Config
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import generate
from uae_jax.models.qwen2_5_vl import model
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig
from uae_jax.models.sd3 import transformer, vae
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig

HALF = jnp.bfloat16
CAPTIONER = Qwen2_5VLConfig(
    vision=VisionConfig(
        depth=2, width=16, heads=2, mlp_width=24, out_width=32, patch_size=2, full_attention_blocks=(1,)
    ),
    text=TextConfig(vocab_size=60, width=32, layers=2, heads=4, key_heads=2, mlp_width=48, mrope_section=(2, 1, 1)),
    image_token_id=58,
    pad_token_id=0,
    stop_token_ids=(1,),
).using(dtype="bfloat16")
DECODER = TransformerConfig(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=16,
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
    dtype="bfloat16",
)
TOWER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def vision():
    ids = zeros(1, 8, dtype=jnp.int32)
    arguments = zeros(1, 8, CAPTIONER.vision.patch_width), zeros(1, 8, 2, dtype=jnp.int32), ids, ids
    return (lambda *x: model.encode_images(CAPTIONER, *x)), model.abstract_params(CAPTIONER), arguments, HALF


def prompt():
    return {
        "prompt_ids": zeros(2, 5, dtype=jnp.int32),
        "prompt_mask": zeros(2, 5, dtype=bool),
        "prompt_positions": zeros(2, 5, 3, dtype=jnp.int32),
        "prompt_next": zeros(2, dtype=jnp.int32),
    }


def scores():
    def run(params, batch, tokens, mask):
        prefix = model.prompt_prefix(CAPTIONER, params, None, batch)
        return lm.completion_log_probs(CAPTIONER, params, None, prefix, tokens, mask, with_entropy=True)

    arguments = prompt(), zeros(4, 6, dtype=jnp.int32), zeros(4, 6, dtype=bool)
    return run, model.abstract_params(CAPTIONER), arguments, jnp.float32


def sampling():
    def run(params, batch):
        prefix = model.prompt_prefix(CAPTIONER, params, None, batch)
        keys = jax.random.split(jax.random.key(0), 4)
        return generate(CAPTIONER, params, None, prefix, keys, max_new_tokens=3, stop_ids=(1,), group=2).log_probs

    return run, model.abstract_params(CAPTIONER), (prompt(),), jnp.float32


def denoising():
    def run(params, noise, context, pooled):
        def velocity(x, sigma, states):
            return transformer.Transformer(DECODER).apply(
                {"params": params}, x, 1000 * sigma, states, jnp.repeat(pooled, len(x), 0)
            )

        predict = lambda x, sigma: guided_velocity(velocity, x, sigma, context, context, 3.0)  # noqa: E731
        return sample(predict, noise, jnp.asarray([1.0, 0.6, 0.0]))

    arguments = zeros(2, 8, 8, 4), zeros(2, 5, 16), zeros(1, 16)
    return run, transformer.abstract_params(DECODER), arguments, jnp.float32


def clip_image():
    config = CLIPVisionConfig(**TOWER, intermediate_size=32, projection_dim=8)
    return (
        (lambda p, x: clip.image_features(config, p, x)),
        clip.abstract_params(config),
        (zeros(1, 16, 16, 3, dtype=HALF),),
        HALF,
    )


def dinov2():
    config = Dinov2Config(**TOWER, mlp_ratio=2)
    return (
        (lambda p, x: dino.cls_features(config, p, x)),
        dino.abstract_params(config),
        (zeros(1, 16, 16, 3, dtype=HALF),),
        HALF,
    )


def dinov3():
    config = Dinov3Config(**TOWER, intermediate_size=32, num_register_tokens=2)
    return (
        (lambda p, x: dino.cls_features(config, p, x)),
        dino.abstract_params(config),
        (zeros(1, 16, 16, 3, dtype=HALF),),
        HALF,
    )


MODELS = (vision, scores, sampling, denoising, clip_image, dinov2, dinov3)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_products_are_bfloat16_and_statistics_float32(make):
    function, params, arguments, result = make()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    products, statistics = [], []
    for equation in equations(function, params, *arguments):
        kind = [
            variable.aval.dtype for variable in (*equation.invars, *equation.outvars) if hasattr(variable.aval, "dtype")
        ]
        if equation.primitive.name == "dot_general":
            products.append(kind[:2])
        if equation.primitive.name in ("exp", "log", "rsqrt", "cumsum", "cos", "sin") and jnp.issubdtype(
            kind[0], jnp.floating
        ):
            statistics.append(kind)
    assert statistics and all(part == jnp.float32 for kind in statistics for part in kind)
    assert products and all(part == HALF for kind in products for part in kind)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(function, params, *arguments))} == {jnp.dtype(result)}


def test_latents_stay_float32_between_denoising_steps():
    function, params, arguments, _ = denoising()
    shape = arguments[0].shape
    carried = [
        variable.aval.dtype
        for equation in equations(function, params, *arguments)
        if equation.primitive.name == "scan"
        for variable in equation.outvars
        if variable.aval.shape == shape
    ]
    assert carried and set(carried) == {jnp.dtype("float32")}


def test_the_auto_encoder_is_float32_for_half_precision_latents():
    config = VAEConfig(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16
    )
    arguments = vae.abstract_params(config), zeros(2, 8, 8, 4, dtype=HALF)
    products = [
        variable.aval.dtype
        for equation in equations(lambda p, x: vae.decode_latents(config, p, x, 1), *arguments)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
        for variable in equation.invars
    ]
    assert set(products) == {jnp.dtype("float32")}


@pytest.mark.parametrize("make", (clip_image, dinov2, dinov3), ids=lambda make: make.__name__)
def test_bfloat16_features_are_near_float32(make):
    function, abstract, (pixels,), _ = make()
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves) + 1)
    params = jax.tree.unflatten(
        tree, [jax.random.normal(k, x.shape) / max(x.shape[0], 1) ** 0.5 for k, x in zip(keys, leaves)]
    )
    pixels = jax.random.normal(keys[-1], pixels.shape)
    exact, rough = (jax.jit(function)(params, pixels.astype(dtype)) for dtype in (jnp.float32, HALF))
    scale = float(jnp.abs(exact).max())
    assert rough.dtype == HALF and 0 < float(jnp.abs(exact - rough).max()) < 0.05 * scale
