"""The recipes are those of the tables in docs/recipes.md, value for value."""

import ast
import pathlib
import re

import pytest

from configs import presets
from configs.recipes import RECIPES
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "recipes.md"
STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
BASE = "qwen2_5_vl_7b_sd3_5_medium"


def told() -> list[tuple[str, str, object]]:
    """(recipe, field, value) of every cell of a table whose columns are recipes."""
    found, columns = [], []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif cells[0] == "field":
            columns = [cell.strip("`") if cell.strip("`") in RECIPES else None for cell in cells]
        elif columns and not set(line) <= set("|- "):
            found += [
                (name, cells[0].strip("`"), ast.literal_eval(cell.strip("`")))
                for name, cell in zip(columns, cells)
                if name and cell
            ]
    return found


def value_of(config: dict, path: str) -> object:
    for name in path.split("."):
        config = config[name]
    return tuple(config) if isinstance(config, list) else config


def test_the_page_tells_every_recipe():
    cells = told()
    assert {name for name, *_ in cells} == set(RECIPES) - {"flow_grpo_prefix"} and len(cells) > 60


@pytest.mark.parametrize("recipe, path, value", told())
def test_a_value_of_the_page_is_that_of_the_recipe(recipe, path, value):
    config = presets.preset(f"{BASE}+{recipe}", STAGES).to_dict()
    assert value_of(config, path) == value


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("machine", ["", "@1xH200", "@8xH200", "@v5e-64"])
def test_a_recipe_is_a_valid_configuration_and_says_something(recipe, machine):
    name = f"{BASE}{machine}+{recipe}"
    settings = frozen(RunConfig, presets.preset(name, STAGES).to_dict())
    assert settings.stages == RECIPES[recipe].stages and settings.preset == name
    if recipe.startswith("paper_v5"):
        assert settings.trains("gen_for_und") == ("language_policy",)
        assert settings.data.caption_prompt.count("\n\n") == 1 and "expert" not in settings.data.caption_prompt
    elif settings.stage("und_for_gen").batch_size != 64:  # a batch that 64 devices can share
        assert settings.stage("und_for_gen").batch_size == 48


def test_recipes_are_joined_and_refused():
    joined = presets.preset(f"{BASE}+paper_v5+nft", STAGES)
    assert joined.stages == ("gen_for_und", "und_for_gen") and joined.und_for_gen.method == "nft"
    with pytest.raises(ValueError, match="there is no tiny\\+paper_v5; recipes are paper_v5"):
        presets.preset("tiny+paper_v5", STAGES)
    with pytest.raises(ValueError, match="there is no .*paper_v4"):
        presets.preset(f"{BASE}+paper_v4", STAGES)
    with pytest.raises(ValueError, match="has the stage gen_for_und, and the configuration runs pretrain"):
        presets.preset(f"{BASE}+paper_v5", ("pretrain",))


def test_prompts_of_the_paper_are_in_the_configuration():
    prompt = presets.preset(f"{BASE}+paper_v5", STAGES).data.caption_prompt
    assert re.match(r"Your task is: .*quotes\.\n\nNow, carefully .* description\.$", prompt)
