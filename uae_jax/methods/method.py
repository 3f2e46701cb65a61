"""What a method is, the registry of stages and their methods, and the one compiled train step.

A method says what a stage trains, makes a rollout and scores it. `build_step` compiles one step of it:

    rollout (samples, rewards) -> advantages -> loss -> gradient -> update

A stranger's method needs one line, `add_stage("mine", Mine)` or `add_method("und_for_gen", "mine", Mine)`; see
CONTRIBUTING.md. Shape letters: N samples of one rollout, U updates, M micro-batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.methods.stage_settings import SamplerConfig, StageSettings, SupervisedSettings
from uae_jax.models.uae import UAE
from uae_jax.nn.images import signed
from uae_jax.nn.loops import scan
from uae_jax.rewards.caption_similarity import CaptionScorer
from uae_jax.rewards.similarity import Encoder
from uae_jax.rl.advantages import group_advantages
from uae_jax.rl.gradient_noise import noise_metrics
from uae_jax.training.guard import outlier_metrics
from uae_jax.training.step import (
    Metrics,
    PyTree,
    TrainState,
    apply_gradients,
    as_pairs,
    follow,
    init_state,
    join_metrics,
    step_key,
)

Loss = tuple[Float[Array, ""], Float[Array, ""], Mapping[str, Any]]
Streams = Mapping[str, tuple[float, Callable[..., Loss]]]


class Described(Protocol):
    """What a method needs to know of a model; `stages.weights.System` and `stages.abstract.AbstractSystem` are such.

    Attributes:
      model: the description, of the method's `network`.
      encoders: image encoders by name.
      stops: ids that end a caption.
      scorer: of captions, or None.
    """

    @property
    def model(self) -> Any: ...
    @property
    def encoders(self) -> Mapping[str, Encoder]: ...
    @property
    def stops(self) -> tuple[int, ...]: ...
    @property
    def scorer(self) -> CaptionScorer | None: ...


class Learner(Protocol):
    """What the train step needs.

    A learner has one `loss` (`SingleLoss`), or several `streams`: {name: (weight, loss)}. Where rewards are compared in
    another way than in groups of `group_size`, it has `advantages(reward) -> (what samples get, metrics)`. Where
    it makes something of the whole batch before the parts of a rollout, `captions_first(params, frozen, batch, key)`
    has the new fields of the batch; where a step reads its frozen parts in another layout, `prepared(frozen)` has them.

    Attributes:
      settings: of `stage_settings.StageSettings`; with rewards also `group_size` and `advantage_scale`, and
        `compared_samples` where fewer than those of a group are compared with each other.
    """

    @property
    def settings(self) -> Any: ...

    def rollout(self, params: PyTree, frozen: PyTree, batch: PyTree, key: Array) -> dict[str, PyTree]:
        """Samples of the parameters at the beginning of a step.

        Returns:
          `samples`: leaves `[N, ...]`, which are split into updates and micro-batches. `reward` among them becomes
          `advantage` (`with_advantages`). `images` (optional): leaves `[B, ...]` that the samples of an image share;
          `loss` finds them in `shared["images"]`, and each sample's row in `samples["image"]`. `shared` (optional):
          handed to every `loss` as it is; it does not depend on the batch. `metrics` (optional): logged. No gradient
          flows through any of them.
        """
        ...


class SingleLoss(Learner, Protocol):
    """A learner with one loss."""

    def loss(self, params: PyTree, frozen: PyTree, rollout: dict[str, PyTree], key: Array) -> Loss:
        """(sum, count, metrics) of a slice of the rollout; the objective is sum / count over the whole update.

        The slice also has `update`, the update's number in the rollout; the policy of the first is that of the samples.

        All micro-batches of an update get the same key. A key that is folded with the sample's id makes the result
        independent of how the samples are split. A metric is a scalar, or a pair (sum, count) of scalars.
        """
        ...


class Method(Learner, Protocol):
    """A training method: a class of `methods/`, made of a stage's settings, the sampler and a model's description.

    A method of another network than UAE names it: `network`, the type of `Described.model`.

    Attributes:
      Settings: dataclass of the method's section in the configuration.
      reinforcement: whether it learns from rewards. Such stages repeat in rounds and are scored while they run.
      kl_bound: the field of `training.guard.GuardConfig` that bounds its metric `kl`.
    """

    Settings: ClassVar[type]
    reinforcement: ClassVar[bool]
    kl_bound: ClassVar[str]

    def __init__(self, settings: Any, sampler: SamplerConfig, system: Described) -> None: ...
    @staticmethod
    def trains(settings: Any) -> tuple[str, ...]:
        """Names of the parts that it changes: a part, its adapter `_lora`, or its fully fine-tuned copy `_policy`."""
        ...

    @staticmethod
    def needs_captions(settings: Any) -> bool:
        """Whether it reads the captions of the data set; without, it also trains on images that have none."""
        ...

    @staticmethod
    def reads(settings: Any) -> tuple[str, ...]:
        """Names of the fields of a batch that it reads (`data.loader`); others are not built. It always has
        `sample_id`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A learner made of a loss alone: its rollout is the batch, every leaf of it `[N, ...]`."""

    loss: Callable[..., Loss]
    settings: SupervisedSettings = SupervisedSettings()

    def rollout(self, params: PyTree, frozen: PyTree, batch: PyTree, key: Array) -> dict[str, PyTree]:
        """The batch."""
        return {"samples": batch}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
      settings: dataclass of its section in the configuration.
      methods: by the name that `settings.method` holds; one without a name where there is nothing to choose.
    """

    settings: type[StageSettings]
    methods: dict[str, type[Method]]

    def method(self, settings: StageSettings) -> type[Method]:
        """The method that the settings name."""
        return self.methods[getattr(settings, "method", "")]

    def precomputable(self, settings: StageSettings) -> dict[str, tuple[str, ...]]:
        """{part of `rollouts.frozen_inputs`: fields of a batch that the stage does not read where it has that part}.

        A method that can read such parts says so by a static method of this name; others need not have it.
        """
        told = getattr(self.method(settings), "precomputable", None)
        return told(settings) if told else {}


STAGES: dict[str, Stage] = {}


def network_of(method: type) -> type:
    """The type of the descriptions of models that a method trains."""
    return getattr(method, "network", UAE)


def add_stage(name: str, method: type[Method]) -> None:
    """Registers a stage with one method; its section of the configuration is `config.NAME`."""
    STAGES[name] = Stage(method.Settings, {"": method})


def add_method(stage: str, name: str, method: type[Method]) -> None:
    """Registers one more method of a stage; its section of the configuration is `config.STAGE.NAME`."""
    STAGES[stage].methods[name] = method


def make_method(stage: str, settings: StageSettings, sampler: SamplerConfig, system: Described) -> Method:
    """The method of a stage's settings."""
    return STAGES[stage].method(settings)(settings, sampler, system)


def start_of(params: PyTree, optimizer: optax.GradientTransformation, settings: Any) -> TrainState:
    """The state of a stage at step 0, with the moving averages that its settings ask for."""
    return init_state(params, optimizer, ema=bool(settings.ema_decay), old=settings.old_policy is not None)


def build_step(
    method: Learner,
    optimizer: optax.GradientTransformation,
    shardings: Any = None,
    compiler_options: dict[str, str] | None = None,
) -> Callable:
    """The compiled `train_step(state, frozen, batch, key) -> (state, metrics)` of a method.

    Args:
      method: what is trained, and how.
      optimizer: of `training.optimizer`.
      shardings: of state and metrics, or None.
      compiler_options: of `nn.cpu.compiler`.
    """
    step = make_train_step(method, optimizer)
    return jax.jit(step, donate_argnames="state", out_shardings=shardings, compiler_options=compiler_options)


def make_train_step(method: Learner, optimizer: optax.GradientTransformation) -> Callable:
    """The train step as a pure function: one rollout, then `updates_per_rollout` updates.

    Update u takes the groups u, u + U, u + 2U, ... of the rollout. The random streams "rollout" and "loss" are folded
    from the stage's key and `state.step`, so that the same state gives the same step after a restart. Metrics are
    float32 scalars: `loss`, `grad_norm` (before clipping), `skipped_updates`, `outlier_updates`, and the method's own.

    Raises:
      ValueError: at trace time: samples that do not divide, a metric name used twice, or a missing moving average.
    """
    settings, group = method.settings, method.settings.samples_per_image
    updates, ema_decay, old_policy = settings.updates_per_rollout, settings.ema_decay or None, settings.old_policy
    compared = group if getattr(settings, "gradient_noise", False) else 0
    streams, prepared = streams_of(method), getattr(method, "prepared", None)

    def train_step(state: TrainState, frozen: PyTree, batch: PyTree, key: Array) -> tuple[TrainState, dict[str, Array]]:
        if (ema_decay is None) != (state.ema is None):
            raise ValueError("ema_decay and state.ema must both be set or both be None; see init_state(ema=True)")
        if (old_policy is None) != (state.old is None):
            raise ValueError("old_policy and state.old must both be set or both be None; see init_state(old=True)")
        frozen = frozen if prepared is None else prepared(frozen)
        sampler = state.params if state.old is None else state.old
        rollout = make_rollout(method, sampler, frozen, batch, step_key(key, "rollout", state.step))
        loss_key = step_key(key, "loss", state.step)
        parts = split_samples(rollout["samples"], updates, group)

        def update(state: TrainState, index: Array) -> tuple[TrainState, PyTree]:
            samples = jax.tree.map(lambda leaf: leaf[index], parts)
            slice_ = {"samples": samples, "shared": rollout["shared"], "update": index}
            own_key = jax.random.fold_in(loss_key, index)
            found = [
                gradients_of(loss, state.params, frozen, slice_, own_key, settings.micro_batches, compared=compared)
                for _, loss in streams.values()
            ]
            gradients, loss, metrics = joined_streams(streams, found)
            state, norm = apply_gradients(state, gradients, loss, optimizer, ema_decay)
            return state, (loss, norm, metrics)

        state, (losses, norms, stacked) = scan(update, state, jnp.arange(updates))
        own = {"loss": losses.mean(), "grad_norm": norms.mean(), "skipped_updates": state.skipped}
        own |= outlier_metrics(state.opt_state)
        metrics = join_metrics(own, rollout["metrics"], jax.tree.map(lambda leaf: leaf.sum(0), stacked))
        old = state.old if old_policy is None else follow(state, old_policy)
        return state.replace(step=state.step + 1, old=old), metrics

    return train_step


def make_rollout(method: Learner, params: PyTree, frozen: PyTree, batch: PyTree, key: Array) -> dict[str, PyTree]:
    """A rollout of the whole batch, `settings.rollout_parts` of it one after the other, with advantages.

    The samples do not depend on the number of parts: their keys are those of their images, and the advantages are
    those of the whole batch.

    Returns:
      `samples`, `shared` and `metrics`, without gradient; see `Learner.rollout`.

    Raises:
      ValueError: the batch does not divide into the parts.
    """
    count = method.settings.rollout_parts
    first = getattr(method, "captions_first", None)
    batch = batch if first is None else batch | first(params, frozen, batch, key)

    def part(rows: PyTree) -> dict[str, PyTree]:
        found = {"shared": {}, "metrics": {}, **method.rollout(params, frozen, with_floats(rows), key)}
        return found | {"metrics": as_pairs(found["metrics"])}

    if count == 1:
        rollout = part(batch)
    else:
        parts = split_samples(batch, count)
        found = jax.lax.map(part, parts)
        rows = len(jax.tree.leaves(parts)[0][0])
        how = {"shared": lambda leaf: leaf[0], "metrics": lambda leaf: leaf.sum(0)}
        joined = functools.partial(trees.joined, rows=rows)
        rollout = {name: jax.tree.map(how.get(name, joined), leaves) for name, leaves in found.items()}
    own = getattr(method, "advantages", None)
    own = own if "reward" in rollout["samples"] else None
    rollout = with_own_advantages(rollout, own) if own else with_advantages(rollout, method.settings)
    return jax.lax.stop_gradient(with_images(rollout))


def with_floats(batch: PyTree) -> PyTree:
    """The batch with its `pixels` in [-1, 1]; they are bytes until here, a quarter of what would go to the device."""
    if not isinstance(batch, Mapping) or "pixels" not in batch:
        return batch
    return {**batch, "pixels": signed(batch["pixels"])}


def with_images(rollout: dict[str, PyTree]) -> dict[str, PyTree]:
    """The rollout with its `images` in `shared`, and the row of its image in every sample."""
    if "images" not in rollout:
        return rollout
    images = jax.tree.leaves(rollout["images"])[0]
    group = len(jax.tree.leaves(rollout["samples"])[0]) // len(images)
    samples = rollout["samples"] | {"image": jnp.arange(len(images)).repeat(group)}
    shared = rollout["shared"] | {"images": rollout["images"]}
    return {name: value for name, value in rollout.items() if name != "images"} | {"samples": samples, "shared": shared}


def with_advantages(rollout: dict[str, PyTree], settings: Any) -> dict[str, PyTree]:
    """The rollout with the `advantage` of each sample over its group in place of its `reward`.

    A rollout without rewards, or of settings without groups, is returned as it is. Metrics gain `reward`, its spread
    and the share of degenerate groups (`rl.advantages`).
    """
    samples = dict(rollout["samples"])
    if "reward" not in samples or not hasattr(settings, "group_size"):
        return rollout
    reward, group = samples.pop("reward"), getattr(settings, "compared_samples", settings.group_size)
    advantage, metrics = group_advantages(reward.reshape(-1, group), scale=settings.advantage_scale)
    metrics = {"reward" if name == "reward_mean" else name: pair for name, pair in metrics.items()}
    samples["advantage"] = advantage.reshape(reward.shape)
    return rollout | {"samples": samples, "metrics": rollout["metrics"] | metrics}


def with_own_advantages(rollout: dict[str, PyTree], advantages: Callable[[Array], tuple[dict, Metrics]]) -> dict:
    """The rollout with what a method makes of the rewards of a whole batch, in place of its `reward`.

    Args:
      rollout: with `reward` among its samples.
      advantages: of the method, `reward -> (samples, metrics)`; it has them where one reward has several learners.
    """
    samples = dict(rollout["samples"])
    found, metrics = advantages(samples.pop("reward"))
    return rollout | {"samples": samples | found, "metrics": rollout["metrics"] | metrics}


def streams_of(method: Learner) -> Streams:
    """The losses of a method with their weights by stream; a single loss has no name."""
    found: Streams | None = getattr(method, "streams", None)
    return {"": (1.0, cast(SingleLoss, method).loss)} if found is None else found


def joined_streams(streams: Streams, found: Sequence[tuple[PyTree, Array, Metrics]]) -> tuple[PyTree, Array, Metrics]:
    """The weighted sum of the gradients and losses of all streams, and their metrics.

    Each stream is a mean of its own, over all micro-batches. Its metrics get its name in front, with its loss and the
    norm of its gradient among them. `kl` is then the largest of the streams' own.

    Args:
      streams: of `streams_of`.
      found: of `gradients_of`, one for each.
    """
    if "" in streams:
        return found[0]
    weights = [weight for weight, _ in streams.values()]
    gradients = jax.tree.map(
        lambda *leaves: sum(weight * leaf for weight, leaf in zip(weights, leaves)), *(own for own, _, _ in found)
    )
    loss = sum(weight * value for weight, (_, value, _) in zip(weights, found))
    metrics: dict[str, Any] = {}
    for name, (own, value, more) in zip(streams, found):
        pairs = as_pairs({**more, "loss": value, "grad_norm": optax.tree.norm(own)})
        metrics |= {f"{name}_{metric}": pair for metric, pair in pairs.items()}
    bounded = [total / jnp.maximum(count, 1e-8) for total, count in (more["kl"] for *_, more in found if "kl" in more)]
    return gradients, jnp.asarray(loss), metrics | ({"kl": (jnp.stack(bounded).max(), 1.0)} if bounded else {})


def gradients_of(
    loss: Callable[..., Loss],
    params: PyTree,
    frozen: PyTree,
    rollout: Mapping[str, PyTree],
    key: Array,
    micro_batches: int,
    *,
    compared: int = 0,
) -> tuple[PyTree, Array, Metrics]:
    """Gradient of sum / count over one update, one micro-batch at a time: (sum of gradients) / (sum of counts).

    Args:
      loss, params, frozen, rollout, key: of one update.
      micro_batches: parts of the update, or of each of its halves.
      compared: rows of an image where the gradients of two halves of the images are compared, else 0. The halves have
        other images, so that they are independent; the metrics are those of `rl.gradient_noise`.

    Returns:
      Gradients like `params`, the loss [], and metrics as (sum, count) pairs.

    Raises:
      ValueError: at trace time: the rows do not divide.
    """

    def objective(params: PyTree, samples: PyTree) -> tuple[Array, tuple[Array, Any]]:
        total, count, metrics = loss(params, frozen, {**rollout, "samples": samples}, key)
        return total.astype(jnp.float32), (jax.lax.stop_gradient(count).astype(jnp.float32), as_pairs(metrics))

    def micro_step(gradients: PyTree, samples: PyTree) -> tuple[PyTree, PyTree]:
        (total, (count, metrics)), new = jax.value_and_grad(objective, has_aux=True)(params, samples)
        gradients = jax.tree.map(lambda old, extra: old + extra.astype(jnp.float32), gradients, new)
        return gradients, (total, count, metrics)

    def sums(samples: PyTree) -> tuple[PyTree, Array, Array, Metrics]:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        parts = split_samples(samples, micro_batches)
        gradients, stacked = scan(micro_step, zeros, parts)
        total, count, metrics = jax.tree.map(lambda leaf: leaf.sum(0), stacked)
        return gradients, total, count, metrics

    noise: dict[str, Any] = {}
    if compared:
        halves = split_samples(rollout["samples"], 2, compared)
        found = [sums(jax.tree.map(lambda leaf, side=side: leaf[side], halves)) for side in (0, 1)]
        means = [jax.tree.map(lambda leaf, half=half: leaf / jnp.maximum(half[2], 1e-8), half[0]) for half in found]
        # a row may hold several drawings; the control without rewards has one image in each
        drawings = halves["advantage"][0].size if "advantage" in halves else len(jax.tree.leaves(halves)[0][0])
        noise |= noise_metrics(means[0], means[1], drawings)
        gradients, total, count, metrics = jax.tree.map(lambda one, other: one + other, *found)
    else:
        gradients, total, count, metrics = sums(rollout["samples"])
    scale = 1.0 / jnp.maximum(count, 1e-8)
    gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)
    return gradients, total / jnp.maximum(count, 1e-8), dict(metrics) | noise


def split_samples(samples: PyTree, parts: int, group_size: int = 1) -> PyTree:
    """The samples of a rollout in equal parts, see `trees.cut`.

    Raises:
      ValueError: N is no multiple of parts * group_size, or the leaves disagree on N.
    """
    sizes = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(samples)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"rollout samples need one common leading axis, found lengths {sizes}; put scalars and tables in 'shared'"
        )
    if sizes[0] % (parts * group_size):
        raise ValueError(
            f"{sizes[0]} samples of a rollout do not divide into {parts} parts of complete groups of {group_size}; "
            "change the batch size, updates_per_rollout or micro_batches"
        )
    return trees.cut(samples, parts, group_size)
