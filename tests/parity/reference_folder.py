"""A small model of random weights in the official folder layout, and what PyTorch computes from it.

Written with the libraries that publish the real models (transformers, diffusers, peft), which share no code with the
package: whatever is misnamed, transposed or left out there shows as a difference here.
"""

import dataclasses
import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from uae_jax.data.tokenizer import write_scene_tokenizer
from uae_jax.stages.weights import ModelConfig, System, load_system

CAPTION_PROMPT = "describe this image in detail"
CAPTION = "a small red dog left of a large blue ball"
NEGATIVE_PROMPT = "a low quality , ugly , blurred and random cartoon image of bad taste"  # longer than the caption
SIDE, NEW_TOKENS, STEPS, GUIDANCE, RANK = 32, 12, 3, 5.0, 4
SCALE, SHIFT = 1.5305, 0.0609
CONTEXT, POOLED, LANGUAGE = 24, (16, 24), 32
DIT_TARGETS = [
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
]
SHARDS = 3


@dataclasses.dataclass(frozen=True)
class Reference:
    """The folder, and inputs and PyTorch's outputs by name (channels first, as PyTorch has them)."""

    folder: pathlib.Path
    arrays: dict[str, np.ndarray]


def write_tokenizer(folder: pathlib.Path) -> None:
    """The captioner's tokenizer and image processor: a few hundred words, patches of 4 pixels."""
    words = f"{CAPTION_PROMPT} {CAPTION} {NEGATIVE_PROMPT}".split()
    write_scene_tokenizer(folder, [*words, *(f"word{number}" for number in range(280))])


def build_captioner(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = tokenizer.convert_tokens_to_ids
    llm = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer) + 5,
                hidden_size=LANGUAGE,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]),
                tie_word_embeddings=True,
                max_position_embeddings=512,
                bos_token_id=ids("<|endoftext|>"),
                eos_token_id=ids("<|im_end|>"),
                pad_token_id=ids("<|endoftext|>"),
            ),
            vision_config=dict(
                depth=3,
                hidden_size=32,
                num_heads=2,
                intermediate_size=48,
                out_hidden_size=LANGUAGE,
                fullatt_block_indexes=[1],
                window_size=16,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
            ),
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
            tie_word_embeddings=True,
        )
    )
    llm.projector = nn.Sequential(nn.Linear(LANGUAGE, 40), nn.GELU(), nn.Linear(40, CONTEXT))
    return llm


def build_modules(tokenizer) -> dict[str, nn.Module]:
    """Every model by the name of its folder; a dual-attention block, a group of equal blocks and the last block."""
    texts = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=width,
                hidden_act=act,
            )
        )
        for width, act in zip(POOLED, ("quick_gelu", "gelu"))
    ]
    clip = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    dino = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return {
        "llm": build_captioner(tokenizer),
        "dit": SD3Transformer2DModel(
            sample_size=SIDE // 8,
            patch_size=2,
            in_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            caption_projection_dim=32,
            pooled_projection_dim=sum(POOLED),
            out_channels=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "SD3/vae": AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=[8, 16, 16, 16],
            layers_per_block=1,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            norm_num_groups=4,
            scaling_factor=SCALE,
            shift_factor=SHIFT,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "SD3/text_encoder": texts[0],
        "SD3/text_encoder_2": texts[1],
        "clip": CLIPModel(
            CLIPConfig(
                vision_config=dict(clip, image_size=28, patch_size=14),
                text_config=dict(clip, vocab_size=99),
                projection_dim=24,
            )
        ),
        "dinov2": Dinov2Model(Dinov2Config(patch_size=14, image_size=42, **dino)),
        "dinov3": DINOv3ViTModel(
            DINOv3ViTConfig(intermediate_size=64, patch_size=16, image_size=32, num_register_tokens=4, **dino)
        ),
    }


def shake(modules: dict[str, nn.Module]) -> None:
    """Moves what initialisers leave at 0 or 1, where a wrong name could hide, and keeps tied embeddings from
    echoing.
    """
    with torch.no_grad():
        for module in modules.values():
            module.float().eval()
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        for parameter in modules["llm"].model.language_model.layers.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)


def chat_ids(tokenizer, role: str, content: list, image_tokens: tuple[int, ...] = ()) -> torch.Tensor:
    text = tokenizer.apply_chat_template([dict(role=role, content=content)], tokenize=False, add_generation_prompt=True)
    for count in image_tokens:
        text = text.replace("<|image_pad|>", "<|expanded|>" * count, 1)
    return torch.tensor([tokenizer(text.replace("<|expanded|>", "<|image_pad|>"), add_special_tokens=False).input_ids])


def caption_inputs(tokenizer, folder: pathlib.Path, images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """One unpadded row with all the images."""
    vision = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    grid = vision["image_grid_thw"]
    content = [dict(type="text", text=CAPTION_PROMPT), *(dict(type="image") for _ in images)]
    ids = chat_ids(tokenizer, "user", content, tuple((grid.prod(1) // 4).tolist()))
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=vision["pixel_values"],
        image_grid_thw=grid,
        mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
    )


def caption_arrays(llm, inputs: dict[str, torch.Tensor], row: int) -> dict[str, np.ndarray]:
    new = llm.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return {
        f"pixel_values_{row}": inputs["pixel_values"].numpy(),
        f"image_grid_thw_{row}": inputs["image_grid_thw"].numpy(),
        f"caption_prompt_ids_{row}": inputs["input_ids"].numpy(),
        f"caption_logits_{row}": llm(**inputs).logits[0, -1].numpy(),
        f"caption_ids_{row}": new[0, inputs["input_ids"].shape[1] :].numpy(),
    }


def encode_prompt(llm, tokenizer, prompt: str) -> torch.Tensor:
    ids = chat_ids(tokenizer, "generate", [dict(type="text", text=prompt)])
    return llm.projector(
        llm(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[-1]
    )


def empty_prompt(encoder) -> torch.Tensor:
    ids = torch.full((1, 77), 49407)
    ids[0, 0] = 49406
    return encoder(ids).text_embeds


def picture_arrays(modules, scheduler, embeds: list[torch.Tensor], pooled: torch.Tensor) -> dict[str, np.ndarray]:
    """Guided Euler steps from noise, with each prompt at its own length, and decoding."""
    x = torch.randn(1, 16, SIDE // 8, SIDE // 8)
    arrays = {"latents_init": x.numpy()}
    scheduler.set_timesteps(STEPS)
    for step in scheduler.timesteps:
        negative, positive = (
            modules["dit"](
                hidden_states=x,
                timestep=step[None],
                encoder_hidden_states=states,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            for states in embeds
        )
        velocity = negative + GUIDANCE * (positive - negative)
        arrays.setdefault("velocity_first", velocity.numpy())
        x = scheduler.step(velocity, step, x, return_dict=False)[0]
    decoded = modules["SD3/vae"].decode(x / SCALE + SHIFT, return_dict=False)[0]
    return arrays | {"sigmas": scheduler.sigmas.numpy(), "latents_final": x.numpy(), "decoded": decoded.numpy()}


def encoder_arrays(modules) -> dict[str, np.ndarray]:
    pixels = {
        "vae": torch.rand(1, 3, 24, 40) * 2 - 1,
        "clip": torch.randn(2, 3, 28, 28),
        "dinov2": torch.randn(2, 3, 28, 28),
        "dinov3": torch.randn(2, 3, 32, 32),
    }
    clip = modules["clip"].get_image_features(pixel_values=pixels["clip"])
    found = {
        "encoded_mean": modules["SD3/vae"].encode(pixels["vae"]).latent_dist.mean,
        "clip_features": clip if torch.is_tensor(clip) else clip.pooler_output,
    }
    for name in ("dinov2", "dinov3"):
        found[f"{name}_cls"] = modules[name](pixel_values=pixels[name]).last_hidden_state[:, 0]
    return {f"{name}_pixels": value.numpy() for name, value in pixels.items()} | {
        name: v.numpy() for name, v in found.items()
    }


def save_modules(folder: pathlib.Path, modules, scheduler) -> None:
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "SD3" / "scheduler")
    common = dict(
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        rescale_factor=1 / 255,
        resample=3,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    crop = dict(
        do_center_crop=True, do_convert_rgb=True, size=dict(shortest_edge=28), crop_size=dict(height=28, width=28)
    )
    processors = {
        "clip": dict(common, image_processor_type="CLIPImageProcessor", **crop),
        "dinov2": dict(common, image_processor_type="BitImageProcessor", **crop),
        "dinov3": dict(common, image_processor_type="DINOv3ViTImageProcessorFast", size=dict(height=32, width=32)),
    }
    for name, settings in processors.items():
        (folder / name / "preprocessor_config.json").write_text(json.dumps(settings))


def add_adapters(folder: pathlib.Path, modules) -> None:
    """Wraps the two trained models; the captioner's is stored as the release does: the whole wrapped model, no
    config.
    """
    settings = dict(r=RANK, lora_alpha=2 * RANK, init_lora_weights=False)
    llm = modules["llm"]
    language = get_peft_model(llm.model.language_model, LoraConfig(target_modules="all-linear", **settings))
    state = {f"model.{name}": value for name, value in language.state_dict().items()}
    state |= {f"visual.{name}": value for name, value in llm.model.visual.state_dict().items()}
    state |= {f"projector.{name}": value for name, value in llm.projector.state_dict().items()}
    llm.model.language_model = language.eval()
    (folder / "llm_lora").mkdir()
    for shard in range(SHARDS):
        part = {name: state[name].clone().contiguous() for name in sorted(state)[shard::SHARDS]}
        save_file(
            part, folder / "llm_lora" / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors", metadata=dict(format="pt")
        )
    transformer = get_peft_model(modules["dit"], LoraConfig(target_modules=DIT_TARGETS, **settings))
    transformer.save_pretrained(folder / "dit_lora")
    modules["dit"] = transformer.eval()


@torch.no_grad()
def build_reference(folder: pathlib.Path) -> Reference:
    """Writes the folder and computes every array, first without and then with the adapters."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    processor = folder / "llm_processor"
    write_tokenizer(processor)
    tokenizer = AutoTokenizer.from_pretrained(processor)
    modules, scheduler = build_modules(tokenizer), FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    shake(modules)
    llm = modules["llm"]
    # neither is a whole number of windows; the second is resized
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((24, 32), (30, 21))]
    rows = [caption_inputs(tokenizer, processor, chosen) for chosen in (images[:1], images[1:], images)]
    arrays = {f"image_{number}": image for number, image in enumerate(images)}
    for number, row in enumerate(rows):
        arrays |= caption_arrays(llm, row, number)
    embeds = [encode_prompt(llm, tokenizer, prompt) for prompt in (NEGATIVE_PROMPT, CAPTION)]
    arrays["negative_prompt_embeds"], arrays["prompt_embeds"] = (value.numpy() for value in embeds)
    pooled = torch.cat([empty_prompt(modules[f"SD3/{name}"]) for name in ("text_encoder", "text_encoder_2")], -1)
    arrays["pooled_prompt_embeds"] = pooled.numpy()
    arrays |= picture_arrays(modules, scheduler, embeds, pooled) | encoder_arrays(modules)
    save_modules(folder, modules, scheduler)
    add_adapters(folder, modules)
    arrays["caption_ids_lora"] = caption_arrays(llm, rows[0], 0)["caption_ids_0"]
    arrays["prompt_embeds_lora"] = encode_prompt(llm, tokenizer, CAPTION).numpy()
    arrays["velocity_first_lora"] = modules["dit"](
        hidden_states=torch.tensor(arrays["latents_init"]),
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=embeds[1],
        pooled_projections=pooled,
        return_dict=False,
    )[0].numpy()
    return Reference(folder, arrays)


def load(folder: pathlib.Path) -> System:
    """The folder through the package's own loader."""
    return load_system(ModelConfig(folder=str(folder)), image_size=SIDE, negative_prompt=NEGATIVE_PROMPT)
