"""This package's side of `benchmarks.unified_step`: its compiled steps, and their phases as separately compiled
pieces.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from uae_jax.stages.settings import frozen
from uae_jax.stages.steps import STAGES as STEPS
from uae_jax.stages.steps import SamplerConfig, held, make_policy, make_step

from benchmarks.gpu_check.random_model import plain_ids, random_system
from benchmarks.step_settings import PREFILL, STAGES, Inputs, Settings
from configs import presets
from uae_jax import sharding, trees
from uae_jax.data import tokenizer as tokens
from uae_jax.data.loader import RowBuilder, batch_spec
from uae_jax.data.sources import SceneSource
from uae_jax.diffusion.sampler import Trajectory, sample, sample_window
from uae_jax.models.qwen2_5_vl.sampling import SamplingConfig
from uae_jax.planning.flops import count_work
from uae_jax.rewards.similarity import mixed_reward, reward_advantages
from uae_jax.rl import caption_policy, flow_policy
from uae_jax.rollouts.captioning import encode_batch_images, sample_captions
from uae_jax.rollouts.reconstruction import decode, draw, encode_condition, predictor, sample_keys
from uae_jax.stages.weights import ModelConfig, System, load_system
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import Algorithm, init_state, make_train_step

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
        dataclasses.replace(system, parts=sharding.shard_tree(held(system.parts, (), dtype), mesh))
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
    return {name: np.stack([row[name] for row in fields]) for name in fields[0]}


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
    optimizer = preset["optimizer"] | dict(
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm
    )
    own = {
        "gen_for_und": dict(
            temperature=settings.caption_temperature,
            kl_weight=settings.caption_kl,
            clip_low=settings.caption_clip,
            clip_high=settings.caption_clip,
        ),
        "und_for_gen": dict(
            temperature=settings.flow_temperature,
            kl_weight=settings.flow_kl,
            clip_range=settings.flow_clip,
            window=settings.window,
            window_high=settings.steps - 1,
            noise_level=settings.noise_level,
            ema_decay=0.0,
        ),
    }[stage]
    return frozen(
        STEPS[stage][0],
        preset
        | own
        | dict(
            batch_size=settings.images,
            group_size=settings.group,
            max_new_tokens=settings.tokens,
            sampler_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            lora_rank=settings.lora_rank,
            optimizer=optimizer,
            # as at full size; on one device it changes only the form in which GPUs sample captions
            gather_weights=True,
        ),
    )


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
        model = dataclasses.replace(system.model, template=template)
        self.system = dataclasses.replace(system, model=model, parts={}, stops=())
        self.stage = stage if stage in STAGES else STAGES[0]
        self.config, self.sampler = (
            stage_config(self.stage, self.settings),
            SamplerConfig(system.schedule.shift, system.schedule.kind),
        )
        self.policy = make_policy(self.stage, self.config, self.sampler, self.system)
        self.key = jax.random.key(0)
        start = STEPS[stage][1](system.parts, self.config, self.key) if stage in STAGES else {}
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
        compiled = make_step(self.stage, self.config, self.sampler, self.system, self.optimizer)
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
        count, policy = self.settings.images, self.policy
        write = jax.jit(functools.partial(self._write, self.settings.flow_temperature))
        lengths = jnp.full(count, self.settings.tokens, jnp.int32)
        picture = jax.jit(lambda parts, ids, noise: draw(policy.model, parts, policy.denoising, ids, lengths, noise))
        return {
            "captions": lambda: jax.block_until_ready(write(self.parts, self.batch)),
            "pictures": lambda: jax.block_until_ready(picture(self.parts, self.captions[:count], self.noise[:count])),
        }

    def checks(self) -> dict[str, np.ndarray]:
        """What must be equal on both sides: greedy captions `[B, T]`, final latents `[N, h, w, C]`, rewards `[B,
        G]`.
        """
        policy, group = self.policy, self.settings.group

        def compute(parts: dict, batch: dict, ids: Array, noise: Array) -> tuple[Array, Array, Array]:
            positive, negative = self._condition(parts, ids)
            latents = self._denoise(parts, positive, negative, noise)
            reward, _ = mixed_reward(
                policy.reward,
                policy.encoders,
                parts["encoders"],
                batch["pixels"],
                decode(policy.model, parts, policy.denoising, latents),
                group,
            )
            return self._write(0.0, parts, batch), latents, reward

        names = ("greedy_ids", "latents", "rewards")
        return dict(zip(names, jax.device_get(jax.jit(compute)(self.parts, self.batch, self.captions, self.noise))))

    def _updating(self, call: Callable) -> Callable[[], None]:
        def run() -> None:
            self.state, metrics = call()
            jax.block_until_ready((self.state, metrics))

        return run

    def _write(self, temperature: float, parts: dict, batch: dict, group: int = 1, tokens: int | None = None) -> Array:
        """`group` captions of each picture, `[B * group, T]`."""
        return sample_captions(
            self.policy.model,
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
        return encode_condition(self.policy.model, parts, self.policy.denoising, ids, lengths)

    def _denoise(self, parts: dict, positive: tuple, negative: tuple, noise: Array) -> Array:
        how = self.policy.denoising
        return sample(predictor(self.policy.model, parts, how, positive, negative), noise, jnp.asarray(how.sigmas))

    def _pictures(self) -> tuple[dict[str, Callable[[], None]], Array]:
        """The phases that both stages share, decoding and reward, and advantages `[B, G]`."""
        policy = self.policy
        decoding = jax.jit(lambda parts, latents: decode(policy.model, parts, policy.denoising, latents))
        reward = jax.jit(
            lambda parts, batch, pixels: reward_advantages(
                policy.reward,
                policy.encoders,
                parts["encoders"],
                batch["pixels"],
                pixels,
                policy.group_size,
                policy.advantage_scale,
            )[0]
        )
        pixels = decoding(self.parts, self.noise)
        return {
            "decoding": lambda: jax.block_until_ready(decoding(self.parts, self.noise)),
            "reward": lambda: jax.block_until_ready(reward(self.parts, self.batch, pixels)),
        }, reward(self.parts, self.batch, pixels)

    def _update(self, algorithm: Algorithm, samples: dict) -> Callable[[], None]:
        compiled = jax.jit(make_train_step(algorithm, self.optimizer), donate_argnames="state")
        return self._updating(lambda: compiled(self.state, self.frozen, samples, self.key))

    def _caption_phases(self) -> dict[str, Callable[[], None]]:
        policy, settings = self.policy, self.settings
        condition, denoise = jax.jit(self._condition), jax.jit(self._denoise)
        positive, negative = condition(self.parts, self.captions)
        pictures, advantage = self._pictures()
        shape = (settings.images, settings.group, settings.tokens)
        samples = {name: self.batch[name] for name in caption_policy.PROMPT_FIELDS} | {
            "image_embeds": jax.jit(lambda parts, batch: encode_batch_images(policy.model, parts, batch))(
                self.parts, self.batch
            ),
            "advantage": advantage,
            "tokens": self.captions.reshape(shape),
            "mask": jnp.ones(shape, bool),
        }
        algorithm = Algorithm(
            lambda params, frozen, samples, key: {
                "samples": samples | caption_policy.scored(policy, {**frozen, **params}, samples)
            },
            functools.partial(caption_policy.loss, policy),
        )
        return {
            **self._sampling(policy.temperature, settings.group),
            "condition": lambda: jax.block_until_ready(condition(self.parts, self.captions)),
            "denoising": lambda: jax.block_until_ready(denoise(self.parts, positive, negative, self.noise)),
            **pictures,
            "update": self._update(algorithm, samples),
        }

    def _flow_phases(self) -> dict[str, Callable[[], None]]:
        policy, settings = self.policy, self.settings

        def prepare(parts: dict, ids: Array) -> tuple:
            positive, negative = self._condition(parts, ids)
            return jax.tree.map(lambda leaf: jnp.repeat(leaf, policy.group_size, axis=0), positive), negative

        def explore(parts: dict, positive: tuple, negative: tuple, noise: Array, ids: Array, key: Array) -> Trajectory:
            how = policy.denoising
            return sample_window(
                predictor(policy.model, parts, how, positive, negative),
                noise,
                jnp.asarray(how.sigmas),
                policy.rule,
                jnp.int32(0),
                policy.window,
                sample_keys(trees.name_key(key, "steps"), ids, policy.group_size),
            )

        condition, denoise = jax.jit(prepare), jax.jit(explore)
        captions = self.captions[:: settings.group]
        positive, negative = condition(self.parts, captions)
        pictures, advantage = self._pictures()
        ids = self.batch["sample_id"]
        trajectory = denoise(self.parts, positive, negative, self.noise, ids, self.key)
        rollout = flow_policy.stored(trajectory, positive, negative, advantage)
        algorithm = Algorithm(
            lambda params, frozen, rollout, key: {
                "shared": rollout["shared"],
                "samples": rollout["samples"] | flow_policy.scored(policy, {**frozen, **params}, **rollout),
            },
            functools.partial(flow_policy.loss, policy),
        )
        return {
            **self._sampling(policy.temperature, 1),
            "condition": lambda: jax.block_until_ready(condition(self.parts, captions)),
            "denoising": lambda: jax.block_until_ready(
                denoise(self.parts, positive, negative, self.noise, ids, self.key)
            ),
            **pictures,
            "update": self._update(algorithm, rollout),
        }
