"""What a step gathers once, at its beginning, because it reads it in every evaluation of the decoder."""

from collections.abc import Mapping

from uae_jax.methods.stage_settings import DecodedRollouts
from uae_jax.sharding import gather_over_fsdp

DECODER = ("transformer", "transformer_lora")  # of the parts, where they are frozen


def gathered_decoder(settings: DecodedRollouts, frozen: Mapping) -> Mapping:
    """The frozen parts, with `gather_decoder` those of `DECODER` complete on every device.

    Drawing reads the transformer once a denoising step, and a loss once more for each micro-batch and step of its
    window. Cut over `fsdp` it would be received from the other devices each time.
    """
    if not settings.gather_decoder:
        return frozen
    parts = {name: frozen[name] for name in DECODER if name in frozen}
    return {**frozen, **gather_over_fsdp(parts)}
