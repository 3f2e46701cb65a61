"""Parity with the libraries of the official release's time: a small model made by them, read and computed here.

The release was saved with transformers 4.50, whose classes, names and configs differ from today's. Its libraries need
an environment of their own, which writes the model and what it computes; this package's environment reads and compares:

    python3.11 -m venv official
    official/bin/pip install torch==2.13.0 transformers==4.50.0 'peft==0.17.*' 'diffusers==0.35.*' safetensors
    official/bin/python benchmarks/official_versions.py write OUT
    python benchmarks/official_versions.py check OUT

`check` prints the relative error of each array and fails above 1e-4. Any other version can be in the place of 4.50.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

TOLERANCE = 1e-4
IMAGE, START, END, PAD = 290, 286, 287, 283
GRID, RANK = (6, 10), 4
ATTENTION = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]


def build():
    """Captioner with projector, and transformer, in the published (flat) form of the configs."""
    import torch
    from diffusers import SD3Transformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    llm = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vocab_size=300,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=512,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=True,
            bos_token_id=PAD,
            eos_token_id=285,
            rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
            image_token_id=IMAGE,
            video_token_id=291,
            vision_start_token_id=START,
            vision_end_token_id=END,
            vision_config=dict(
                depth=3,
                hidden_size=32,
                num_heads=2,
                intermediate_size=48,
                out_hidden_size=64,
                fullatt_block_indexes=[1],
                window_size=16,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
                in_chans=3,
                tokens_per_second=2,
            ),
        )
    )
    llm.projector = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))
    dit = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for module in (llm, dit):
            for parameter in module.float().eval().parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return llm, dit


def captioner_arrays(llm, arrays: dict, suffix: str) -> dict:
    """Logits after a prompt with an image, and the projected states of text."""
    import torch

    ids, text = torch.tensor(arrays["prompt_ids"]), torch.tensor(arrays["text_ids"])
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(arrays["pixel_values"]),
        image_grid_thw=torch.tensor([[1, *GRID]]),
    )
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    with torch.no_grad():
        states = llm(input_ids=text, attention_mask=torch.ones_like(text), output_hidden_states=True).hidden_states[-1]
        return {
            f"logits{suffix}": llm(**batch).logits[:, -1].numpy(),
            f"prompt_embeds{suffix}": llm.projector(states).numpy(),
        }


def velocity_array(dit, arrays: dict) -> np.ndarray:
    """The velocity of the latents, channels last."""
    import torch

    latents, timestep, context, pooled = (
        torch.tensor(arrays[name]) for name in ("latents", "timestep", "context", "pooled")
    )
    with torch.no_grad():
        velocity = dit(
            hidden_states=latents.permute(0, 3, 1, 2),
            timestep=timestep,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    return velocity.permute(0, 2, 3, 1).numpy()


def inputs() -> dict:
    """Random inputs of both models."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    words = rng.integers(0, 280, 20)
    ids = [*words[:5], START, *[IMAGE] * (GRID[0] * GRID[1] // 4), END, *words[5:9]]
    return {
        "prompt_ids": np.array([ids]),
        "text_ids": words[None, 9:],
        "pixel_values": normal(GRID[0] * GRID[1], 3 * 2 * 4 * 4),
        "latents": normal(2, 4, 6, 4),
        "timestep": np.array([900.0, 20.0], np.float32),
        "context": normal(2, 5, 24),
        "pooled": normal(2, 10),
    }


def write_captioner(out: pathlib.Path, llm, arrays: dict) -> None:
    """`llm`, and `llm_lora` as the release has it: the whole state after peft wrapped the text model, in three
    shards.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    arrays.update(captioner_arrays(llm, arrays, ""))
    llm.save_pretrained(out / "llm")
    torch.manual_seed(1)
    nested = hasattr(llm.model, "language_model")
    owner, name = (llm.model, "language_model") if nested else (llm, "model")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    setattr(owner, name, get_peft_model(getattr(owner, name), config).eval())
    getattr(owner, name).save_pretrained(out / "llm_peft")
    state = {key: value.clone().contiguous() for key, value in llm.state_dict().items()}
    (out / "llm_lora").mkdir()
    for shard in range(3):
        part = {key: state[key] for key in sorted(state)[shard::3]}
        save_file(part, out / "llm_lora" / f"model-{shard + 1:05d}-of-00003.safetensors", metadata=dict(format="pt"))
    arrays.update(captioner_arrays(llm, arrays, "_lora"))


def write_transformer(out: pathlib.Path, dit, arrays: dict) -> None:
    """`dit`, and its adapter as a peft folder and as the file of a diffusers pipeline."""
    import torch
    from diffusers.loaders import SD3LoraLoaderMixin
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    arrays["velocity"] = velocity_array(dit, arrays)
    dit.save_pretrained(out / "dit")
    torch.manual_seed(2)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION, init_lora_weights=False)
    wrapped = get_peft_model(dit, config).eval()
    wrapped.save_pretrained(out / "dit_lora")
    layers = {
        name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(wrapped).items()
    }
    SD3LoraLoaderMixin.save_lora_weights(
        out / "dit_diffusers", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    arrays["velocity_lora"] = velocity_array(wrapped, arrays)


def write(out: pathlib.Path) -> None:
    """Writes the folders, `arrays.npz` and `versions.json`; needs torch, transformers, diffusers, peft."""
    import diffusers
    import peft
    import torch
    import transformers

    out.mkdir(parents=True)
    llm, dit = build()
    arrays = inputs()
    write_captioner(out, llm, arrays)
    write_transformer(out, dit, arrays)
    np.savez(out / "arrays.npz", **arrays)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, diffusers)}
    (out / "versions.json").write_text(json.dumps(versions))
    print(versions)


def our_captioner(path: pathlib.Path, arrays: dict, suffix: str) -> dict[str, np.ndarray]:
    """What this package computes from the captioner's folders."""
    import jax.numpy as jnp

    from uae_jax.data.qwen_inputs import ImageProcessor, prompt_fields
    from uae_jax.models.language import model as lm
    from uae_jax.models.qwen2_5_vl import config as configs
    from uae_jax.models.qwen2_5_vl import model, weights

    config = configs.from_folder(path / "llm")
    _, params = weights.load(path / ("llm_lora" if suffix else "llm"), config)
    adapter = None
    if suffix:
        config, adapter = weights.load_adapter(path / "llm_lora", config)
        again, same = weights.load_adapter(path / "llm_peft", config)
        assert again == config and all(map(np.array_equal, leaves(adapter), leaves(same)))
    processor = ImageProcessor(window_size=16, patch_size=4)
    ids = arrays["prompt_ids"][0]
    row = prompt_fields(ids, [(arrays["pixel_values"], GRID)], processor, IMAGE, GRID[0] * GRID[1] + 4, len(ids) + 3)
    batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
    last = model.prompt_prefix(config, params, adapter, batch).last_hidden
    text = jnp.asarray(arrays["text_ids"])
    states = lm.text_hidden_states(config, params, adapter, text, jnp.ones(text.shape, bool))
    return {
        f"logits{suffix}": lm.logits(config, params, last),
        f"prompt_embeds{suffix}": model.project(params["projector"], states),
    }


def leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


def our_transformer(path: pathlib.Path, arrays: dict) -> dict[str, np.ndarray]:
    """What this package computes from the transformer's folders."""
    from uae_jax.models.sd3 import weights
    from uae_jax.models.sd3.transformer import Transformer

    config, params = weights.load_transformer(path / "dit")
    values = [arrays[name] for name in ("latents", "timestep", "context", "pooled")]
    found = {"velocity": Transformer(config).apply({"params": params}, *values)}
    for folder in ("dit_lora", "dit_diffusers"):
        adapted, adapter = weights.load_adapter(path / folder, config)
        found[f"velocity_lora {folder}"] = Transformer(adapted).apply({"params": params, "lora": adapter}, *values)
    return found


def check(out: pathlib.Path) -> bool:
    """Prints each array's error relative to its largest value; True if all are within `TOLERANCE`."""
    import jax

    arrays, good = dict(np.load(out / "arrays.npz")), True
    print("written by", json.loads((out / "versions.json").read_text()))
    with jax.default_matmul_precision("highest"):
        ours = our_captioner(out, arrays, "") | our_captioner(out, arrays, "_lora") | our_transformer(out, arrays)
    for name, value in ours.items():
        theirs = arrays[name.split()[0]]
        error = float(np.abs(np.asarray(value) - theirs).max() / np.abs(theirs).max())
        good &= error <= TOLERANCE
        print(f"{name:28s} {error:.1e} {'' if error <= TOLERANCE else 'DIFFERS'}")
    changed = {
        name: float(np.abs(arrays[f"{name}_lora"] - arrays[name]).max())
        for name in ("logits", "prompt_embeds", "velocity")
    }
    print("largest change by the adapters:", {name: round(value, 3) for name, value in changed.items()})
    return good and min(changed.values()) > 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("write", "check"))
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()
    if args.mode == "write":
        write(args.out)
    elif not check(args.out):
        sys.exit("the arrays differ")


if __name__ == "__main__":
    main()
