"""This package's side of `benchmarks.unified_step`: its compiled steps, and their phases as separately compiled
pieces.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu_check.random_model import plain_ids, random_system
from benchmarks.step_settings import PREFILL, STAGES, Inputs, Settings
from configs import presets
from uae_jax import sharding, trees
from uae_jax.data import tokenizer as tokens
from uae_jax.data.loader import RowBuilder, batch_spec, to_signed
from uae_jax.data.sources import SceneSource
from uae_jax.diffusion.sampler import Trajectory, sample, sample_window
from uae_jax.methods import STAGES as KNOWN
from uae_jax.methods.flow_grpo import FlowGrpo, kept
from uae_jax.methods.gen_for_und import PROMPT_FIELDS, GenForUnd
from uae_jax.methods.method import build_step, make_method
from uae_jax.methods.stage_settings import SamplerConfig, rollout_denoising
from uae_jax.methods.trained import stored, trainable
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.planning.flops import count_work
from uae_jax.rewards.similarity import chosen_encoders, mixed_reward
from uae_jax.rl.advantages import group_advantages
from uae_jax.rollouts.captioning import encode_batch_images, sample_captions
from uae_jax.rollouts.reconstruction import decode, draw, encode_condition, predictor, sample_keys
from uae_jax.settings import frozen
from uae_jax.stages.weights import ModelConfig, System, load_system
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import init_state

PROMPT = "Describe this image in detail."


def own_mesh() -> jax.sharding.Mesh:
    """This process's devices."""
    return sharding.make_mesh(sharding.MeshConfig())


def open_system(folder: pathlib.Path, image_size: int, dtype: str = "float32") -> System:
    """The model without the folder's adapters, on this process's devices.

    In bfloat16 the weights are rounded on the host, so that the device never holds them in float32. A folder of configs
    alone (`mini_checkpoint.write_configs`) gets random weights, made on the device.
    """
    if not any((folder / "llm").glob("*.safetensors")):
        return random_system(folder, image_size, dtype)
    mesh = own_mesh()
    rounded = dtype != "float32"
    system = load_system(
        ModelConfig(folder=str(folder), adapters=False, dtype=dtype),
        image_size=image_size,
        mesh=None if rounded else mesh,
    )
    return (
        dataclasses.replace(system, parts=sharding.shard_tree(stored(system.parts, (), dtype), mesh))
        if rounded
        else system
    )


def picture_rows(system: System, image_size: int, count: int, max_caption: int) -> dict[str, np.ndarray]:
    """A batch of `count` built-in scenes (`data.loader`), drawn at a size and with prompts of one length."""
    spec = batch_spec(system.tokenizer, system.processor, image_size, PROMPT, max_caption)
    rows, source = (
        RowBuilder(system.tokenizer, system.processor, spec, PROMPT),
        SceneSource("train", 0, image_size, "full"),
    )
    fields = [rows(index, source[index]) for index in range(count)]
    batch = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
    return batch | {"pixels": to_signed(batch["pixels"])}  # both sides begin with floats


def make_inputs(folder: pathlib.Path, settings: Settings, seed: int = 0) -> Inputs:
    """Pictures, prompts, captions of random tokens, and noise for both sides.

    Args:
      folder: the checkpoint.
      settings: sizes.
      seed: of captions and noise.
    """
    system, rng = open_system(folder, settings.image_size), np.random.default_rng(seed)
    batch = picture_rows(system, settings.image_size, settings.images, settings.tokens + 1)
    plain = plain_ids(system)
    prefix, suffix = tokens.condition_template(system.tokenizer)
    return Inputs(
        settings,
        batch
        | {
            "caption_tokens": rng.choice(plain, (settings.rows, settings.tokens)),
            "negative": rng.choice(plain, settings.tokens),
            "prefix": np.array(prefix, np.int32),
            "suffix": np.array(suffix, np.int32),
            "noise": rng.standard_normal((settings.rows, *system.model.latent_shape), np.float32),
            "pooled": np.asarray(system.parts["pooled"]),
            "stops": np.array(system.stops, np.int32),
            "sigmas": system.schedule.sigmas(settings.steps),
        },
    )


def stage_config(stage: str, settings: Settings):
    """The preset `mini` of a stage, with the sizes of the benchmark."""
    preset = presets.preset("mini", (stage,)).to_dict()[stage]
    optimizer = dict(
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm
    )
    own = {
        "gen_for_und": dict(
            temperature=settings.caption_temperature,
            guidance_scale=settings.guidance_scale,
            kl_weight=settings.caption_kl,
            clip_low=settings.caption_clip,
            clip_high=settings.caption_clip,
        ),
        "und_for_gen": dict(
            temperature=settings.flow_temperature,
            flow_grpo=dict(
                guidance_scale=settings.guidance_scale,
                kl_weight=settings.flow_kl,
                clip_range=settings.flow_clip,
                window=settings.window,
                window_high=settings.steps - 1,
                noise_level=settings.noise_level,
                ema_decay=0.0,
            ),
        ),
    }[stage]
    sizes = dict(
        batch_size=settings.images,
        group_size=settings.group,
        max_new_tokens=settings.tokens,
        sampler_steps=settings.steps,
        lora_rank=settings.lora_rank,
        optimizer=optimizer,
        # as at full size; on one device it changes only the form in which GPUs sample captions
        gather_weights=True,
    )
    return frozen(KNOWN[stage].settings, presets.merged(preset, own | sizes))


@dataclasses.dataclass(frozen=True)
class GivenRollout:
    """A method whose rollout is the batch, `samples` and `shared`, but for what its loss compares with."""

    method: GenForUnd | FlowGrpo

    @property
    def settings(self) -> Any:
        """Of the method."""
        return self.method.settings

    def rollout(self, params: dict, frozen: dict, batch: dict, key: Array) -> dict:
        """The batch, with the reference's values and the old ones."""
        parts = {**frozen, **params}
        if isinstance(self.method, FlowGrpo):
            compared = self.method.compared(parts, batch["samples"], batch["shared"])
        else:
            compared = self.method.compared(parts, batch["samples"])
        return batch | {"samples": batch["samples"] | compared}

    def loss(self, params: dict, frozen: dict, rollout: dict, key: Array) -> Any:
        """Of the method."""
        return self.method.loss(params, frozen, rollout, key)


class JaxSide:
    """Calls that wait for their results, by name.

    Args:
      folder: the checkpoint.
      inputs: of `make_inputs`.
      stage: `gen_for_und`, `und_for_gen` or `inference`.
    """

    def __init__(self, folder: pathlib.Path, inputs: Inputs, stage: str):
        self.inputs, self.settings = inputs, inputs.settings
        system = open_system(folder, self.settings.image_size, self.settings.dtype)
        template = dataclasses.replace(system.model.template, negative=tuple(inputs["negative"].tolist()))
        decoder = dataclasses.replace(system.model.decoder, template=template)
        model = dataclasses.replace(system.model, decoder=decoder)
        self.system = dataclasses.replace(system, model=model, parts={}, stops=())
        self.stage = stage if stage in STAGES else STAGES[0]
        self.config = stage_config(self.stage, self.settings)
        sampler = SamplerConfig(system.schedule.shift, system.schedule.kind)
        self.method = make_method(self.stage, self.config, sampler, self.system)
        self.denoising = rollout_denoising(model, self.config, sampler, self.config.guidance_scale)
        self.key = jax.random.key(0)
        trains = self.method.trains(self.config) if stage in STAGES else ()
        start = trainable(model, system.parts, trains, self.config.lora_rank, self.key)
        self.frozen = {name: part for name, part in system.parts.items() if name not in start}
        self.optimizer = make_optimizer(self.config.optimizer, 1000)
        # placed as the step gives it back, so that the second call is the same program as the first
        self.state = sharding.make_on(own_mesh(), lambda parts: init_state(parts, self.optimizer), start)
        given = ("prefix", "suffix", "negative", "noise", "caption_tokens", "pooled", "stops", "sigmas")
        self.batch = {name: jnp.asarray(array) for name, array in inputs.arrays.items() if name not in given}
        self.captions = jnp.asarray(inputs["caption_tokens"])
        self.noise = jnp.asarray(inputs["noise"])

    @property
    def parts(self) -> dict:
        """All parameters, with those that a step has trained."""
        return {**self.frozen, **self.state.params}

    def step(self) -> Callable[[], None]:
        """The stage's one compiled step."""
        compiled = build_step(self.method, self.optimizer)
        return self._updating(lambda: compiled(self.state, self.frozen, self.batch, self.key))

    def phases(self) -> dict[str, Callable[[], None]]:
        """The pieces of the step, each on given inputs."""
        return self._caption_phases() if self.stage == "gen_for_und" else self._flow_phases()

    def device_peak(self) -> int | None:
        """Bytes that the accelerator held at most; None where there is none."""
        found = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
        return found["peak_bytes_in_use"] if found else None

    def work(self) -> dict[str, float]:
        """What the stage's phases cannot do without, the same for both sides.

        Returns:
          `decoding_bytes`, operands that sampling reads after the first token; `denoising_flops`.
        """
        settings = self.settings
        group = settings.group if self.stage == "gen_for_und" else 1
        sampling = count_work(
            functools.partial(self._write, 1.0, group=group), (self.parts, self.batch), (0,), trips=settings.tokens - 1
        ).decoding
        contexts = jax.eval_shape(self._condition, self.parts, self.captions)
        denoising = count_work(self._denoise, (self.parts, *contexts, self.noise), (0,))
        return {"decoding_bytes": sampling.weight_bytes + sampling.other_bytes, "denoising_flops": denoising.flops}

    def inference(self) -> dict[str, Callable[[], None]]:
        """Captions of the pictures, and drawings of as many captions."""
        count, model, how = self.settings.images, self.system.model, self.denoising
        write = jax.jit(functools.partial(self._write, self.settings.flow_temperature))
        lengths = jnp.full(count, self.settings.tokens, jnp.int32)
        picture = jax.jit(lambda parts, ids, noise: draw(model, parts, how, ids, lengths, noise))
        return {
            "captions": lambda: jax.block_until_ready(write(self.parts, self.batch)),
            "pictures": lambda: jax.block_until_ready(picture(self.parts, self.captions[:count], self.noise[:count])),
        }

    def checks(self) -> dict[str, np.ndarray]:
        """What must be equal on both sides: greedy captions `[B, T]`, final latents `[N, h, w, C]`, rewards `[B,
        G]`.
        """
        reward, encoders = self.config.reward, self._encoders()

        def compute(parts: dict, batch: dict, ids: Array, noise: Array) -> tuple[Array, Array, Array]:
            positive, negative = self._condition(parts, ids)
            latents = self._denoise(parts, positive, negative, noise)
            pixels = decode(self.system.model, parts, self.denoising, latents)
            score, _ = mixed_reward(reward, encoders, parts["encoders"], batch["pixels"], pixels, self.settings.group)
            return self._write(0.0, parts, batch), latents, score

        names = ("greedy_ids", "latents", "rewards")
        return dict(zip(names, jax.device_get(jax.jit(compute)(self.parts, self.batch, self.captions, self.noise))))

    def _encoders(self) -> tuple:
        return chosen_encoders(self.config.reward, self.system.encoders)

    def _updating(self, call: Callable) -> Callable[[], None]:
        def run() -> None:
            self.state, metrics = call()
            jax.block_until_ready((self.state, metrics))

        return run

    def _write(self, temperature: float, parts: dict, batch: dict, group: int = 1, tokens: int | None = None) -> Array:
        """`group` captions of each picture, `[B * group, T]`."""
        return sample_captions(
            self.system.model,
            parts,
            batch,
            self.key,
            max_new_tokens=tokens or self.settings.tokens,
            stops=(),
            sampling=SamplingConfig(temperature),
            group=group,
            gather_weights=self.config.gather_weights,
        ).tokens

    def _sampling(self, temperature: float, group: int) -> dict[str, Callable[[], None]]:
        """The phase of sampling, and the same for one token."""
        calls = {}
        for name, count in (("sampling", None), (PREFILL, 1)):
            write = jax.jit(functools.partial(self._write, temperature, group=group, tokens=count))
            calls[name] = lambda write=write: jax.block_until_ready(write(self.parts, self.batch))
        return calls

    def _condition(self, parts: dict, ids: Array) -> tuple:
        lengths = jnp.full(len(ids), self.settings.tokens, jnp.int32)
        return encode_condition(self.system.model, parts, self.denoising, ids, lengths)

    def _denoise(self, parts: dict, positive: tuple, negative: tuple, noise: Array) -> Array:
        how = self.denoising
        return sample(predictor(self.system.model, parts, how, positive, negative), noise, jnp.asarray(how.sigmas))

    def _pictures(self) -> tuple[dict[str, Callable[[], None]], Array]:
        """The phases that both stages share, decoding and reward, and advantages `[B, G]`."""
        config, encoders = self.config, self._encoders()
        decoding = jax.jit(lambda parts, latents: decode(self.system.model, parts, self.denoising, latents))
        reward = jax.jit(
            lambda parts, batch, pixels: group_advantages(
                mixed_reward(config.reward, encoders, parts["encoders"], batch["pixels"], pixels, config.group_size)[0],
                scale=config.advantage_scale,
            )[0]
        )
        pixels = decoding(self.parts, self.noise)
        return {
            "decoding": lambda: jax.block_until_ready(decoding(self.parts, self.noise)),
            "reward": lambda: jax.block_until_ready(reward(self.parts, self.batch, pixels)),
        }, reward(self.parts, self.batch, pixels)

    def _update(self, samples: dict, shared: dict) -> Callable[[], None]:
        compiled = build_step(GivenRollout(self.method), self.optimizer)
        rollout = {"samples": samples, "shared": shared}
        return self._updating(lambda: compiled(self.state, self.frozen, rollout, self.key))

    def _caption_phases(self) -> dict[str, Callable[[], None]]:
        model, settings = self.system.model, self.settings
        condition, denoise = jax.jit(self._condition), jax.jit(self._denoise)
        positive, negative = condition(self.parts, self.captions)
        pictures, advantage = self._pictures()
        shape = (settings.images, settings.group, settings.tokens)
        samples = {name: self.batch[name] for name in PROMPT_FIELDS} | {
            "image_embeds": jax.jit(lambda parts, batch: encode_batch_images(model, parts, batch))(
                self.parts, self.batch
            ),
            "advantage": advantage,
            "tokens": self.captions.reshape(shape),
            "mask": jnp.ones(shape, bool),
        }
        return {
            **self._sampling(self.config.temperature, settings.group),
            "condition": lambda: jax.block_until_ready(condition(self.parts, self.captions)),
            "denoising": lambda: jax.block_until_ready(denoise(self.parts, positive, negative, self.noise)),
            **pictures,
            "update": self._update(samples, {}),
        }

    def _flow_phases(self) -> dict[str, Callable[[], None]]:
        group, method, how = self.settings.group, self.method, self.denoising

        def prepare(parts: dict, ids: Array) -> tuple:
            positive, negative = self._condition(parts, ids)
            return jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), positive), negative

        def explore(parts: dict, positive: tuple, negative: tuple, noise: Array, ids: Array, key: Array) -> Trajectory:
            return sample_window(
                predictor(self.system.model, parts, how, positive, negative),
                noise,
                jnp.asarray(how.sigmas),
                method.own.rule,
                jnp.int32(0),
                method.own.window,
                sample_keys(trees.name_key(key, "steps"), ids, group),
            )

        condition, denoise = jax.jit(prepare), jax.jit(explore)
        captions = self.captions[::group]
        positive, negative = condition(self.parts, captions)
        pictures, advantage = self._pictures()
        ids = self.batch["sample_id"]
        trajectory = denoise(self.parts, positive, negative, self.noise, ids, self.key)
        samples = kept(trajectory) | {"context": positive[0], "context_mask": positive[1]}
        samples["advantage"] = advantage.reshape(-1)
        shared = {"sigma_indices": trajectory.sigma_indices, "negative": negative}
        return {
            **self._sampling(self.config.temperature, 1),
            "condition": lambda: jax.block_until_ready(condition(self.parts, captions)),
            "denoising": lambda: jax.block_until_ready(
                denoise(self.parts, positive, negative, self.noise, ids, self.key)
            ),
            **pictures,
            "update": self._update(samples, shared),
        }
