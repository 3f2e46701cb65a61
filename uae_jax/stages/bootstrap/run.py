"""Makes the built-in tiny model from nothing, phase by phase, in the official folder layout.

Each phase is a jitted train step of its own under the same loop as the stages of the method, and continues where it
stopped. What a phase makes is written to `workdir/model/...` before the next one starts; finished phases are read back.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.data.scene_captions import WORDS
from uae_jax.data.tokenizer import load_tokenizer, token_id, write_scene_tokenizer
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import write_tensors
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess, clip_preprocessor
from uae_jax.models.encoders.weights import dinov2_rules, save_clip
from uae_jax.models.sd3 import vae as sd3_vae
from uae_jax.models.sd3.config import VAEConfig
from uae_jax.models.sd3.weights import vae_rules
from uae_jax.stages.bootstrap import encoders, vae
from uae_jax.stages.settings import frozen
from uae_jax.training.loop import LoopConfig, run_stage
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.optimizer import OptimizerConfig, make_optimizer
from uae_jax.training.step import Algorithm, TrainState, init_state, make_train_step

# half precision keeps the built-in model under 12 MB and rounds weights by one part in 2,000
STORED = np.float16


@dataclasses.dataclass(frozen=True)
class Run:
    """What the phases share: the config, where files go, the writer, the root key and the tokenizer."""

    config: Any
    workdir: pathlib.Path
    writer: MetricWriter
    key: jax.Array
    tokenizer: Any

    @property
    def model(self) -> pathlib.Path:
        """The folder that becomes the built-in model."""
        return self.workdir / "model"

    def pad(self) -> int:
        """Id that fills rows."""
        return token_id(self.tokenizer, "<|endoftext|>")


def train(
    run: Run, name: str, algorithm: Algorithm, params: dict, frozen_params: dict, data: Any, *, steps: int,
    ema_decay: float | None = None) -> TrainState:
    """Trains one phase to its end and returns its state; continues from its newest checkpoint."""
    phase = run.config[name]
    optimizer = make_optimizer(frozen(OptimizerConfig, phase.optimizer, f"config.{name}.optimizer"), steps)
    step = jax.jit(make_train_step(algorithm, optimizer, ema_decay=ema_decay), donate_argnames="state")
    loop = LoopConfig(steps=steps, log_every=run.config.log_every, save_every=run.config.save_every, headline="accuracy")
    result = run_stage(
        f"bootstrap_{name}", step, state=init_state(params, optimizer, ema=ema_decay is not None), frozen=frozen_params,
        data=data, key=jax.random.fold_in(run.key, 1), workdir=run.workdir, config=loop, writer=run.writer)
    return result.state


def write_json(folder: pathlib.Path, name: str, content: dict) -> None:
    """A readable JSON file in a folder that is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def vae_phase(run: Run) -> None:
    """Writes `SD3/vae`."""
    phase, side = run.config.vae, run.config.side
    model = frozen(VAEConfig, phase.model, "config.vae.model")
    data = vae.stream(seed=run.config.seed, batch_size=phase.batch_size, side=side)
    params = sd3_vae.init_params(model, jax.random.fold_in(run.key, 10))
    state = train(run, "vae", vae.algorithm(model), params, {}, data, steps=phase.steps)
    sample = next(vae.stream(seed=run.config.seed + 1, batch_size=512, side=side))["pixels"]
    model = vae.fit_latent_scale(model, state.params, jnp.asarray(sample))
    folder = run.model / "SD3" / "vae"
    write_tensors(folder, published_tensors(state.params, vae_rules(model), STORED), stem="diffusion_pytorch_model")
    write_json(folder, "config.json", model.published())


def clip_phase(run: Run) -> None:
    """Writes `clip` (the reward encoder)."""
    phase, side = run.config.clip, run.config.side
    end = token_id(run.tokenizer, "<|im_end|>")
    text = CLIPTextConfig(**phase.text, vocab_size=len(run.tokenizer), eos_token_id=end, bos_token_id=run.pad(), pad_token_id=run.pad())
    model = CLIPConfig(CLIPVisionConfig(**phase.vision), text)
    preprocess = Preprocess.from_dict(clip_preprocessor(side))
    data = encoders.clip_stream(
        run.tokenizer, seed=run.config.seed, batch_size=phase.batch_size, side=side, length=text.max_position_embeddings, pad=run.pad())
    params = clip.init_params(model, jax.random.fold_in(run.key, 20))
    state = train(run, "clip", encoders.clip_algorithm(model, preprocess), params, {}, data, steps=phase.steps)
    folder = run.model / "clip"
    save_clip(folder, model, jax.tree.map(lambda leaf: np.asarray(leaf, STORED), state.params))
    write_json(folder, "preprocessor_config.json", clip_preprocessor(side))


def dinov2_phase(run: Run) -> None:
    """Writes `dinov2` (the held-out encoder)."""
    phase, side = run.config.dinov2, run.config.side
    model = Dinov2Config(**phase.model)
    processor = clip_preprocessor(side) | {"image_processor_type": "BitImageProcessor"}
    data = encoders.dino_stream(seed=run.config.seed, batch_size=phase.batch_size, side=side)
    params = encoders.init_dino(model, jax.random.fold_in(run.key, 30))
    algorithm = encoders.dino_algorithm(model, Preprocess.from_dict(processor))
    state = train(run, "dinov2", algorithm, params, {}, data, steps=phase.steps)
    folder = run.model / "dinov2"
    write_tensors(folder, published_tensors(state.params["encoder"], dinov2_rules(model), STORED))
    write_json(folder, "config.json", {"model_type": "dinov2", "architectures": ["Dinov2Model"], **dataclasses.asdict(model)})
    write_json(folder, "preprocessor_config.json", processor)


PHASES: dict[str, tuple[str, Callable[[Run], None]]] = {
    "vae": ("SD3/vae/config.json", vae_phase),
    "clip": ("clip/preprocessor_config.json", clip_phase),
    "dinov2": ("dinov2/preprocessor_config.json", dinov2_phase),
}


def bootstrap(config: Any, workdir: pathlib.Path) -> pathlib.Path:
    """Runs the phases named in the config that are not finished yet.

    Args:
      config: of `configs/bootstrap.py`.
      workdir: checkpoints, metrics and `model/`.

    Returns:
      The model's folder.
    """
    model = workdir / "model"
    write_scene_tokenizer(model / "llm_processor", WORDS, patch_size=config.captioner.vision.patch_size)
    writer = MetricWriter(workdir, tensorboard=False)
    run = Run(config, workdir, writer, jax.random.key(config.seed), load_tokenizer(model / "llm_processor"))
    for name in config.phases:
        done, phase = PHASES[name]
        if not (model / done).exists():
            phase(run)
    writer.close()
    return model
