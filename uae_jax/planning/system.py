"""The system of a run that is planned: of a folder's configs where one is given, otherwise of the published sizes."""

from uae_jax.data.loader import BatchSpec, check_max_prompt
from uae_jax.models.uae import UAE
from uae_jax.planning import published
from uae_jax.stages.abstract import AbstractSystem, abstract_folder, part_shapes, with_run_adapters
from uae_jax.stages.run_config import RunConfig


def abstract_system(config: RunConfig) -> AbstractSystem:
    """The system of a run, without weights.

    Raises:
      FileNotFoundError, ValueError: a config of the folder is absent or not supported.
    """
    planned = config.model.sizes and not config.model.folder
    return with_run_adapters(config, _published(config) if planned else abstract_folder(config))


def _published(config: RunConfig) -> AbstractSystem:
    settings, data = config.model, config.data
    captioner, decoder = published.using(
        settings.sizes, dtype=settings.dtype, remat=settings.remat, lora_alpha=settings.lora_alpha
    )
    rows, columns = grid = published.PROCESSOR.grid_of(data.image_size, data.image_size)
    prompt = published.CAPTION_PROMPT_TOKENS + published.PROCESSOR.image_tokens(grid)
    check_max_prompt(data.max_prompt or prompt, prompt, data.image_size)
    spec = BatchSpec(data.image_size, rows * columns, data.max_prompt or prompt, data.max_caption)
    model = UAE(captioner, decoder, data.image_size)
    width = published.PROJECTOR_RATIO * captioner.text.width
    parts = part_shapes(captioner, decoder, width, published.ENCODERS)
    return AbstractSystem(model, parts, dict(published.ENCODERS), captioner.stop_token_ids, published.PROCESSOR, spec)
