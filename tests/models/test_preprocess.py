"""Image processing against PIL's and torch's own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uae_jax.models.encoders.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    apply,
    clip_preprocessor,
    resize_matrix,
)

SIZES = [(61, 90), (97, 53), (40, 40)]  # portrait, landscape with an odd margin, and enlarging


def natural(height: int, width: int) -> np.ndarray:
    """An 8-bit picture with smooth parts, edges and noise."""
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    picture = np.asarray(coarse).astype(np.float32)
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 40)
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def gap_in_levels(ours, theirs, std) -> np.ndarray:
    """Absolute difference of normalised images, in units of 1/255 of the image range."""
    return np.abs(np.asarray(ours) - theirs) * np.asarray(std) * 255


@pytest.fixture(params=["clip", "dinov2"])
def processor(request):
    if request.param == "clip":
        return CLIPImageProcessorPil(**{k: v for k, v in clip_preprocessor(48).items() if k != "image_processor_type"})
    return BitImageProcessorPil(
        size=dict(shortest_edge=56),
        crop_size=dict(height=48, width=48),
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


@pytest.mark.trap(31)
@pytest.mark.parametrize("size", SIZES)
def test_published_processors_are_reproduced(processor, size, tmp_path):
    image = natural(*size)
    theirs = np.moveaxis(np.asarray(processor(images=[image]).pixel_values[0]), 0, -1)
    processor.save_pretrained(tmp_path)
    preprocess = Preprocess.from_folder(tmp_path)
    pixels = jnp.asarray(image[None], jnp.float32) / 255
    plain = gap_in_levels(apply(preprocess, pixels)[0], theirs, preprocess.std)
    exact = gap_in_levels(apply(dataclasses.replace(preprocess, quantize=True), pixels)[0], theirs, preprocess.std)
    assert plain.shape == (48, 48, 3)
    assert plain.max() < 2.0 and plain.mean() < 0.5  # two roundings to whole levels
    assert exact.max() < 1.01 and exact.mean() < 0.01  # PIL's fixed-point weights may turn a tie


@pytest.mark.trap(31)
@pytest.mark.parametrize("size", SIZES)
def test_dinov3_ignores_the_aspect_ratio(size):
    raw = dict(
        image_processor_type="DINOv3ViTImageProcessorFast",
        size=dict(height=32, width=32),
        resample=2,
        do_center_crop=None,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    image = natural(*size)
    x = torch.tensor(image[None]).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
    ours = apply(Preprocess.from_dict(raw), jnp.asarray(image[None], jnp.float32) / 255)
    np.testing.assert_allclose(ours, (x - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD), atol=2e-5)


@pytest.mark.trap(31)
@pytest.mark.parametrize("size", SIZES)
def test_uae_variant_is_torch_bicubic_without_antialiasing(size, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip_preprocessor(32)))
    preprocess = Preprocess.from_folder(tmp_path, "uae")
    image = natural(*size)
    x = torch.tensor(image[None]).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, size=(32, 32), mode="bicubic").permute(0, 2, 3, 1).numpy()
    ours = apply(preprocess, jnp.asarray(image[None], jnp.float32) / 255)
    np.testing.assert_allclose(ours, (x - np.array(preprocess.mean)) / np.array(preprocess.std), atol=5e-5)
    assert hash(preprocess) == hash(Preprocess.from_folder(tmp_path, "uae"))


@pytest.mark.trap(31)
@pytest.mark.parametrize("n_in, n_out", [(7, 7), (9, 4), (4, 9), (37, 16)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resize_matrix_equals_torch(n_in, n_out, method, antialias):
    a = -0.5 if antialias else -0.75
    x = torch.eye(n_in, dtype=torch.float64)[None, None]
    theirs = torch.nn.functional.interpolate(x, size=(n_in, n_out), mode=method, antialias=antialias)
    np.testing.assert_allclose(resize_matrix(n_in, n_out, method, antialias, a), theirs[0, 0].T.numpy(), atol=2e-7)


@pytest.mark.trap(31)
def test_crop_offsets_floor_in_transformers_and_round_in_torchvision():
    pixels = jnp.broadcast_to(jnp.arange(11.0)[None, None, :, None] / 255, (1, 8, 11, 3))
    start = {}
    for offset in ("floor", "round"):
        preprocess = dataclasses.replace(
            Preprocess(size=(), crop=(8, 8), mean=(0.0,) * 3, std=(1 / 255,) * 3), crop_offset=offset
        )
        start[offset] = round(float(apply(preprocess, pixels)[0, 0, 0, 0]))
    assert start == dict(floor=1, round=2)
    assert Preprocess.longclip().crop_offset == "round"


@pytest.mark.trap(31)
def test_older_integer_sizes():
    old = Preprocess.from_dict(dict(feature_extractor_type="CLIPFeatureExtractor", size=224, crop_size=224, resample=3))
    assert old == Preprocess.from_dict(clip_preprocessor(224))


@pytest.mark.trap(31)
def test_gradient_is_the_transposed_resize():
    preprocess = Preprocess(size=(8,), crop=(8, 8), clip=False)
    x = jax.random.uniform(jax.random.key(0), (1, 12, 20, 3))
    y, pull = jax.vjp(lambda x: apply(preprocess, x), x)
    (gradient,) = pull(jnp.ones_like(y))
    # each row of the weights sums to 1, so that the whole gradient is the number of outputs over std
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), 64 / np.array(preprocess.std), rtol=1e-4)


@pytest.mark.trap(31)
def test_unsupported_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="resample 1"):
        Preprocess.from_dict(dict(clip_preprocessor(32), resample=1))
    with pytest.raises(ValueError, match="shortest_edge"):
        Preprocess.from_dict(dict(clip_preprocessor(32), size=dict(longest_edge=4)))
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        Preprocess.from_folder(tmp_path)
    with pytest.raises(ValueError, match="smaller than the crop"):
        apply(Preprocess(size=(4,), crop=(8, 8)), jnp.zeros((1, 5, 5, 3)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip_preprocessor(32)))
    with pytest.raises(ValueError, match="variant"):
        Preprocess.from_folder(tmp_path, "clip")
