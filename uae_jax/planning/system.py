"""The system of a run that is planned: of a folder's configs where one is given, otherwise of the published sizes."""

from typing import Any

from uae_jax.data.loader import BatchSpec, check_max_prompt
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.janus import config as janus_config
from uae_jax.models.janus.unified import Unified
from uae_jax.models.uae import UAE
from uae_jax.planning import published
from uae_jax.stages.abstract import AbstractSystem, eight_bit_shapes, part_shapes, with_run_adapters
from uae_jax.stages.kinds import abstract_folder
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.unified_system import AbstractUnified, unified_shapes, unified_spec


def abstract_system(config: RunConfig) -> Any:
    """The system of a run, without weights.

    Raises:
      FileNotFoundError, ValueError: a config of the folder is absent or not supported.
    """
    if config.model.folder or not config.model.sizes:
        return with_run_adapters(config, abstract_folder(config))
    published_system = _published_unified if config.model.sizes in janus_config.SIZES else _published
    return with_run_adapters(config, published_system(config))


def _published_unified(config: RunConfig) -> AbstractUnified:
    settings, data = config.model, config.data
    network = janus_config.SIZES[settings.sizes].using(
        dtype=settings.dtype, remat=settings.remat, lora_alpha=settings.lora_alpha
    )
    spec = unified_spec(data, published.JANUS_PROMPT_TOKENS + network.vision.tokens)
    template = ConditionTemplate(published.JANUS_PREFIX, published.JANUS_SUFFIX, (), network.pad_token_id)
    parts = unified_shapes(network, published.ENCODERS)
    model, encoders = Unified(network, template), dict(published.ENCODERS)
    return AbstractUnified(model, parts, encoders, network.stop_token_ids, spec)


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
    if settings.decoder_weights == "int8":
        parts = eight_bit_shapes(decoder, parts)
    return AbstractSystem(model, parts, dict(published.ENCODERS), captioner.stop_token_ids, published.PROCESSOR, spec)
