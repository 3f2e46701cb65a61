"""What a stage trains: parts as they are, new adapters, or fully fine-tuned copies beside their reference.

A part `NAME_lora` is an adapter of the part NAME, and `NAME_policy` a fully fine-tuned copy of it. The part NAME itself
is then the reference policy, and stays frozen.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uae_jax import trees
from uae_jax.models.uae import UAE
from uae_jax.nn.lora import init_lora

LORA, COPY = "_lora", "_policy"
# the folder in which a model keeps the adapter of a part
ADAPTER_FOLDERS = {"language": "llm_lora", "transformer": "dit_lora"}
# parts that may be stored in bfloat16 while nothing trains them; auto-encoder and image encoders compute in float32
STORABLE: tuple[str, ...] = (
    *("vision", "language", "projector", "text_encoder", "transformer"),
    *("aligner", "generation"),
)


def copied_parts(names: Collection[str]) -> set[str]:
    """The parts of which some of the trained ones are fully fine-tuned copies."""
    return {name.removesuffix(COPY) for name in names if name.endswith(COPY)}


def trainable(model: UAE, parts: Mapping, names: Collection[str], rank: int, key: Array) -> dict:
    """The trained parts at the start of a stage.

    Args:
      model: for the modules that a new adapter changes.
      parts: the model's dictionary.
      names: as `Method.trains` gives them.
      rank, key: of new adapters.

    Returns:
      Each part by name: the one that there is, a new adapter equal to the base, or a float32 copy of the base.

    Raises:
      ValueError: the model has no such part.
    """
    targets = model.lora_targets
    found = {}
    for name in names:
        if name in parts:
            found[name] = parts[name]
        elif name.removesuffix(COPY).removesuffix(LORA) not in parts:
            raise ValueError(
                f"the model has no {name} to train: its decoder has a text encoder of its own; gen_for_und trains its "
                "captioner, and pretrain its transformer with --config.pretrain.train_projector=False"
            )
        elif name.endswith(COPY):
            found[name] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parts[name.removesuffix(COPY)])
        else:
            base = name.removesuffix(LORA)
            found[name] = init_lora(trees.name_key(key, name), parts[base], targets[base], rank)
    return found


def check_start(parts: Mapping, stage: str, names: Collection[str]) -> None:
    """Checks that a model as it was read can be trained as a stage's settings say.

    Args:
      parts: the model's dictionary.
      stage: its name; names: what it trains.

    Raises:
      ValueError: the model has an adapter that full fine-tuning would leave out, or a fully fine-tuned copy that an
        adapter would.
    """
    for name in names:
        base = name.removesuffix(COPY).removesuffix(LORA)
        if name.endswith(COPY) and f"{base}{LORA}" in parts:
            raise ValueError(
                f"config.{stage}.train is 'full', but the model's folder has an adapter, {ADAPTER_FOLDERS[base]}, "
                "which full fine-tuning would leave out; add it to the weights by --config.model.merge_adapters=True, "
                f"or train the adapter by --config.{stage}.train=lora"
            )
        if name.endswith(LORA) and f"{base}{COPY}" in parts:
            raise ValueError(
                f"config.{stage}.train is 'lora', but the model's folder has a fully fine-tuned {base} model, llm "
                f"beside llm_reference; train that model by --config.{stage}.train=full, or remove llm_reference, so "
                "that llm is the reference too"
            )


def stored(parts: Mapping, needed: Collection[str], dtype: str) -> dict:
    """Frozen parts in the precision in which a stage stores them.

    Args:
      parts: the frozen parts, arrays or tracers.
      needed: parts in float32, since this stage or a later one trains or copies them (`RunConfig.trained_from`).
      dtype: of the others among `STORABLE`.
    """
    return {
        name: jax.tree.map(lambda leaf: _cast(leaf, dtype), part) if name in STORABLE and name not in needed else part
        for name, part in parts.items()
    }


def _cast(leaf: Any, dtype: str) -> Any:
    """A leaf in another precision; kernels of 8 bits stay as they are."""
    return leaf if leaf.dtype == jnp.int8 else leaf.astype(dtype)


def store(parts: dict, needed: Collection[str], dtype: str) -> None:
    """`stored` in place: a leaf in its old precision is gone before the next is cast, if nothing else holds it.

    Args:
      parts: the frozen parts, arrays; those that are cast get new dictionaries.
      needed, dtype: of `stored`.
    """
    for name in [name for name in parts if name in STORABLE and name not in needed]:
        leaves = trees.flatten(parts.pop(name))
        for leaf in leaves:
            leaves[leaf] = _cast(leaves[leaf], dtype)
        parts[name] = trees.unflatten(leaves)


def with_policy_as_transformer(parts: Mapping) -> dict:
    """The parts with the fully fine-tuned transformer, if any, in place of its reference.

    Programs without a reference are then the same before and after und_for_gen. Supervised stages go on from it.
    """
    rest = dict(parts)
    policy = rest.pop(f"transformer{COPY}", None)
    return rest if policy is None else {**rest, "transformer": policy}
