"""Settings of inference; a module of its own, so that `--help` need not import the models."""

import dataclasses
from collections.abc import Iterator, Sequence

from uae_jax.diffusion.schedule import KINDS
from uae_jax.rollouts.conditions import CONDITIONS
from uae_jax.settings import LAST_SEED, Settings, setting

LEAST_TEMPERATURE = 1e-4  # logits over a lesser one pass the range of float32


def deciding_condition(used: Sequence[str]) -> str:
    """What the decoder reads after stages that used these conditions, in order: the last that is not `reference`."""
    return next((name for name in reversed(used) if name != "reference"), "reference")


@dataclasses.dataclass(frozen=True)
class InferenceConfig(Settings):
    """Settings of inference; the defaults are the release's (official demo.py)."""

    seed: int = setting(42, "of sampled captions and of noise", low=0, high=LAST_SEED)
    steps: int = setting(40, "denoising steps", low=1, high=10_000)
    guidance_scale: float = setting(5.0, "1 is without guidance", low=0, high=1000)
    size: int = setting(1024, "side of the generated images", unit="pixels", low=1, high=16_384)
    temperature: float = setting(0.7, "of captions; 0 is greedy", low=0, high=1000)
    top_p: float = setting(1.0, "probability mass that captions are sampled from", above=0, high=1)
    max_new_tokens: int = setting(512, "longest caption", unit="tokens", low=1, high=131_072)
    shift: float = setting(3.0, "static shift of the noise levels", low=0.001, high=1000)
    schedule: str = setting("diffusers", "kind of schedule, see diffusion.schedule", choices=KINDS)
    prompt: str = setting("", "instruction to the captioner")
    system_prompt: str = setting("", "the system turn before it; empty for that of the chat template")
    negative_prompt: str = setting("", "what guidance moves away from")
    control_tokens: bool = setting(
        False, "names such as <|im_end|> in texts are control tokens, as in the release, and not plain text"
    )
    batch_size: int = setting(1, "images in one compiled call", low=1, high=65_536)
    condition: str = setting(
        "reference",
        "what the decoder reads of a caption: the text encoded by the reference or by the policy, or the caption's own "
        "states after the image, which reconstructions alone have",
        choices=CONDITIONS,
    )

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and a temperature that is not 0 and yet too small for float32."""
        yield from super().problems()
        if 0 < self.temperature < LEAST_TEMPERATURE:
            yield f"temperature is {self.temperature!r}; it must be 0, or at least {LEAST_TEMPERATURE:g}"
