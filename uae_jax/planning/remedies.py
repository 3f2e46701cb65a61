"""What to do where a stage does not fit: flags that need less memory, from those that cost least on."""

from typing import Any


def _twice(parts: int, samples: int) -> int | None:
    """Twice as many parts of the samples; None where they cannot be that many."""
    return 2 * parts if samples % (2 * parts) == 0 else None


def _half(count: int, whole: int) -> int | None:
    """Half of a chunk, or of everything where the chunk is 0; None where it is one already."""
    return max((count or whole) // 2, 1) if (count or whole) > 1 else None


def smaller(stage: str, settings: Any) -> tuple[str, ...]:
    """Flags that lower the memory of a stage and leave its results as they are.

    Args:
      stage: its name.
      settings: of the stage.
    """
    images = settings.batch_size
    samples = images * getattr(settings, "group_size", 1)
    values: dict[str, Any] = {"micro_batches": _twice(settings.micro_batches, samples)}
    if hasattr(settings, "vae_chunk"):
        values["vae_chunk"] = _half(settings.vae_chunk, samples)
    if hasattr(settings, "gather_weights"):
        values["rollout_parts"] = _twice(settings.rollout_parts, images)
        values["gather_weights"] = False if settings.gather_weights else None
        values["train"] = "lora" if settings.train == "full" else None
    return tuple(f"--config.{stage}.{name}={value}" for name, value in values.items() if value is not None)
