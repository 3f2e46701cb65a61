"""Trains the built-in tiny model from random weights, phase by phase, in the official folder layout.

Each phase has its own jitted train step under the loop of the method's stages, and continues after an interruption. A
phase writes its part to `workdir/model/...` before the next phase starts. `workdir/phases.json` has the digest of the
configuration of each finished phase.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import trees
from uae_jax.data.qwen_inputs import load_image_processor
from uae_jax.data.tokenizer import (
    END_OF_TEXT,
    IMAGE_PAD,
    condition_template,
    load_tokenizer,
    stop_ids,
    token_id,
    write_scene_tokenizer,
)
from uae_jax.files.json_files import json_digest, read_json, write_json
from uae_jax.hf.rules import published_tensors
from uae_jax.hf.safetensors import write_tensors
from uae_jax.methods.method import Learner, build_step, start_of
from uae_jax.methods.pretrain import Pretrain, PretrainConfig
from uae_jax.methods.stage_settings import SamplerConfig
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config
from uae_jax.models.encoders.preprocess import Preprocess, clip_preprocessor
from uae_jax.models.encoders.tables import dinov2_rules
from uae_jax.models.encoders.weights import open_encoder, pooled_empty_prompt, save_clip
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig
from uae_jax.models.sd3 import transformer
from uae_jax.models.sd3 import vae as sd3_vae
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.decoder import SD3Decoder
from uae_jax.models.sd3.weights import load_vae, transformer_rules, vae_rules
from uae_jax.models.uae import UAE
from uae_jax.rewards.similarity import Encoder
from uae_jax.settings import as_dict, frozen
from uae_jax.stages.bootstrap import caption_scorer, captioner, decoder, encoders, unified, vae
from uae_jax.stages.bootstrap.scene_stream import World, open_world
from uae_jax.stages.bootstrap.settings import BootstrapConfig
from uae_jax.stages.bootstrap.unified import frozen_vq
from uae_jax.stages.weights import ENCODERS, model_folder
from uae_jax.stages.workload import expected_trainings
from uae_jax.training.loop import run_stage
from uae_jax.training.loop_config import LoopConfig
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.progress import Progress
from uae_jax.training.records import check_configuration
from uae_jax.training.step import TrainState

# settings of every phase; a phase also depends on its own section of the configuration, and on the parts that it reads
SHARED = ("data", "seed", "side", "caption_tokens")
NEEDED = {"decoder": ("vae", "captioner"), "mistakes": ("decoder",), "caption_scorer": ("clip",), "network": ("vq",)}
# half precision keeps the built-in model under 12 MB and rounds weights by one part in 2,000
STORED = np.dtype(np.float16)
READ = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class ModelAlone:
    """The description of a model without weights, for pretraining; a `methods.method.Described`."""

    model: UAE
    encoders: Mapping[str, Encoder] = dataclasses.field(default_factory=dict)
    stops: tuple[int, ...] = ()
    scorer: None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Shared by the phases: config, workdir, writer of metrics, root key, tokenizer, kind of scenes, progress."""

    config: BootstrapConfig
    workdir: pathlib.Path
    writer: MetricWriter
    key: jax.Array
    tokenizer: Any
    world: World
    progress: Progress

    @property
    def model(self) -> pathlib.Path:
        """The folder that becomes the built-in model."""
        return self.workdir / "model"

    def pad(self) -> int:
        """The padding id."""
        return token_id(self.tokenizer, END_OF_TEXT)

    def template(self) -> ConditionTemplate:
        """The decoder's condition around a caption; the negative prompt is empty."""
        prefix, suffix = condition_template(self.tokenizer)
        return ConditionTemplate(tuple(prefix), tuple(suffix), (), self.pad())


def train(
    run: Run,
    name: str,
    learner: Learner,
    params: trees.Tree,
    frozen_params: trees.Tree,
    data: Any,
    *,
    steps: int,
) -> TrainState:
    """Trains one phase from its newest checkpoint to its end, and returns its state."""
    optimizer = make_optimizer(getattr(run.config, name).optimizer, steps)
    step = build_step(learner, optimizer)
    loop = LoopConfig(
        steps=steps, log_every=run.config.log_every, save_every=run.config.save_every, headline="accuracy"
    )
    result = run_stage(
        f"bootstrap_{name}",
        step,
        state=start_of(params, optimizer, learner.settings),
        frozen=frozen_params,
        data=data,
        key=jax.random.fold_in(run.key, 1),
        workdir=run.workdir,
        config=loop,
        writer=run.writer,
        identity=identity(run.config, finished_phases(run.workdir), name),
        progress=run.progress,
    )
    return result.state


def vae_phase(run: Run) -> None:
    """Writes `SD3/vae`."""
    phase, side = run.config.vae, run.config.side
    model = frozen(VAEConfig, phase.model, "config.vae.model")
    data = vae.stream(run.world, seed=run.config.seed, batch_size=phase.batch_size, side=side)
    params = sd3_vae.init_params(model, jax.random.fold_in(run.key, 10))
    state = train(run, "vae", vae.algorithm(model), params, {}, data, steps=phase.steps)
    sample = next(vae.stream(run.world, seed=run.config.seed + 1, batch_size=512, side=side))["pixels"]
    model = vae.fit_latent_scale(model, state.params, jnp.asarray(sample))
    folder = run.model / "SD3" / "vae"
    write_tensors(folder, published_tensors(state.params, vae_rules(model), STORED), stem="diffusion_pytorch_model")
    write_json(folder / "config.json", model.published(), indent=1)


def clip_phase(run: Run) -> None:
    """Writes `clip` (the reward encoder)."""
    phase, side = run.config.clip, run.config.side
    end = token_id(run.tokenizer, "<|im_end|>")
    text = CLIPTextConfig(
        **phase.text, vocab_size=len(run.tokenizer), eos_token_id=end, bos_token_id=run.pad(), pad_token_id=run.pad()
    )
    model = CLIPConfig(CLIPVisionConfig(**phase.vision), text)
    preprocess = Preprocess.from_dict(clip_preprocessor(side))
    data = encoders.clip_stream(
        run.world,
        run.tokenizer,
        seed=run.config.seed,
        batch_size=phase.batch_size,
        side=side,
        length=text.max_position_embeddings,
        pad=run.pad(),
    )
    params = clip.init_params(model, jax.random.fold_in(run.key, 20))
    params["heads"] = encoders.init_heads(
        model.vision.projection_dim, encoders.attribute_width(run.world), jax.random.fold_in(run.key, 21)
    )
    state = train(
        run, "clip", encoders.clip_algorithm(run.world, model, preprocess), params, {}, data, steps=phase.steps
    )
    folder = run.model / "clip"
    towers = {name: leaf for name, leaf in state.params.items() if name != "heads"}
    save_clip(folder, model, jax.tree.map(lambda leaf: np.asarray(leaf, STORED), towers))
    write_json(folder / "preprocessor_config.json", clip_preprocessor(side), indent=1)


def dinov2_phase(run: Run) -> None:
    """Writes `dinov2` (the held-out encoder)."""
    phase, side = run.config.dinov2, run.config.side
    model = Dinov2Config(**phase.model)
    processor = clip_preprocessor(side) | {"image_processor_type": "BitImageProcessor"}
    data = encoders.dino_stream(run.world, seed=run.config.seed, batch_size=phase.batch_size, side=side)
    params = {
        "encoder": dino.init_params(model, jax.random.fold_in(run.key, 30)),
        "heads": encoders.init_heads(
            model.hidden_size, encoders.readout_width(run.world), jax.random.fold_in(run.key, 31)
        ),
    }
    algorithm = encoders.dino_algorithm(run.world, model, Preprocess.from_dict(processor))
    state = train(run, "dinov2", algorithm, params, {}, data, steps=phase.steps)
    folder = run.model / "dinov2"
    write_tensors(folder, published_tensors(state.params["encoder"], dinov2_rules(model), STORED))
    write_json(
        folder / "config.json",
        {"model_type": "dinov2", "architectures": ["Dinov2Model"], **dataclasses.asdict(model)},
        indent=1,
    )
    write_json(folder / "preprocessor_config.json", processor, indent=1)


def captioner_phase(run: Run) -> None:
    """Writes `llm` without projector, which the decoder phase adds; without that phase, a copied projector is kept."""
    phase, config = run.config.captioner, run.config
    stops = stop_ids(run.tokenizer)
    model = Qwen2_5VLConfig(
        vision=frozen(VisionConfig, phase.vision),
        text=TextConfig(**phase.text, vocab_size=len(run.tokenizer)),
        image_token_id=token_id(run.tokenizer, IMAGE_PAD),
        video_token_id=token_id(run.tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(run.tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(run.tokenizer, "<|vision_end|>"),
        pad_token_id=run.pad(),
        stop_token_ids=stops,
    )
    copied = config.start and "decoder" not in config.phases
    projector = qwen_weights.load_projector(run.model / "llm", model, READ) if copied else None
    processor = load_image_processor(run.model / "llm_processor", model.vision.window_size)
    data = captioner.stream(
        run.world,
        run.tokenizer,
        processor,
        seed=config.seed,
        batch_size=phase.batch_size,
        side=config.side,
        length=config.caption_tokens,
        pad=run.pad(),
        max_prompt=phase.max_prompt,
        detail=(phase.detail_low, phase.detail_high),
    )
    params = qwen.init_params(model, jax.random.fold_in(run.key, 40))
    params["memory"] = captioner.init_memory(model, jax.random.fold_in(run.key, 42))
    params["readout"] = captioner.init_readout(run.world, model.text.width, jax.random.fold_in(run.key, 41))
    algorithm = captioner.algorithm(run.world, model, run.template(), phase.text_weight)
    state = train(run, "captioner", algorithm, params, {}, data, steps=phase.steps)
    captioner.write_config(run.model / "llm", model, stops)
    parts = state.params if projector is None else {**state.params, "projector": projector}
    write_tensors(run.model / "llm", qwen_weights.tensors(model, parts, STORED))  # without the readouts


def decoder_phase(run: Run) -> None:
    """Writes `SD3` (scheduler, text encoders), `dit`, and the projector into `llm`."""
    phase, config = run.config.decoder, run.config
    write_text_encoders(run)
    model = frozen(TransformerConfig, phase.model, "config.decoder.model")
    language, parts = qwen_weights.load(run.model / "llm", dtype=READ)
    vae_config, parts["vae"] = load_vae(run.model / "SD3" / "vae")
    parts["pooled"] = pooled_empty_prompt([run.model / "SD3" / name for name in ("text_encoder", "text_encoder_2")])
    parts = jax.tree.map(jnp.asarray, parts)
    params = {
        "projector": qwen.init_projector(
            jax.random.fold_in(run.key, 50), language.text.width, phase.projector_width, model.joint_attention_dim
        ),
        "transformer": transformer.init_params(model, jax.random.fold_in(run.key, 51)),
    }
    settings = PretrainConfig(
        steps=phase.steps,
        batch_size=phase.batch_size,
        time_shift=phase.time_shift,
        condition_dropout=phase.condition_dropout,
    )
    described = ModelAlone(UAE(language, SD3Decoder(model, vae_config, run.template(), language), config.side))
    averaged = Pretrain(dataclasses.replace(settings, ema_decay=phase.ema_decay), SamplerConfig(), described)

    def data(batch_size: int, seed: int, mistakes: float):
        return decoder.stream(
            run.world,
            run.tokenizer,
            seed=seed,
            batch_size=batch_size,
            side=config.side,
            length=phase.caption_tokens,
            pad=run.pad(),
            full_fraction=phase.full_fraction,
            detail_high=phase.detail_high,
            mistakes=mistakes,
        )

    stream = data(phase.batch_size, config.seed, 0.0)
    state = train(run, "decoder", averaged, params, parts, stream, steps=phase.steps)
    params = state.params if state.ema is None else state.ema
    last = config.mistakes
    if last.steps:
        stream = data(last.batch_size, config.seed + 100, last.probability)
        learner = Pretrain(settings, SamplerConfig(), described)
        params = train(run, "mistakes", learner, params, parts, stream, steps=last.steps).params
    write_tensors(
        run.model / "dit",
        published_tensors(params["transformer"], transformer_rules(model), STORED),
        stem="diffusion_pytorch_model",
    )
    write_tensors(
        run.model / "llm", qwen_weights.tensors(language, {**parts, "projector": params["projector"]}, STORED)
    )
    write_json(run.model / "dit" / "config.json", model.published(), indent=1)


def caption_scorer_phase(run: Run) -> None:
    """Writes `caption_scorer`: the image tower of `clip` and a new text tower."""
    phase, pad = run.config.caption_scorer, run.pad()
    source = open_encoder(run.model / "clip")
    if not isinstance(source.config, CLIPConfig):
        raise ValueError(f"{source.path} is no CLIP with both towers, which the caption scorer needs; train phase clip")
    towers, preprocess = source.load(), source.preprocess()
    model = caption_scorer.text_config(source.config, phase.text, pad)
    data = caption_scorer.stream(
        run.world,
        run.tokenizer,
        seed=run.config.seed,
        batch_size=phase.batch_size,
        side=run.config.side,
        length=run.config.caption_tokens,
        pad=pad,
        full_fraction=phase.full_fraction,
    )
    params = {
        "text": clip.init_params(model.text, jax.random.fold_in(run.key, 70))["text"],
        "logit_scale": jnp.float32(model.logit_scale_init_value),
    }
    frozen_tower = {"vision": jax.tree.map(jnp.asarray, towers["vision"])}
    algorithm = caption_scorer.algorithm(model, preprocess)
    state = train(run, "caption_scorer", algorithm, params, frozen_tower, data, steps=phase.steps)
    folder = run.model / "caption_scorer"
    save_clip(folder, model, jax.tree.map(np.asarray, {**frozen_tower, **state.params}))
    write_json(folder / "preprocessor_config.json", clip_preprocessor(run.config.side), indent=1)


def write_text_encoders(run: Run) -> None:
    """Writes two small random CLIP text towers, which give the constant pooled condition."""
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        end = token_id(run.tokenizer, "<|im_end|>")
        model = CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(run.tokenizer),
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
        params = clip.init_params(model, jax.random.fold_in(run.key, 60 + number))
        save_clip(run.model / "SD3" / name, model, jax.tree.map(np.asarray, params))
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": run.config.decoder.time_shift,
    }
    write_json(run.model / "SD3" / "scheduler" / "scheduler_config.json", scheduler, indent=1)


PHASES: dict[str, tuple[str, Callable[[Run], None]]] = {
    "vae": ("SD3/vae/config.json", vae_phase),
    "clip": ("clip/preprocessor_config.json", clip_phase),
    "dinov2": ("dinov2/preprocessor_config.json", dinov2_phase),
    "captioner": ("llm/model.safetensors", captioner_phase),
    "decoder": ("dit/config.json", decoder_phase),
    "caption_scorer": ("caption_scorer/preprocessor_config.json", caption_scorer_phase),
    "vq": ("../vq/model.safetensors", lambda run: unified.vq_phase(run, train, STORED)),
    "network": ("config.json", lambda run: unified.network_phase(run, train, STORED)),
}


# folders with parts of several phases: always copied from `config.start`, then a phase replaces its own part
COPIED = ("llm", "SD3")


def trainings(name: str) -> tuple[str, ...]:
    """The sections of the configuration for the trainings of a phase, in order."""
    return ("decoder", "mistakes") if name == "decoder" else (name,)


def finished_phases(workdir: pathlib.Path) -> dict[str, str]:
    """Digests of the trainings of finished phases, by name."""
    return read_json(workdir, "phases.json") if (workdir / "phases.json").exists() else {}


def digest(config: BootstrapConfig, finished: Mapping[str, str], name: str) -> str:
    """A digest of the `identity` of a training."""
    return json_digest(identity(config, finished, name))


def identity(config: BootstrapConfig, finished: Mapping[str, str], name: str) -> dict[str, Any]:
    """Everything that changes the numbers of a training, such as `decoder` or `mistakes`.

    That is the training's settings, the shared settings, and the parts that the training reads. Such a part comes from
    a phase of this configuration, from a phase finished earlier, or from `config.start`.
    """
    made = {training for phase in config.phases for training in trainings(phase)}
    sources = {
        part: digest(config, finished, part) if part in made else finished.get(part, config.start)
        for part in NEEDED.get(name, ())
    }
    values = as_dict(config)
    return {shared: values[shared] for shared in SHARED} | {name: values[name], "reads": sources}


def check_phases(config: BootstrapConfig, workdir: pathlib.Path) -> None:
    """Refuses a workdir with a phase of another configuration, before anything is written there.

    Raises:
      ValueError: such a phase, a checkpoint that cannot be read, or a part of unknown configuration.
    """
    finished = finished_phases(workdir)
    for name in config.phases:
        for training in trainings(name):
            now = digest(config, finished, training)
            if training not in finished:
                check_configuration(workdir, f"bootstrap_{training}", identity(config, finished, training))
            elif finished[training] != now:
                raise ValueError(
                    f"the phase {name} of {workdir} was made with another configuration (digest "
                    f"{finished[training]}, now {now}); use the configuration in {workdir / 'config.json'}, or a new "
                    "--workdir"
                )
        part = workdir / "model" / PHASES[name][0]
        known = name in finished or (workdir / "checkpoints" / f"bootstrap_{name}").is_dir()
        if part.exists() and not known and not (config.start and PHASES[name][0].startswith(COPIED)):
            raise ValueError(
                f"{part} is there, but neither phases.json nor checkpoints in {workdir} say how it was made; leave "
                f"the phase {name} out of config.phases, or use a new --workdir"
            )


def copy_parts(config: BootstrapConfig, model: pathlib.Path) -> None:
    """Copies parts that no phase of the config makes, once, from the folder `config.start` (`builtin`: the built-in
    model).
    """
    source = model_folder("" if config.start == "builtin" else config.start)
    made = {PHASES[name][0].split("/")[0] for name in config.phases} - set(COPIED)
    for folder in source.iterdir():
        wanted = folder.name in ENCODERS if config.unified else folder.name not in made
        if folder.is_dir() and wanted and not (model / folder.name).exists():
            partial = model / f".{folder.name}.tmp"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder, partial)
            partial.rename(model / folder.name)


def open_words(config: BootstrapConfig, model: pathlib.Path, world: World) -> Any:
    """Writes the tokenizer of a world's words into the model's folder, and reads it."""
    if config.unified:
        unified.write_tokenizer(model, world)
        return unified.tokenizer_of(model, frozen_vq(config.vq.model).tokens)
    write_scene_tokenizer(
        model / "llm_processor",
        world.words,
        patch_size=config.captioner.vision["patch_size"],
        max_pixels=config.side**2,
    )
    return load_tokenizer(model / "llm_processor")


def bootstrap(settings: Mapping[str, Any] | BootstrapConfig, workdir: pathlib.Path) -> pathlib.Path:
    """Runs the unfinished phases of the config.

    Args:
      settings: of `configs/bootstrap.py`.
      workdir: checkpoints, metrics and `model/`.

    Returns:
      The model's folder.

    Raises:
      ValueError: an unknown phase, or a workdir of another configuration; nothing is written.
      FileNotFoundError: the folder to start from does not exist.
    """
    config = settings if isinstance(settings, BootstrapConfig) else frozen(BootstrapConfig, settings)
    model = workdir / "model"
    world = open_world(config.data)
    check_phases(config, workdir)
    write_json(workdir / "config.json", as_dict(config))
    if config.start:
        model.mkdir(exist_ok=True)
        copy_parts(config, model)
    writer = MetricWriter(workdir, tensorboard=False)
    finished = finished_phases(workdir)
    left = [name for name in config.phases if name not in finished or not (model / PHASES[name][0]).exists()]
    progress = Progress(expected_trainings(config, [training for name in left for training in trainings(name)]))
    tokenizer = open_words(config, model, world)
    run = Run(config, workdir, writer, jax.random.key(config.seed), tokenizer, world, progress)
    for name in left:
        PHASES[name][1](run)
        finished = finished_phases(workdir)
        made = {training: digest(config, finished, training) for training in trainings(name)}
        write_json(workdir / "phases.json", finished | made)
    writer.close()
    return model
