"""The PyTorch stack that a user would otherwise run, opened from the same folder: transformers, diffusers, peft."""

import pathlib

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import CLIPVisionModelWithProjection, Qwen2_5_VLForConditionalGeneration
from transformers.generation import CompileConfig
from transformers.utils import logging

from benchmarks.step_settings import Inputs

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TRANSFORMER_TARGETS = [
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
]


def _opened(kind: type, folder: pathlib.Path, device: str, **how) -> nn.Module:
    """A model of a folder; one of random weights, made on the device, where the folder has configs alone."""
    if any(folder.glob("*.safetensors")):
        return kind.from_pretrained(folder, **how)
    with torch.device(device):
        if hasattr(kind, "load_config"):  # of diffusers
            return kind.from_config(kind.load_config(folder)).to(how["torch_dtype"])
        return kind._from_config(kind.config_class.from_pretrained(folder), **how)


def _projector(folder: pathlib.Path, llm: nn.Module, context: int) -> nn.Sequential:
    """The two linear maps that the release stores among the captioner's tensors, or random ones of that form."""
    state, width = {}, llm.config.text_config.hidden_size
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            state |= {
                name.removeprefix("projector."): tensors.get_tensor(name)
                for name in tensors.keys()
                if name.startswith("projector.")
            }
    sizes = [(4 * width, width), (context, 4 * width)]
    if state:
        sizes = [state[f"{index}.weight"].shape for index in (0, 2)]
    projector = nn.Sequential(nn.Linear(*reversed(sizes[0])), nn.GELU(), nn.Linear(*reversed(sizes[1])))
    if state:
        projector.load_state_dict(state)
    return projector


class TorchModel:
    """All parts on the GPU if there is one, frozen but for the adapter of the stage; auto-encoder and reward are
    float32.

    Args:
      folder: the checkpoint.
      inputs: settings and arrays of both sides.
      stage: `gen_for_und`, `und_for_gen`, or `inference` for no adapter.
      compiled: `torch.compile` for the layers of every model, and for the decoding loop over a static cache.
    """

    def __init__(self, folder: pathlib.Path, inputs: Inputs, stage: str, compiled: bool):
        logging.set_verbosity_error()
        self.inputs, self.settings, self.compiled = inputs, inputs.settings, compiled
        torch.manual_seed(0)
        self.device, self.dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, self.settings.dtype)
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
        self.llm = _opened(
            Qwen2_5_VLForConditionalGeneration,
            folder / "llm",
            self.device,
            dtype=self.dtype,
            attn_implementation="sdpa",
        )
        self.dit = _opened(SD3Transformer2DModel, folder / "dit", self.device, torch_dtype=self.dtype)
        self.projector = _projector(folder / "llm", self.llm, self.dit.config.joint_attention_dim).to(self.dtype)
        self.vae = _opened(AutoencoderKL, folder / "SD3" / "vae", self.device, torch_dtype=torch.float32)
        self.clip = _opened(
            CLIPVisionModelWithProjection, folder / "clip", self.device, dtype=torch.float32, attn_implementation="sdpa"
        )
        for module in (self.llm, self.projector, self.dit, self.vae, self.clip):
            module.eval().requires_grad_(False).to(self.device)
        rank = self.settings.lora_rank
        config = dict(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian")
        if stage == "gen_for_und":
            self.llm.model.language_model = get_peft_model(
                self.llm.model.language_model, LoraConfig(target_modules="all-linear", **config)
            )
        if stage == "und_for_gen":
            self.dit = get_peft_model(self.dit, LoraConfig(target_modules=TRANSFORMER_TARGETS, **config))
        self.trained = [p for module in (self.llm, self.dit) for p in module.parameters() if p.requires_grad]
        if compiled:
            self._compile()
        self._read_inputs()

    def _compile(self) -> None:
        """Layer by layer, as the libraries advise: one graph serves all layers."""
        torch._dynamo.config.recompile_limit = 128
        language, transformer = (
            part.get_base_model() if isinstance(part, PeftModel) else part
            for part in (self.llm.model.language_model, self.dit)
        )
        for layer in (
            *language.layers,
            *self.llm.model.visual.blocks,
            *transformer.transformer_blocks,
            *self.clip.vision_model.encoder.layers,
        ):
            layer.compile()
        self.vae.decoder.compile()

    def _read_inputs(self) -> None:
        arrays = self.inputs.arrays
        if not arrays["prompt_mask"].all() or (arrays["patch_images"] < 0).any():
            raise ValueError("the PyTorch side wants prompts and pictures of one length, without padding")
        tensors = {
            name: torch.from_numpy(arrays[name]).to(self.device) for name in arrays if arrays[name].dtype != bool
        }
        ids, grid = tensors["prompt_ids"].long(), tensors["patch_positions"].amax(1).long() + 1
        self.prompt = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=tensors["patches"].flatten(0, 1),
            image_grid_thw=torch.cat([torch.ones_like(grid[:, :1]), grid], 1),
            mm_token_type_ids=(ids == self.llm.config.image_token_id).int(),
        )
        self.captions = tensors["caption_tokens"].long()
        self.affixes = [tensors[name].long() for name in ("prefix", "suffix")]
        self.negative = tensors["negative"].long()[None]
        self.pooled = tensors["pooled"].to(self.dtype)[None]
        self.sigmas = tensors["sigmas"]
        self.noise, self.pixels = (tensors[name].permute(0, 3, 1, 2).contiguous() for name in ("noise", "pixels"))

    @torch.inference_mode()
    def write(self, temperature: float, group: int) -> Tensor:
        """`group` captions of each picture, `[B * group, T]`."""
        sampling = (
            dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        )
        if self.compiled:
            config = CompileConfig(fullgraph=False, dynamic=False)
            config._compile_all_devices = True
            sampling |= dict(cache_implementation="static", compile_config=config)
        self.llm.generation_config.eos_token_id = None  # no caption ends early
        found = self.llm.generate(
            **self.prompt,
            **sampling,
            max_new_tokens=self.settings.tokens,
            pad_token_id=0,
            num_return_sequences=group,
            use_cache=True,
        )
        return found[:, self.prompt["input_ids"].shape[1] :]

    @torch.inference_mode()
    def condition(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Context of captions `[N, S, Dc]` and of the negative prompt `[1, S, Dc]`, by the reference language model."""
        return self._encode(captions), self._encode(self.negative)

    def _encode(self, captions: Tensor) -> Tensor:
        prefix, suffix = (part.expand(len(captions), -1) for part in self.affixes)
        language = self.llm.model.language_model
        ids = torch.cat([prefix, captions, suffix], 1)
        if isinstance(language, PeftModel):
            with language.disable_adapter():
                return self.projector(language(input_ids=ids, use_cache=False).last_hidden_state)
        return self.projector(language(input_ids=ids, use_cache=False).last_hidden_state)

    def velocity(self, x: Tensor, sigma: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Guided velocity of `[N, C, h, w]`, both halves as one batch; no gradient through the negative one
        (flow_grpo).
        """
        contexts = torch.cat([negative.expand(len(x), -1, -1), positive])
        without, given = (
            self.dit(
                hidden_states=torch.cat([x, x]).to(self.dtype),
                timestep=(1000 * sigma).expand(2 * len(x)),
                encoder_hidden_states=contexts,
                pooled_projections=self.pooled.expand(2 * len(x), -1),
                return_dict=False,
            )[0]
            .float()
            .chunk(2)
        )
        without = without.detach()
        return without + self.settings.guidance_scale * (given - without)

    @torch.inference_mode()
    def denoise(self, positive: Tensor, negative: Tensor, noise: Tensor) -> Tensor:
        """Euler steps: `[N, C, h, w]`."""
        x = noise
        for sigma, following in zip(self.sigmas[:-1], self.sigmas[1:]):
            x = x + (following - sigma) * self.velocity(x, sigma, positive, negative)
        return x

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[N, 3, H, W]`."""
        config = self.vae.config
        return self.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    @torch.inference_mode()
    def reward(self, pixels: Tensor) -> Tensor:
        """Cosines `[B, G]` of CLIP's features of pictures `[B * G, 3, H, W]` and originals."""
        features, targets = (self._features(images.clamp(-1, 1)) for images in (pixels, self.pixels))
        return (features.unflatten(0, (len(targets), -1)) * targets[:, None]).sum(-1)

    def _features(self, images: Tensor) -> Tensor:
        side = self.clip.config.image_size
        resized = interpolate((images + 1) / 2, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
        return normalize(self.clip(pixel_values=(resized - mean) / std).image_embeds, dim=-1)
