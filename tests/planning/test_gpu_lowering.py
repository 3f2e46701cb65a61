"""Every stage is traced and lowered for NVIDIA GPUs, without a card: refusals of shapes and types would end a run
there.

The fast tests lower the medium model and the built-in one; `pytest -m slow tests/planning/test_gpu_lowering.py` does it
for every preset and mesh.
"""

import re

import gpu_programs
import jax
import pytest
from gpu_programs import STAGES, lower

from benchmarks.mini_checkpoint import write_configs
from configs import presets

MEDIUM = "qwen2_5_vl_3b_sd3_5_medium"
ONE, CUT, FSDP = (1, 1, 1), (1, 4, 2), (1, 8, 1)
BOTH = {"forward", "backward"}
# (T, S, K) of attention that is not small, by stage: 1,024 image tokens and 531 of the condition, padded to 1,568;
# prompts of 192, pictures of 324 patches and captions of 512 tokens
JOINT, LAST, IMAGES, TEXT = (1568, 1568, 64), (1024, 1568, 64), (1024, 1024, 64), (544, 544, 128)
PATCHES, PROMPT, CAPTION = (324, 324, 80), (192, 192, 128), (512, 704, 128)
DRAWING = {JOINT: {"forward"}, LAST: {"forward"}, IMAGES: {"forward"}, TEXT: {"forward"}}
LEARNING = {JOINT: BOTH, LAST: BOTH, IMAGES: BOTH, TEXT: {"forward"}}
EXPECTED = {
    "pretrain": LEARNING,
    "cold_start": LEARNING,
    "gen_for_und": DRAWING | {PATCHES: {"forward"}, PROMPT: BOTH, CAPTION: BOTH},
    "und_for_gen": LEARNING | {PATCHES: {"forward"}, PROMPT: {"forward"}},
}
# every full-size preset that is not of a TPU slice, on one device and cut; a preset of one card on that alone
FULL = [
    (name, sizes)
    for name in presets.PRESETS
    if name.startswith("qwen") and "@v" not in name and name not in presets.OWN
    for sizes in ((ONE,) if "@1x" in name else (ONE, CUT, FSDP))
]
# each decoder with a text encoder of its own once
OWN = (
    ("qwen2_5_vl_3b_klein_4b@1x24GB", ONE),
    ("qwen2_5_vl_3b_z_image_turbo", FSDP),
    ("qwen2_5_vl_7b_qwen_image", CUT),
    ("qwen2_5_vl_7b_qwen_image@8xH200", FSDP),
)


def check(found: gpu_programs.Lowered) -> None:
    """What holds for every stage in bfloat16: nothing leaves the card, nothing is wider than meant, memory is used
    again.
    """
    assert not re.search(r"xf64>|callback|stablehlo\.(infeed|outfeed|send|recv)", found.text)
    assert found.donated() == len(jax.tree.leaves(found.program.state))
    wider = [
        path for path in found.float32_products() if not re.search(r"autoencoder|image_encoder|bgd,cd->bgc$", path)
    ]  # the last contrasts features
    assert not wider, wider[:5]


@pytest.mark.parametrize("sizes", [pytest.param(ONE, marks=pytest.mark.slow), CUT], ids=["one", "cut"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_size_stage_is_lowered_for_cards(stage, sizes):
    found = lower(MEDIUM, stage, sizes)
    check(found)
    assert found.attention() == EXPECTED[stage]


@pytest.mark.slow
@pytest.mark.parametrize("preset, sizes", FULL)
def test_every_stage_of_every_full_size_preset_is_lowered_for_cards(preset, sizes):
    for stage in presets.preset(preset, STAGES).stages:
        found = lower(preset, stage, sizes)
        check(found)
        expected = dict(EXPECTED[stage])
        if "_large" in preset:
            del expected[IMAGES]  # no block has a second attention
        assert found.attention() == expected, (preset, stage)


@pytest.mark.slow
@pytest.mark.parametrize("preset, sizes", OWN)
def test_a_decoder_with_a_text_encoder_is_lowered_for_cards(preset, sizes):
    for stage in presets.preset(preset, STAGES).stages:
        found = lower(preset, stage, sizes)
        check(found)
        assert found.attention()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_small_stage_is_lowered_for_cards(stage):
    found = lower("tiny", stage, ONE, dtype="bfloat16", remat="full")
    check(found)
    assert not found.attention()  # at these lengths the formula is as fast


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ONE, (1, 2, 2), (2, 1, 1)], ids=["one", "cut", "data"])
@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_small_models_are_lowered_for_cards_on_every_mesh(preset, sizes, tmp_path):
    if preset == "mini":
        write_configs(tmp_path)
    for stage in STAGES:
        found = lower(
            preset, stage, sizes, folder=tmp_path if preset == "mini" else None, dtype="bfloat16", remat="full"
        )
        check(found)
        assert bool(found.attention()) == (preset == "mini")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, dtype, stage", [("Tesla T4", "bfloat16", "und_for_gen"), ("NVIDIA H200", "float32", "cold_start")]
)
def test_cards_and_precisions_without_fused_attention_are_lowered_too(kind, dtype, stage):
    found = lower(MEDIUM, stage, ONE, kind, dtype=dtype)
    assert not found.attention() and found.donated()
