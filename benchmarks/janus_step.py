"""A step of `unified_ar` of this package beside the same step by transformers and peft, on the same random Janus.

    python -m benchmarks.janus_step [--size=mini] [--repeats=3] [--images=2 --group=4 --drawings=3] [--json=FILE]

Before anything is timed, both sides are compared: greedy captions, greedy drawings, and of one rollout the losses and
gradient norms of both streams. The sides then work in turns, each in a process of its own: whole steps, then the pieces
of a step. Seconds are medians; `first` holds the compilation of ours. Our whole step is one compiled program.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.janus_settings import SIZES, Settings, Size, Words
from benchmarks.measure import memory, time_call
from uae_jax.files.json_files import write_json
from uae_jax.hf.safetensors import write_tensors
from uae_jax.methods.method import build_step, gradients_of, start_of, with_own_advantages
from uae_jax.methods.stage_settings import SamplerConfig
from uae_jax.methods.trained import trainable
from uae_jax.methods.unified_ar import UnifiedAr, UnifiedArConfig
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.janus import weights
from uae_jax.models.janus.unified import Unified
from uae_jax.models.language.model import ADAPTER_PATTERN
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.lora import init_lora
from uae_jax.rollouts import unified
from uae_jax.settings import frozen
from uae_jax.training.optimizer import make_optimizer

BOS, EOS, PAD, BEGIN, END, IMAGE, FIRST = range(7)
KEY = jax.random.key(0)
TOLERANCE = 2e-3  # of losses and gradient norms, relative


def write_model(folder: pathlib.Path, size: Size, rank: int) -> None:
    """A random model of transformers with an adapter that is not zero."""
    import torch
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    torch.manual_seed(0)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=11 * size.width // 4,
            num_hidden_layers=size.layers,
            num_attention_heads=max(4, size.width // 64),
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=size.tower,
            num_hidden_layers=size.tower_layers,
            num_attention_heads=4,
            image_size=size.side,
            patch_size=size.patch,
            mlp_ratio=4,
            projection_dim=size.width,
            num_image_tokens=(size.side // size.patch) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=size.codes,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=list(size.multipliers),
            num_res_blocks=1,
            projection_dim=size.width,
            image_token_embed_dim=size.width,
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    JanusForConditionalGeneration(config).float().save_pretrained(folder)
    network, parts = weights.load(folder)
    zero = init_lora(KEY, parts["language"], ADAPTER_PATTERN, rank)
    moved = jax.tree.map(lambda leaf: leaf + 0.002 * jax.random.normal(KEY, leaf.shape), zero)
    write_tensors(folder / "llm_lora", weights.adapter_tensors(network, moved), stem="adapter_model")
    write_json(folder / "llm_lora" / "adapter_config.json", weights.adapter_config(network, moved))


def words_of(size: Size) -> Words:
    """Prompts of random words around an image, and around a caption."""
    rng = np.random.default_rng(1)
    asked, turns = (tuple(map(int, rng.integers(FIRST, size.vocabulary, count))) for count in (24, 6))
    image = (BEGIN, *(IMAGE,) * (size.side // size.patch) ** 2, END)
    question = (BOS, *asked[:8], *image, *asked[8:])
    return Words(question, (BOS, *turns[:3]), (*turns[3:], BEGIN), BEGIN, EOS, PAD)


def images_of(size: Size, count: int) -> np.ndarray:
    """Coarse noise, uint8 `[count, S, S, 3]`."""
    small = np.random.default_rng(2).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return small.repeat(size.side // 8, 1).repeat(size.side // 8, 2)


class JaxSide:
    """The step of this package, and its pieces compiled apart; see `janus_torch.TorchSide` for the arguments."""

    def __init__(self, folder: pathlib.Path, settings: Settings, words: Words, images: np.ndarray):
        network, parts = weights.load(folder)
        network, adapter = weights.load_adapter(folder / "llm_lora", network)
        template = ConditionTemplate(words.before, words.after, (), PAD)
        system = types.SimpleNamespace(model=Unified(network, template), encoders={}, stops=(EOS,), scorer=None)
        self.own = UnifiedAr(frozen(UnifiedArConfig, self.values(settings)), SamplerConfig(), system)
        parts = jax.tree.map(jnp.asarray, {**parts, "language_lora": adapter, "encoders": {}})
        self.params = trainable(
            self.own.system.model, parts, self.own.trains(self.own.settings), settings.lora_rank, KEY
        )
        self.rest = {name: part for name, part in parts.items() if name not in self.params}
        ids = np.tile(np.array(words.question, np.int32), (settings.images, 1))
        self.batch = dict(sample_id=np.arange(settings.images), pixels=images, prompt_ids=ids)
        self.batch |= dict(prompt_mask=np.ones(ids.shape, bool))
        self.settings, self.network = settings, network

    @staticmethod
    def values(settings: Settings) -> dict:
        """The method's settings."""
        return dict(
            batch_size=settings.images,
            group_size=settings.group,
            images_per_caption=settings.drawings,
            max_new_tokens=settings.tokens,
            guidance_scale=settings.guidance,
            caption=dict(kl_weight=settings.kl_weight),
            image=dict(kl_weight=settings.kl_weight),
            reward=dict(names=(), weights=(), pixel_weight=1.0),
            optimizer=dict(
                learning_rate=settings.learning_rate,
                warmup_steps=0,
                schedule="constant",
                weight_decay=0.0,
                max_grad_norm=0.0,
            ),
        )

    def step(self) -> Callable[[], None]:
        """The whole step, one compiled program."""
        optimizer = make_optimizer(self.own.settings.optimizer, 1000)
        step, held = build_step(self.own, optimizer), [start_of(self.params, optimizer, self.own.settings)]

        def call() -> None:
            held[0], metrics = step(held[0], self.rest, self.batch, KEY)
            jax.block_until_ready((held[0], metrics))

        return call

    def rollout(self) -> dict:
        """Samples with their rewards and what they are compared with."""

        @jax.jit
        def made(params: dict, rest: dict, batch: dict) -> dict:
            seen = {**batch, "pixels": batch["pixels"] / jnp.float32(127.5) - 1}
            return self.own.rollout(params, rest, seen, KEY)

        return made(self.params, self.rest, self.batch)

    def gradients(self, rollout: dict) -> dict[str, float]:
        """Loss and gradient norm of each stream of a rollout."""
        made = with_own_advantages(rollout, self.own.advantages)
        pieces, found = {"samples": made["samples"], "shared": {}, "update": 0}, {}
        for name, (_, loss) in self.own.streams.items():
            gradients, value, _ = jax.jit(lambda p, loss=loss: gradients_of(loss, p, self.rest, pieces, KEY, 1))(
                self.params
            )
            norm = optax.tree.norm(gradients)
            found |= {f"{name}_loss": float(value), f"{name}_grad_norm": float(norm)}
        return found

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        """Greedy captions `[B, T]`, and greedy drawings of them `[B, C]`."""
        how = unified.DrawingConfig(self.settings.guidance, SamplingConfig(0.0))

        @jax.jit
        def made(parts: dict, batch: dict) -> tuple:
            seen = {**batch, "pixels": batch["pixels"] / jnp.float32(127.5) - 1}
            said = unified.sample_captions(
                self.network, parts, seen, KEY, max_new_tokens=self.settings.tokens, sampling=SamplingConfig(0.0)
            )
            lengths = said.mask.sum(-1) - said.finished
            ids, mask = self.own.system.model.drawing_prompts(said.tokens, lengths)
            drawn = unified.sample_drawings(self.network, parts, how, ids, mask, batch["sample_id"], KEY)
            return said.tokens, drawn.tokens

        said, drawn = made({**self.rest, **self.params}, self.batch)
        return np.asarray(said), np.asarray(drawn)

    def phases(self) -> dict[str, Callable[[], object]]:
        """The pieces of the step, each compiled apart."""
        own, settings = self.own, self.settings
        samples = self.rollout()["samples"]
        seen = {**self.batch, "pixels": self.batch["pixels"] / np.float32(127.5) - 1}
        ids, mask = (samples[name].reshape(-1, samples[name].shape[-1]) for name in ("drawing_ids", "drawing_mask"))
        drawn = samples["image_tokens"].reshape(-1, samples["image_tokens"].shape[-1])
        made = with_own_advantages({"samples": samples, "metrics": {}}, own.advantages)["samples"]
        pieces = {"samples": made, "shared": {}, "update": 0}
        parts = {**self.rest, **self.params}

        def score(parts: dict) -> tuple:
            plain = own.score_captions(parts, samples, trained=False), own.score_images(parts, samples, trained=False)
            return tuple(found.log_probs for found in plain)

        def update(params: dict) -> list:
            return [gradients_of(loss, params, self.rest, pieces, KEY, 1)[0] for _, loss in own.streams.values()]

        def reward(parts: dict) -> jax.Array:
            finished = types.SimpleNamespace(finished=jnp.ones(settings.images * settings.group, bool))
            return own.rewards(parts, seen["pixels"], drawn, finished)[0]

        calls = {
            "captions": (lambda parts: own.write_captions(parts, seen, None, KEY), parts),
            "drawings": (lambda parts: own.draw(parts, ids, mask, seen["sample_id"], KEY), parts),
            "reward": (reward, parts),
            "reference": (score, parts),
            "update": (update, self.params),
        }
        return {name: functools.partial(_ready, jax.jit(call), given) for name, (call, given) in calls.items()}


def _ready(call: Callable, *arguments: object) -> object:
    return jax.block_until_ready(call(*arguments))


def open_torch(folder: pathlib.Path, size: Size, settings: Settings):
    """`janus_torch.TorchSide` on the model."""
    from benchmarks.janus_torch import TorchSide

    pixels = images_of(size, settings.images).astype(np.float32) / np.float32(127.5) - 1
    return TorchSide(folder, settings, words_of(size), pixels)


def open_jax(folder: pathlib.Path, size: Size, settings: Settings) -> JaxSide:
    """`JaxSide` on the model."""
    return JaxSide(folder, settings, words_of(size), images_of(size, settings.images))


def compare(folder: pathlib.Path, size: Size, settings: Settings) -> dict[str, float]:
    """Greedy tokens that differ, and relative differences of losses and gradient norms of one rollout.

    Raises:
      ValueError: the sides do not compute the same.
    """
    import torch

    ours, theirs = open_jax(folder, size, settings), open_torch(folder, size, settings)
    said, drawn = ours.greedy()
    captions = theirs.captions(greedy=True)
    found = {"greedy captions": float((captions.numpy() != said).sum())}
    found["greedy drawings"] = float((theirs.drawings(torch.tensor(said), greedy=True).numpy() != drawn).sum())
    rollout = ours.rollout()
    # the drawings of a random model are alike: rewards of its own would have no spread to compare by
    spread = np.random.default_rng(0).uniform(size=np.shape(rollout["samples"]["reward"])).astype(np.float32)
    rollout = {**rollout, "samples": {**rollout["samples"], "reward": spread}}
    tokens, images, rewards = (np.array(rollout["samples"][name]) for name in ("tokens", "image_tokens", "reward"))
    given = torch.tensor(tokens).flatten(0, 1).long(), torch.tensor(images).flatten(0, 2).long(), torch.tensor(rewards)
    both = ours.gradients(rollout), theirs.gradients(*given)
    norms = {name: value for name, value in both[1].items() if name.endswith("norm")}
    for name, value in both[1].items():
        # the losses are near 0, where a rollout's advantages sum to 0: their scale is that of the gradient
        scale = max(abs(value), 1e-3 if name in norms else 1.0)
        found[name] = abs(both[0][name] - value) / scale
    wrong = [name for name, gap in found.items() if gap > (0 if name.startswith("greedy") else TOLERANCE)]
    if wrong:
        raise ValueError(f"the sides differ in {', '.join(f'{name} ({found[name]:.2g})' for name in wrong)}")
    return found


def measured(side: str, folder: pathlib.Path, size: Size, settings: Settings, repeats: int) -> dict:
    """Seconds of the whole step and of its pieces, and the memory that the process needed."""
    before = memory("VmRSS")
    one = open_jax(folder, size, settings) if side == "jax" else open_torch(folder, size, settings)
    total = time_call(one.step() if side == "jax" else one.step, repeats)
    peak = memory("VmHWM") - before
    return {"total": total, "peak_bytes": peak} | {n: time_call(call, repeats) for n, call in one.phases().items()}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.janus_step", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    size = SIZES[options.size]
    if options.work:
        side, _, folder = options.work.partition(":")
        print(json.dumps(measured(side, pathlib.Path(folder), size, settings, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_model(folder, size, settings.lora_rank)
        gaps = compare(folder, size, settings)
        print(", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()), file=sys.stderr)
        given = [f"--{field.name}={getattr(settings, field.name)}" for field in dataclasses.fields(Settings)]
        command = [
            sys.executable,
            "-m",
            "benchmarks.janus_step",
            f"--size={options.size}",
            f"--repeats={options.repeats}",
        ]
        rows = {}
        for side in ("jax", "torch"):
            done = subprocess.run([*command, *given, f"--work={side}:{folder}"], check=True, stdout=subprocess.PIPE)
            rows[side] = json.loads(done.stdout.splitlines()[-1])
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"gaps": gaps, **rows}))


def table(rows: dict[str, dict]) -> str:
    """Seconds by piece, of both sides, and how many times as fast this package is."""
    lines = ["| piece | jax s | torch s | times |", "|---|---|---|---|"]
    for name in ("captions", "drawings", "reward", "reference", "update", "total"):
        ours, theirs = (rows[side][name]["seconds"] for side in ("jax", "torch"))
        lines.append(f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} |")
    peaks = [f"{rows[side]['peak_bytes'] / 2**30:.2f} GiB ({side})" for side in ("jax", "torch")]
    return "\n".join(
        [*lines, f"memory of a step: {', '.join(peaks)}; first call of ours {rows['jax']['total']['first']:.1f} s"]
    )


if __name__ == "__main__":
    main()
