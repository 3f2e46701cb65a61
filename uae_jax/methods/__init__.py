"""What learns from what: one file for each method, and the registry of stages.

Reading order: `method` (what a method is, the train step), then any of `pretrain`, `align`, `cold_start`,
`gen_for_und`, `flow_grpo`, `diffusion_nft`, `joint`,
`caption_matching`.
"""

from uae_jax.methods.align import Align
from uae_jax.methods.caption_matching import CaptionMatching
from uae_jax.methods.cold_start import ColdStart
from uae_jax.methods.diffusion_nft import DiffusionNft
from uae_jax.methods.flow_grpo import FlowGrpo
from uae_jax.methods.gen_for_und import GenForUnd
from uae_jax.methods.joint import Joint
from uae_jax.methods.method import STAGES, Stage, add_method, add_stage
from uae_jax.methods.pretrain import Pretrain
from uae_jax.methods.und_for_gen import UndForGenConfig
from uae_jax.methods.unified_ar import UnifiedAr

add_stage("align", Align)
add_stage("pretrain", Pretrain)
add_stage("cold_start", ColdStart)
add_stage("gen_for_und", GenForUnd)
STAGES["und_for_gen"] = Stage(UndForGenConfig, {})
add_method("und_for_gen", "flow_grpo", FlowGrpo)
add_method("und_for_gen", "nft", DiffusionNft)
add_method("und_for_gen", "joint", Joint)
add_method("und_for_gen", "matching", CaptionMatching)
add_stage("unified_ar", UnifiedAr)

__all__ = ["STAGES", "Stage", "add_method", "add_stage"]
