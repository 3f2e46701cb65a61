"""A small random Janus of transformers, its prompts, and its state under the official names."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from uae_jax.models.janus import config as ours
from uae_jax.models.janus import model
from uae_jax.models.janus.config import TOKENS
from uae_jax.models.language.config import TextConfig

BOS, EOS, PAD, BEGIN, END, IMAGE = range(6)
CELLS, SIDE, GUIDANCE = 16, 32, 5.0
WORDS = 310  # ids of `write_tokenizer`


def build(tied: bool = False, vocabulary: int = 160) -> JanusForConditionalGeneration:
    """1.19 M parameters, 282 tensors."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        mlp_ratio=2,
        projection_dim=48,
        num_image_tokens=CELLS,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=64,
        latent_channels=16,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 2],
        num_res_blocks=1,
        projection_dim=48,
        image_token_embed_dim=48,
    )
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=IMAGE, tie_word_embeddings=tied
    )
    network = JanusForConditionalGeneration(config)
    with torch.no_grad():  # default initialisers leave biases and norms at 0 and 1, where a wrong name could hide
        for name, parameter in network.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            if re.search(r"language_model\.layers|generation_|lm_head", name) and parameter.ndim == 2:
                parameter.mul_(4.0)
    network.generation_config.generation_kwargs = {"boi_token_id": BEGIN}
    return network.float().eval()


def pixels(rows: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, SIDE, SIDE, 3)).astype(np.float32)


def for_torch(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2).copy())


def caption_prompts() -> list[list[int]]:
    """One image in each prompt, and another number of words around it."""
    words = np.random.default_rng(3).integers(6, 160, 40).tolist()
    return [
        [BOS, *words[at : at + count], BEGIN, *[IMAGE] * CELLS, END, *words[20 + at : 22 + at + 2 * count]]
        for at, count in ((0, 4), (4, 2), (6, 7))
    ]


def drawing_prompts() -> list[list[int]]:
    words = np.random.default_rng(4).integers(6, 160, 40).tolist()
    return [[BOS, *words[at : at + count], BEGIN] for at, count in ((0, 9), (9, 3), (12, 6))]


def right_padded(prompts: list[list[int]], fill: int = PAD) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask."""
    width = max(map(len, prompts))
    ids = np.array([[*prompt, *[fill] * (width - len(prompt))] for prompt in prompts], np.int32)
    return ids, np.arange(width)[None] < np.array(list(map(len, prompts)))[:, None]


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[*[PAD] * (width - len(prompt)), *prompt] for prompt in prompts])
    mask = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def relative(ours, theirs) -> float:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


# transformers' names to the official ones, written out from the official modules
_OFFICIAL = (
    (r"^model\.vision_model\.embeddings\.patch_embedding\.", "vision_model.vision_tower.patch_embed.proj."),
    (r"^model\.vision_model\.embeddings\.position_embedding\.weight", "vision_model.vision_tower.pos_embed"),
    (r"^model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    (r"^model\.vision_model\.encoder\.layers\.", "vision_model.vision_tower.blocks."),
    (r"(?<=blocks)(\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"(?<=blocks)(\.\d+)\.self_attn\.projection_layer", r"\1.attn.proj"),
    (r"(?<=blocks)(\.\d+)\.self_attn\.", r"\1.attn."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.vision_head\.", "gen_head.vision_head."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"(?<=coder)\.(down|up)\.(\d+)\.block\.", r".conv_blocks.\2.res."),
    (r"(?<=coder)\.(down|up)\.(\d+)\.", r".conv_blocks.\2."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
)


def official_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state of transformers under the official names, with what the official files hold beside it."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _OFFICIAL:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor[None] if name.endswith("pos_embed") else tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = (renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv")
        renamed[name.replace("q_proj", "qkv")] = torch.cat(list(parts))
    width = renamed["vision_model.vision_tower.norm.weight"].shape[0]
    pooling = dict.fromkeys(("q", "proj", "mlp.fc1", "mlp.fc2"), (width, width)) | {"kv": (2 * width, width)}
    for name, shape in pooling.items():
        renamed[f"vision_model.vision_tower.attn_pool.{name}.weight"] = torch.zeros(shape)
        renamed[f"vision_model.vision_tower.attn_pool.{name}.bias"] = torch.zeros(shape[0])
    renamed["vision_model.vision_tower.attn_pool.norm.weight"] = torch.ones(width)
    renamed["vision_model.vision_tower.attn_pool.norm.bias"] = torch.zeros(width)
    renamed["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1, 1, width)
    renamed["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    return renamed


def tokenizer_json(ids: dict[str, int] | None = None) -> dict:
    """A `tokenizer.json` with special tokens alone, and by default the ids of the small model."""
    own = dict(bos=BOS, eos=EOS, pad=PAD, image=IMAGE, begin_image=BEGIN, end_image=END)
    ids = own if ids is None else ids
    added = [{"id": value, "content": TOKENS[name]} for name, value in ids.items() if name != "bos"]
    return {"model": {"type": "BPE", "vocab": {TOKENS["bos"]: ids.get("bos")}}, "added_tokens": added}


def official(width: int, **language) -> dict:
    """The official `config.json`."""
    mlp = dict(cls="MlpProjector", model_type="aligner")
    aligner = dict(depth=2, input_dim=1024, n_embed=width, projector_type="mlp_gelu")
    head = dict(image_token_embed=width, image_token_size=16384, n_embed=width)
    tower = dict(image_size=384, model_name="siglip_large_patch16_384", select_feature="same", select_layer=-1)
    return dict(
        model_type="multi_modality",
        architectures=["MultiModalityCausalLM"],
        torch_dtype="bfloat16",
        transformers_version="4.33.1",
        aligner_config=dict(mlp, params=aligner),
        gen_aligner_config=dict(mlp, model_type="gen_aligner", params=aligner | dict(input_dim=8)),
        gen_head_config=dict(cls="vision_head", model_type="gen_head", params=head),
        gen_vision_config=dict(cls="VQ-16", model_type="gen_vision", params=dict(image_token_size=16384, n_embed=8)),
        language_config=dict(model_type="llama", max_position_embeddings=16384, torch_dtype="bfloat16", **language),
        vision_config=dict(cls="CLIPVisionTower", model_type="vision", params=tower),
    )


# what stands in the published files; that of the 7B has Llama's defaults for the rest
OFFICIAL_CONFIGS = {
    "janus_pro_1b": official(
        2048,
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=16,
        num_hidden_layers=24,
        num_key_value_heads=16,
        vocab_size=102400,
    ),
    "janus_pro_7b": official(4096, num_hidden_layers=30, vocab_size=102400),
}


def write_tokenizer(folder: pathlib.Path, size: int = WORDS) -> None:
    """A byte-level BPE, trained on a few words; the special tokens come first, with the ids of the small model."""
    tokenizer = Tokenizer(models.BPE())
    # DeepSeek's: lines and words apart, a space goes with the word that follows it
    patterns = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    specials = [TOKENS[name] for name in ("bos", "eos", "pad", "begin_image", "end_image", "image")]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*specials, "<|User|>", "<|Assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "a red cat and a blue dog in the picture , a green cat says what is red"
    tokenizer.train_from_iterator([words] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


# the same sizes for our own modules
_TEXT = TextConfig(
    vocab_size=160,
    width=48,
    layers=2,
    heads=4,
    key_heads=4,
    mlp_width=96,
    rope_theta=1e4,
    mrope_section=(6, 0, 0),
    tied=False,
    qkv_bias=False,
)
CONFIG = ours.JanusConfig(
    text=_TEXT,
    vision=ours.VisionConfig(32, 64, 2, 4, image_size=32, patch_size=8),
    vq=ours.VQConfig(codes=64, latent=16, base=32, multipliers=(1, 1, 2, 2), layers=1, grid=4),
    image_token_id=IMAGE,
    bos_token_id=BOS,
    pad_token_id=PAD,
    stop_token_ids=(EOS,),
)


def small_params() -> dict:
    """Random parameters of `CONFIG`, with activations of a size that rounding does not show in."""
    from small_model import random_params  # which imports all stages

    found = random_params(model.abstract_params(CONFIG), 1)
    found["language"]["embedding"]["table"] *= 8
    found["generation"]["embedding"]["table"] *= 6  # norms of small vectors would amplify rounding
    return jax.tree.map(jnp.asarray, found)


def replaced(params: dict, name: str, leaf) -> dict:
    """The parameters with one leaf changed."""
    part, *path = name.split("/")
    tree = jax.tree.map(lambda x: x, params)
    node = tree[part]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = leaf(node[path[-1]])
    return tree
