"""Model cards: made of a run's settings and scores, and kept by a conversion."""

import re

from configs import presets
from uae_jax.settings import frozen
from uae_jax.stages.folders.check import find_licence
from uae_jax.stages.model_card import converted_card, run_card, write_card
from uae_jax.stages.run_config import RunConfig

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


def summary(preset, names=STAGES):
    before, after = ({"value": value, "low": value - 0.1, "high": value + 0.1, "n": 64} for value in (0.3, 0.8))
    stages = [
        {"name": name, "steps": 7, "seconds": 12.3, "before": {"reward": before}, "after": {"reward": after}}
        for name in names
    ]
    return {"preset": preset, "seed": 5, "device": "1 x cpu", "stages": stages}


def test_a_card_has_base_models_licences_settings_and_scores(tmp_path):
    name = "qwen2_5_vl_3b_sd3_5_large@8xH200"
    values = presets.merged(presets.preset(name, STAGES).to_dict(), dict(model=dict(folder="/weights/UAE")))
    card = run_card(frozen(RunConfig, values), summary(name))
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front and "license: other" in front[1]
    for base in ("Qwen/Qwen2.5-VL-3B-Instruct", "stabilityai/stable-diffusion-3.5-large"):
        assert f"- {base}" in front[1] and f"https://huggingface.co/{base}" in card
    assert "medium" not in card and "Stability AI Community licence" in card
    assert "| reward | 0.300 [0.200, 0.400] | 0.800 [0.700, 0.900] | 64 |" in card
    assert "| pretrain | 7 | 256 | 12 |" in card and "Seed 5, on 1 x cpu" in card and "hf upload" in card
    write_card(tmp_path, card)
    assert find_licence(tmp_path, tmp_path) == "README: other"


def test_the_card_of_the_built_in_model_has_its_licence():
    card = run_card(frozen(RunConfig, presets.preset("tiny", STAGES).to_dict()), summary("tiny"))
    assert "license: apache-2.0" in card and "the built-in start model" in card and "base_model" not in card


def test_a_conversion_keeps_the_card_and_says_what_it_did(tmp_path):
    assert "license: other" in converted_card(tmp_path, {"layout": "hub", "dtype": "bfloat16"})
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    card = converted_card(tmp_path, {"layout": "hub", "dtype": "bfloat16"})
    assert card.startswith("---\nlicense: mit") and "# Mine" in card
    assert re.search(r"Converted by uae_jax \S+ from `.*`: layout hub, dtype bfloat16\.", card)
