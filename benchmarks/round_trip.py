"""A folder of random weights that PyTorch wrote, there and back: checked, run, exported, and opened by PyTorch again.

    python -m benchmarks.round_trip FOLDER [--json=FILE]

FOLDER is an official folder (`llm`, `llm_lora`, `llm_processor`, `SD3`, `dit`, `dit_lora`, `clip`, `dinov2`, `dinov3`)
with `reference.npz`, what PyTorch computed from it in float32, channels first, on the prompts below:

    image [H, W, 3] uint8; pixel_values, image_grid_thw, caption_prompt_ids: what the processor and tokenizer make of it
    caption_logits [1, V] after the prompt; caption_ids [1, N]: N greedy tokens, none of which ends the caption
    condition_ids [1, T]; prompt_embeds, negative_prompt_embeds [1, T, D]; pooled_prompt_embeds [1, D]
    latents_init, velocity_first (guided), latents_final [1, C, h, w]; sigmas [steps + 1]; decoded [1, 3, H, W]
    prompt_embeds_lora, velocity_first_lora: through the adapters, the latter of prompt_embeds without guidance
    encoded_mean: of the image in [-1, 1]; {clip,dinov2,dinov3}_pixels, clip_features, dinov2_cls, dinov3_cls

Exact arrays must be equal, all others agree within 1e-4 of their largest value. Then `convert export` writes both
layouts: the official one must load as the same model bit for bit, the other open in transformers, diffusers and peft
and compute the same arrays. One table; the exit code is 1 if a line of it fails.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import convert
from uae_jax.data import tokenizer as tokens
from uae_jax.data.qwen_inputs import prompt_fields
from uae_jax.diffusion.sampler import sample
from uae_jax.models import uae
from uae_jax.models.encoders import clip, dino
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.sd3 import vae
from uae_jax.rollouts.reconstruction import Denoising, decode, encode_condition, predictor
from uae_jax.stages.weights import ModelConfig, System, load_system

NEGATIVE_PROMPT = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
CAPTION_PROMPT = "Describe this image in detail."
CONDITION = "a small red dog left of a large blue ball on green grass"
GUIDANCE, TOLERANCE = 5.0, 1e-4


class Table:
    """Lines of step, what was compared, and the error; each printed when it is known."""

    def __init__(self):
        self.rows: list[dict] = []
        print(f"{'step':<10} {'what':<52} {'error':>9}  result")

    def add(self, step: str, what: str, good: bool, error: float | None = None) -> None:
        """One line."""
        self.rows.append({"step": step, "what": what, "error": error, "ok": bool(good)})
        print(
            f"{step:<10} {what:<52} {'' if error is None else f'{error:9.1e}':>9}  {'ok' if good else 'DIFFERS'}",
            flush=True,
        )

    def equal(self, step: str, what: str, ours, theirs) -> None:
        """A line that asks for equality."""
        self.add(step, what, np.array_equal(ours, theirs))

    def near(self, step: str, what: str, ours, theirs) -> None:
        """A line that asks for agreement within the tolerance."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        error = (
            float(np.abs(ours - theirs).max() / np.abs(theirs).max()) if ours.shape == theirs.shape else float("inf")
        )
        self.add(step, what, error <= TOLERANCE, error)


def channels_first(x) -> np.ndarray:
    """Ours as PyTorch has it."""
    return np.moveaxis(np.asarray(x), -1, 1)


def channels_last(x) -> np.ndarray:
    """PyTorch's as we have it."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def command(table: Table, *arguments) -> None:
    """One command of `convert`; what it says is printed when it fails."""
    code, said = 0, io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            convert.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
        print(said.getvalue(), code)
    table.add("convert", " ".join(str(argument) for argument in arguments if "/" not in str(argument)), code == 0)


def read(folder: pathlib.Path, size: int) -> System:
    """A folder, without the remark that the release's adapter does not say its scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load_system(ModelConfig(folder=str(folder)), image_size=size, negative_prompt=NEGATIVE_PROMPT)


def check_captions(table: Table, system: System, parts: dict, ref: dict) -> None:
    """Inputs, logits and the greedy caption without adapters."""
    patches, grid = system.processor(ref["image"])
    ids = tokens.caption_prompt_ids(system.tokenizer, CAPTION_PROMPT, [system.processor.image_tokens(grid)])
    table.near("caption", "pixel_values", patches, ref["pixel_values"])
    table.equal("caption", "image_grid_thw", [[1, *grid]], ref["image_grid_thw"])
    table.equal("caption", "caption_prompt_ids", [ids], ref["caption_prompt_ids"])
    row = prompt_fields(
        ids,
        [(patches, grid)],
        system.processor,
        tokens.token_id(system.tokenizer, tokens.IMAGE_PAD),
        len(patches) + 8,
        len(ids) + 5,
    )
    config, (base, _) = system.model.captioner, uae.captioner_weights(parts, policy=False)

    @jax.jit
    def caption(params, batch):
        prefix = qwen.prompt_prefix(config, params, None, batch)
        greedy = generate(
            config,
            params,
            None,
            prefix,
            jax.random.split(jax.random.key(0), 1),
            max_new_tokens=ref["caption_ids"].shape[1],
            stop_ids=(),
            sampling=SamplingConfig(0.0),
        )
        return lm.logits(config, params, prefix.last_hidden), greedy.tokens

    logits, caption_ids = caption(base, {name: value[None] for name, value in row.items()})
    table.near("caption", "caption_logits", logits, ref["caption_logits"])
    table.equal("caption", "caption_ids, greedy", caption_ids, ref["caption_ids"])


def check_conditions(table: Table, system: System, parts: dict, ref: dict) -> None:
    """Embeddings of the prompts, without and with the adapter."""
    config, template = system.model.captioner, system.model.template
    text = [*template.prefix, *tokens.encode_caption(system.tokenizer, CONDITION)[:-1], *template.suffix]
    negative = [*template.prefix, *template.negative, *template.suffix]
    table.equal("condition", "condition_ids", [text], ref["condition_ids"])
    for name, ids, policy in (
        ("prompt_embeds", text, False),
        ("negative_prompt_embeds", negative, False),
        ("prompt_embeds_lora", text, True),
    ):
        params, adapter = uae.captioner_weights(parts, policy=policy)
        states = lm.text_hidden_states(config, params, adapter, jnp.asarray([ids]), jnp.ones((1, len(ids)), bool))
        table.near("condition", name, qwen.project(parts["projector"], states), ref[name])
    table.near("condition", "pooled_prompt_embeds", parts["pooled"][None], ref["pooled_prompt_embeds"])


def check_pictures(table: Table, system: System, parts: dict, ref: dict) -> None:
    """Guided sampling from the caption's text to the picture, and the adapted transformer."""
    model, steps = system.model, len(ref["sigmas"]) - 1
    sigmas = system.schedule.sigmas(steps)
    table.near("picture", "sigmas", sigmas, ref["sigmas"])
    how = Denoising(tuple(map(float, sigmas)), GUIDANCE)
    ids = tokens.encode_caption(system.tokenizer, CONDITION)[:-1]
    predict = predictor(
        model, parts, how, *encode_condition(model, parts, how, jnp.asarray([ids]), jnp.array([len(ids)])), policy=False
    )
    start = channels_last(ref["latents_init"])
    final = jax.jit(lambda x: sample(predict, x, jnp.asarray(sigmas)))(start)
    table.near(
        "picture", "velocity_first, guided", channels_first(jax.jit(predict)(start, sigmas[0])), ref["velocity_first"]
    )
    table.near("picture", f"latents_final, {steps} steps", channels_first(final), ref["latents_final"])
    table.near(
        "picture", "decoded", channels_first(jax.jit(lambda x: decode(model, parts, how, x))(final)), ref["decoded"]
    )
    table.near(
        "picture", "velocity_first_lora", our_velocity(system, parts, ref, policy=True), ref["velocity_first_lora"]
    )
    pixels = np.float32(ref["image"][None] / 127.5 - 1)
    mean = jax.jit(lambda pixels: vae.encode(model.vae, parts["vae"], pixels)[0])(pixels)
    table.near("picture", "encoded_mean", channels_first(mean), ref["encoded_mean"])


def check_encoders(table: Table, system: System, parts: dict, ref: dict) -> None:
    """Image features of the reward and the scores."""
    for name, array, features in (
        ("clip", "clip_features", clip.image_features),
        ("dinov2", "dinov2_cls", dino.cls_features),
        ("dinov3", "dinov3_cls", dino.cls_features),
    ):
        pixels = channels_last(ref[f"{name}_pixels"])
        table.near(
            "encoder", array, features(system.encoders[name].config, parts["encoders"][name], pixels), ref[array]
        )


def our_velocity(system: System, parts: dict, ref: dict, *, policy: bool) -> np.ndarray:
    """Of the first latents and the stored prompt, without guidance."""
    context = ref["prompt_embeds"]
    velocity = jax.jit(
        lambda x: uae.velocity(
            system.model, parts, x, jnp.ones(1), (context, jnp.ones(context.shape[:2], bool)), policy=policy
        )
    )(channels_last(ref["latents_init"]))
    return channels_first(velocity)


def check_torch_captioner(table: Table, hub: pathlib.Path, ref: dict) -> None:
    """transformers and peft on the exported captioner: logits of the picture, and the condition through projector and
    adapter.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import Qwen2_5_VLForConditionalGeneration

    llm = Qwen2_5_VLForConditionalGeneration.from_pretrained(hub / "llm").float().eval()
    ids = torch.tensor(ref["caption_prompt_ids"])
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(ref["pixel_values"]),
        image_grid_thw=torch.tensor(ref["image_grid_thw"]),
        mm_token_type_ids=(ids == llm.config.image_token_id).int(),
    )
    weights = load_file(hub / "projector" / "model.safetensors")

    def condition(model) -> torch.Tensor:
        text = torch.tensor(ref["condition_ids"])
        states = model(input_ids=text, attention_mask=torch.ones_like(text), output_hidden_states=True).hidden_states[
            -1
        ]
        inner = torch.nn.functional.gelu(states @ weights["projector.0.weight"].T + weights["projector.0.bias"])
        return inner @ weights["projector.2.weight"].T + weights["projector.2.bias"]

    with torch.no_grad():
        table.near("reopened", "transformers: caption_logits", llm(**batch).logits[:, -1], ref["caption_logits"])
        table.near("reopened", "transformers: prompt_embeds", condition(llm), ref["prompt_embeds"])
        table.near(
            "reopened",
            "peft: prompt_embeds_lora",
            condition(PeftModel.from_pretrained(llm, hub / "llm_lora").eval()),
            ref["prompt_embeds_lora"],
        )


def check_torch_decoder(table: Table, hub: pathlib.Path, ref: dict, plain: np.ndarray) -> None:
    """diffusers and peft on the exported transformer and auto-encoder."""
    import torch
    from diffusers import StableDiffusion3Pipeline
    from peft import PeftModel

    absent = [
        name
        for name in ("text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        if not (hub / "SD3" / name).is_dir()
    ]
    pipeline = StableDiffusion3Pipeline.from_pretrained(hub / "SD3", **dict.fromkeys(absent))
    inputs = dict(
        hidden_states=torch.tensor(ref["latents_init"]),
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=torch.tensor(ref["prompt_embeds"]),
        pooled_projections=torch.tensor(ref["pooled_prompt_embeds"]),
        return_dict=False,
    )
    config = pipeline.vae.config
    latents = torch.tensor(ref["latents_final"]) / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        table.near("reopened", "diffusers: velocity, ours without adapters", plain, pipeline.transformer(**inputs)[0])
        table.near("reopened", "diffusers: decoded", pipeline.vae.decode(latents, return_dict=False)[0], ref["decoded"])
        adapted = PeftModel.from_pretrained(pipeline.transformer, hub / "dit_lora").eval()
        table.near("reopened", "peft: velocity_first_lora", adapted(**inputs)[0], ref["velocity_first_lora"])


def check_torch_encoders(table: Table, hub: pathlib.Path, ref: dict) -> None:
    """transformers on the exported image encoders."""
    import torch
    from transformers import AutoModel

    def features(name: str) -> torch.Tensor:
        model, pixels = AutoModel.from_pretrained(hub / name).float().eval(), torch.tensor(ref[f"{name}_pixels"])
        if name != "clip":
            return model(pixel_values=pixels).last_hidden_state[:, 0]
        found = model.get_image_features(pixel_values=pixels)
        return found if torch.is_tensor(found) else found.pooler_output

    with torch.no_grad():
        for name, array in (("clip", "clip_features"), ("dinov2", "dinov2_cls"), ("dinov3", "dinov3_cls")):
            table.near("reopened", f"transformers: {array}", features(name), ref[array])


def round_trip(folder: pathlib.Path, out: pathlib.Path) -> list[dict]:
    """All steps; exports go to `out`. Returns the lines of the table."""
    ref, table = dict(np.load(folder / "reference.npz")), Table()
    command(table, "check", folder)
    size = ref["decoded"].shape[-1]
    system = read(folder, size)
    parts = jax.tree.map(jnp.asarray, system.parts)
    checks: tuple[Callable, ...] = (check_captions, check_conditions, check_pictures, check_encoders)
    for check in checks:
        check(table, system, parts, ref)
    for layout in ("official", "hub"):
        command(table, "export", folder, out / layout, "--layout", layout)
    command(table, "check", out / "official")
    again = read(out / "official", size)
    same = jax.tree.map(np.array_equal, again.parts, system.parts)
    table.add(
        "official", "loads as the same model, bit for bit", again.model == system.model and all(jax.tree.leaves(same))
    )
    check_torch_captioner(table, out / "hub", ref)
    check_torch_decoder(table, out / "hub", ref, our_velocity(system, parts, ref, policy=False))
    check_torch_encoders(table, out / "hub", ref)
    return table.rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a line of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as out, jax.default_matmul_precision("highest"):
        rows = round_trip(options.folder, pathlib.Path(out))
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    failed = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} lines hold")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
