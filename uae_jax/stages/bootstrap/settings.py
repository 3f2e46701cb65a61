"""Settings of the bootstrap: one section for each training, in the order in which they run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from uae_jax.settings import LAST_SEED, Settings, changed, setting
from uae_jax.training.optimizer import OptimizerConfig

PHASES = ("vae", "clip", "dinov2", "captioner", "decoder", "caption_scorer", "vq", "network")
UNIFIED = ("vq", "network")  # phases of a model of one network, beside image encoders of another one


def _optimizer(learning_rate: float, warmup_steps: int = 50) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate, schedule="cosine", warmup_steps=warmup_steps, b2=0.98, final_fraction=0.02
    )


@dataclasses.dataclass(frozen=True)
class WorldConfig(Settings):
    """The kind of scenes."""

    source: str = setting("scenes", "built-in scenes, or emoji of fetch_emoji", choices=("scenes", "emoji"))
    folder: str = setting("", "folder of the emoji")


@dataclasses.dataclass(frozen=True)
class PhaseConfig(Settings):
    """Settings of every training."""

    steps: int = setting(1500, "train steps", low=0)
    batch_size: int = setting(64, "images a step", low=1)
    optimizer: OptimizerConfig = _optimizer(1e-3)


@dataclasses.dataclass(frozen=True)
class VaePhase(PhaseConfig):
    """The auto-encoder."""

    batch_size: int = changed(PhaseConfig, "batch_size", 24)
    optimizer: OptimizerConfig = _optimizer(2e-3)
    model: dict[str, Any] = setting(
        dict(block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=16, sample_size=32),
        "sizes, fields of VAEConfig",
    )


@dataclasses.dataclass(frozen=True)
class ClipPhase(PhaseConfig):
    """The reward encoder."""

    steps: int = changed(PhaseConfig, "steps", 1800)
    batch_size: int = changed(PhaseConfig, "batch_size", 48)
    vision: dict[str, Any] = setting(
        dict(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
            projection_dim=64,
        ),
        "sizes of the image tower, fields of CLIPVisionConfig",
    )
    text: dict[str, Any] = setting(
        dict(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            projection_dim=64,
        ),
        "sizes of the text tower, fields of CLIPTextConfig",
    )


@dataclasses.dataclass(frozen=True)
class DinoPhase(PhaseConfig):
    """The held-out encoder."""

    model: dict[str, Any] = setting(
        dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=3, image_size=32, patch_size=8),
        "sizes, fields of Dinov2Config",
    )


@dataclasses.dataclass(frozen=True)
class CaptionerPhase(PhaseConfig):
    """The captioner, which leaves out most facts."""

    batch_size: int = changed(PhaseConfig, "batch_size", 40)
    optimizer: OptimizerConfig = _optimizer(1.5e-3, 100)
    text_weight: float = setting(0.5, "weight of the language model's loss on captions alone", low=0)
    # most facts are left out, and sometimes nearly all are stated
    detail_low: float = setting(0.1, "smallest probability of a fact in a caption", low=0, high=1)
    detail_high: float = setting(0.9, "largest probability of a fact in a caption", low=0, high=1)
    max_prompt: int = setting(40, "room for the caption prompt with its image", unit="tokens", low=1)
    text: dict[str, Any] = setting(
        dict(width=128, layers=4, heads=4, key_heads=2, mlp_width=384, mrope_section=(4, 6, 6)),
        "sizes of the language model, fields of TextConfig",
    )
    vision: dict[str, Any] = setting(
        dict(
            depth=4,
            width=96,
            heads=3,
            mlp_width=256,
            out_width=128,
            patch_size=4,
            window_size=16,
            full_attention_blocks=(1, 3),
        ),
        "sizes of the vision tower, fields of VisionConfig",
    )


@dataclasses.dataclass(frozen=True)
class DecoderPhase(PhaseConfig):
    """Projector and transformer, by flow matching."""

    # few, so that the decoder leaves much to learn (dev/builtin_models.md)
    steps: int = changed(PhaseConfig, "steps", 900)
    optimizer: OptimizerConfig = _optimizer(1e-3, 200)
    projector_width: int = setting(256, "inner width of the projector", low=1)
    ema_decay: float = setting(0.998, "ceiling of the moving average", above=0, high=1)
    time_shift: float = setting(4.0, "shift of the noise levels", above=0)
    condition_dropout: float = setting(0.1, "share of captions that are dropped", low=0, high=1)
    full_fraction: float = setting(0.6, "share of captions that state every fact", low=0, high=1)
    detail_high: float = setting(1.0, "largest probability of a fact in the other captions", low=0, high=1)
    caption_tokens: int = setting(28, "longest caption", unit="tokens", low=1)
    model: dict[str, Any] = setting(
        dict(
            sample_size=8,
            patch_size=2,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(),
            qk_norm="rms_norm",
        ),
        "sizes, fields of TransformerConfig",
    )


@dataclasses.dataclass(frozen=True)
class MistakesPhase(PhaseConfig):
    """An end of the decoder's phase on captions in which facts are wrong; 0 steps for none."""

    steps: int = changed(PhaseConfig, "steps", 0)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, warmup_steps=10)
    probability: float = setting(0.25, "probability that a fact is wrong", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class ScorerPhase(PhaseConfig):
    """The caption scorer of a control reward, which is no part of the method."""

    steps: int = changed(PhaseConfig, "steps", 1200)
    batch_size: int = changed(PhaseConfig, "batch_size", 48)
    full_fraction: float = setting(0.3, "share of captions that state every fact", low=0, high=1)
    text: dict[str, Any] = setting(
        dict(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=40,
        ),
        "sizes of its text tower, fields of CLIPTextConfig",
    )


@dataclasses.dataclass(frozen=True)
class VqPhase(PhaseConfig):
    """The image tokenizer of a unified model."""

    steps: int = changed(PhaseConfig, "steps", 2000)
    batch_size: int = changed(PhaseConfig, "batch_size", 16)
    optimizer: OptimizerConfig = _optimizer(2e-3)
    model: dict[str, Any] = setting(
        # the published layout has 32 groups in every norm: with 32 channels nothing would be left of a flat colour
        dict(codes=512, code_width=8, latent=64, base=64, multipliers=(1, 1, 1, 1), layers=1, grid=4),
        "sizes, fields of VQConfig",
    )


@dataclasses.dataclass(frozen=True)
class NetworkPhase(PhaseConfig):
    """The unified model but for its tokenizer: captions that leave out most facts, and drawings of any caption."""

    steps: int = changed(PhaseConfig, "steps", 1500)
    batch_size: int = changed(PhaseConfig, "batch_size", 32)
    optimizer: OptimizerConfig = _optimizer(1.5e-3, 100)
    detail_low: float = setting(0.1, "smallest probability of a fact in a caption", low=0, high=1)
    detail_high: float = setting(0.9, "largest probability of a fact in a caption", low=0, high=1)
    full_fraction: float = setting(0.6, "share of drawn captions that state every fact", low=0, high=1)
    caption_dropout: float = setting(0.1, "share of drawings without a caption, which guidance needs", low=0, high=1)
    image_weight: float = setting(1.0, "weight of the drawings' loss beside that of the captions", low=0)
    text: dict[str, Any] = setting(
        dict(width=128, layers=4, heads=4, key_heads=4, mlp_width=384, mrope_section=(16, 0, 0)),
        "sizes of the language model, fields of TextConfig",
    )
    vision: dict[str, Any] = setting(
        dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3, patch_size=8),
        "sizes of the image tower, fields of VisionConfig",
    )


@dataclasses.dataclass(frozen=True)
class BootstrapConfig(Settings):
    """A complete configuration of `configs/bootstrap.py`."""

    preset: str = setting("bootstrap", "name of the preset that the file was made from")
    seed: int = setting(0, "of all random numbers", low=0, high=LAST_SEED)
    phases: tuple[str, ...] = setting(PHASES[:5], "phases to run, in order", choices=PHASES)
    start: str = setting("", "folder with the parts that no phase makes; builtin for the built-in model")
    side: int = setting(32, "side of the images", unit="pixels", low=8)
    caption_tokens: int = setting(32, "longest caption with its stop token", unit="tokens", low=2)
    save_every: int = setting(200, "steps between checkpoints; 0 for the end alone", unit="steps", low=0)
    log_every: int = setting(10, "steps between lines of metrics", unit="steps", low=1)
    data: WorldConfig = WorldConfig()
    vae: VaePhase = VaePhase()
    clip: ClipPhase = ClipPhase()
    dinov2: DinoPhase = DinoPhase()
    captioner: CaptionerPhase = CaptionerPhase()
    decoder: DecoderPhase = DecoderPhase()
    mistakes: MistakesPhase = MistakesPhase()
    caption_scorer: ScorerPhase = ScorerPhase()
    vq: VqPhase = VqPhase()
    network: NetworkPhase = NetworkPhase()

    @property
    def unified(self) -> bool:
        """Whether the phases make a model of one network."""
        return bool(self.phases) and set(self.phases) <= set(UNIFIED)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and phases of two models."""
        yield from super().problems()
        if set(self.phases) & set(UNIFIED) and not self.unified:
            yield f"phases are {self.phases}; {' and '.join(UNIFIED)} make a model of their own: leave the others out"
