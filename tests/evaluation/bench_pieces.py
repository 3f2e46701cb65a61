"""Photographs, and small random encoders in the published layouts beside what PyTorch computes with them."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import skimage
import torch
import transformers
from matplotlib import cbook
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# the files of openai/clip-vit-large-patch14, facebook/dinov2-large and facebook/dinov3-vitl16-pretrain-lvd1689m
CLIP_PROCESSOR = dict(
    crop_size=224,
    do_center_crop=True,
    do_normalize=True,
    do_resize=True,
    feature_extractor_type="CLIPFeatureExtractor",
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    resample=3,
    size=224,
)
DINOV2_PROCESSOR = dict(
    crop_size=dict(height=224, width=224),
    do_center_crop=True,
    do_convert_rgb=True,
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    image_mean=IMAGENET_MEAN,
    image_processor_type="BitImageProcessor",
    image_std=IMAGENET_STD,
    resample=3,
    rescale_factor=0.00392156862745098,
    size=dict(shortest_edge=256),
)
DINOV3_PROCESSOR = dict(
    crop_size=None,
    data_format="channels_first",
    do_center_crop=None,
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    image_mean=IMAGENET_MEAN,
    image_processor_type="DINOv3ViTImageProcessorFast",
    image_std=IMAGENET_STD,
    resample=2,
    rescale_factor=0.00392156862745098,
    size=dict(height=224, width=224),
)


def photographs() -> dict[str, Image.Image]:
    """Real photographs in portrait, landscape and square, with odd sizes among them."""
    folder = pathlib.Path(skimage.__file__).parent / "data"
    found = {
        name: Image.open(folder / file).convert("RGB")
        for name, file in (
            ("astronaut", "astronaut.png"),
            ("coffee", "coffee.png"),
            ("cat", "chelsea.png"),
            ("rocket", "rocket.jpg"),
        )
    }
    found["officer"] = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    found["sliver"] = found["rocket"].crop((120, 30, 453, 251))  # 333 x 221: enlarged, with odd margins
    return found


def reconstructions(photos: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """What a decoder might make of the photographs: blurred, small, recoloured, or another picture altogether."""
    return {
        "astronaut": photos["astronaut"].filter(ImageFilter.GaussianBlur(6)),
        "coffee": photos["coffee"].resize((64, 64), Image.Resampling.LANCZOS),
        "cat": Image.fromarray(np.asarray(photos["cat"])[:, ::-1, ::-1].copy()),
        "rocket": photos["officer"],
        "officer": photos["officer"].rotate(20).resize((256, 256)),
        "sliver": Image.blend(photos["sliver"], photos["cat"].resize(photos["sliver"].size), 0.4),
    }


@dataclasses.dataclass(frozen=True)
class Published:
    """An encoder's folder or file, PyTorch's image processing [S, S, 3] and PyTorch's feature of the processed
    image.
    """

    path: pathlib.Path
    pixels: Callable[[Image.Image], np.ndarray]
    feature: Callable[[np.ndarray], np.ndarray]

    def cosine(self, a: Image.Image, b: Image.Image) -> float:
        features = [torch.tensor(self.feature(self.pixels(image))) for image in (a, b)]
        first, second = (torch.nn.functional.normalize(x, dim=1) for x in features)
        return float(torch.cosine_similarity(first, second))


def shaken(kind: type, config: transformers.PreTrainedConfig) -> Any:
    """A model with random weights, always the same, with which different pictures have different features."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.float().eval()


def _feature(read: Callable) -> Callable[[np.ndarray], np.ndarray]:
    def feature(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return read(torch.tensor(np.moveaxis(pixels, -1, 0).copy())[None]).numpy()

    return feature


def clip_model() -> Any:
    vision = dict(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, image_size=224, patch_size=28
    )
    text = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=60,
        bos_token_id=58,
        eos_token_id=59,
        max_position_embeddings=30,
    )
    return shaken(
        transformers.CLIPModel, transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    )


def clip_encoder(folder: pathlib.Path) -> Published:
    model, processor = clip_model(), CLIPImageProcessorPil()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    return Published(
        folder,
        lambda image: np.moveaxis(np.asarray(processor(images=[image]).pixel_values[0]), 0, -1),
        _feature(lambda x: model.get_image_features(pixel_values=x).pooler_output),
    )


def openai_state(model: transformers.CLIPModel) -> dict[str, torch.Tensor]:
    """The weights of a CLIPModel under OpenAI's names, with Long-CLIP's second table of text positions."""
    state = model.state_dict()
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    for ours, theirs in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ):
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    found = {ours: state[theirs] for ours, theirs in names.items()}
    found["visual.proj"], found["text_projection"] = (
        state["visual_projection.weight"].T,
        state["text_projection.weight"].T,
    )
    found["positional_embedding_res"] = torch.randn_like(found["positional_embedding"])
    for prefix, tower, layers in (("visual.", "vision_model", 2), ("", "text_model", 1)):
        for layer in range(layers):
            block, source = f"{prefix}transformer.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                parts = [state[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                for ours, theirs in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                ):
                    found[f"{block}.{ours}.{kind}"] = state[f"{source}.{theirs}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def torchvision_pixels(image: Image.Image) -> np.ndarray:
    """torchvision's Resize(224, BICUBIC), CenterCrop(224), ToTensor and Normalize on a PIL image."""
    width, height = image.size
    short, long = sorted((width, height))
    other = int(224 * long / short)
    image = image.resize((224, other) if width <= height else (other, 224), Image.Resampling.BICUBIC)
    left, top = (int(round((side - 224) / 2.0)) for side in image.size)
    x = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return (x - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)


def longclip_encoder(folder: pathlib.Path, file: str = "longclip-L.pt") -> Published:
    model = clip_model()
    state = openai_state(model)
    torch.save(state, folder / file) if file.endswith(".pt") else save_file(state, folder / file)
    return Published(
        folder / file, torchvision_pixels, _feature(lambda x: model.get_image_features(pixel_values=x).pooler_output)
    )


def dinov2_encoder(folder: pathlib.Path) -> Published:
    model = shaken(
        transformers.Dinov2Model,
        transformers.Dinov2Config(
            patch_size=14, image_size=518, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
    )
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2_PROCESSOR))
    settings: dict[str, Any] = {**DINOV2_PROCESSOR}
    del settings["image_processor_type"]
    processor = BitImageProcessorPil(**settings)
    return Published(
        folder,
        lambda image: np.moveaxis(np.asarray(processor(images=[image]).pixel_values[0]), 0, -1),
        _feature(lambda x: model(pixel_values=x).last_hidden_state[:, 0]),
    )


def dinov3_pixels(image: Image.Image) -> np.ndarray:
    """DINOv3ViTImageProcessorFast: rescale, then resize with torch's antialiased interpolation, then normalise."""
    x = torch.tensor(np.asarray(image).transpose(2, 0, 1).copy())[None].float() * 0.00392156862745098
    x = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)[0]
    return (x.permute(1, 2, 0).numpy() - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)


def dinov3_encoder(folder: pathlib.Path) -> Published:
    model = shaken(
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig(
            patch_size=16,
            image_size=224,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            num_register_tokens=4,
        ),
    )
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV3_PROCESSOR))
    return Published(folder, dinov3_pixels, _feature(lambda x: model(pixel_values=x).last_hidden_state[:, 0]))


ENCODERS = {"clip": clip_encoder, "longclip": longclip_encoder, "dinov2": dinov2_encoder, "dinov3": dinov3_encoder}
