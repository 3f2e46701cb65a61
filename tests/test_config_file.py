"""Configuration files: by name or by path, and changed by a command line."""

import sys

import pytest

from configs import presets
from uae_jax.config_file import apply_overrides, find_config, load_config, parse_value, split_overrides

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """What a configuration adds to the import path is gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_built_in_configuration_is_found_by_name_and_by_path():
    by_name, preset = find_config("unified_grpo:mini")
    assert by_name.name == "unified_grpo.py" and preset == "mini"
    assert find_config(str(by_name)) == (by_name, None) and find_config("configs/unified_grpo.py") == (by_name, None)
    assert load_config("unified_grpo:mini") == load_config(f"{by_name}:mini") == presets.preset("mini", STAGES)
    assert load_config("evaluate").stages == ()


@pytest.mark.parametrize(
    "name, message",
    [
        ("unified_gpro", "there is no configuration unified_gpro; did you mean unified_grpo?"),
        ("configs/ablation.py", "there is no configuration configs/ablation.py; did you mean ablations?"),
        (
            "zzz",
            "there is no configuration zzz; built in are ablations, bootstrap, cold_start, evaluate, gen_for_und, ",
        ),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name, message):
    with pytest.raises(FileNotFoundError) as error:
        find_config(name)
    assert str(error.value).startswith(message) and "presets" not in str(error.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("unified_grpo:huge", "choose one of tiny, emoji, mini, qwen2_5_vl_3b_sd3_5_medium, "),
        ("unified_grpo:qwen2_5_vl_3b_sd3_5_medum@1x24GB", "did you mean qwen2_5_vl_3b_sd3_5_medium@1x24GB?"),
        ("unified_grpo:qwen2_5_vl_3b_sd3_5_medium@1xRTX4090", "qwen2_5_vl_3b_sd3_5_medium is for @v5e-64, "),
        ("unified_ar:janus_pro_1b@1x25GB", "janus_pro_1b is for @"),
        ("bootstrap:huge", "choose one of tiny"),
    ],
)
def test_an_unknown_preset_is_told_with_those_that_are_near(name, message):
    """A line that names all presets has three thousand letters, and nobody finds the own one in it."""
    with pytest.raises(ValueError) as error:
        load_config(name)
    told = str(error.value)
    assert told.startswith(f"unknown preset {name.partition(':')[2]!r}; {message}") and len(told) < 400


def test_a_file_elsewhere_imports_its_neighbours_and_the_built_in_ones(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import my_neighbour\n"
        "from configs import presets\n\n\n"
        "def get_config(preset=None):\n"
        "    config = presets.preset('tiny', ('pretrain',))\n"
        "    config.seed = my_neighbour.SEED\n"
        "    config.preset = preset or 'mine'\n"
        "    return config\n"
    )
    (tmp_path / "my_neighbour.py").write_text("SEED = 7\n")
    config = load_config(str(tmp_path / "mine.py"))
    assert (config.seed, config.preset, config.stages) == (7, "mine", ("pretrain",))
    assert load_config(f"{tmp_path / 'mine.py'}:other").preset == "other"
    del sys.modules["my_neighbour"]


def test_a_file_without_the_function_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="empty.py has no function get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_both_forms_of_a_flag_are_split_from_the_others():
    arguments = ["--config=a", "--config.seed=1", "--workdir", "w", "--config.data.folder", "--x", "--config.text=a=b"]
    pairs, others = split_overrides(arguments)
    assert pairs == [("seed", "1"), ("data.folder", "--x"), ("text", "a=b")]
    assert others == ["--config=a", "--workdir", "w"]
    assert split_overrides(["--config.seed"]) == ([("seed", "")], [])


@pytest.mark.parametrize(
    "text, present, value",
    [
        ("3", 1, 3),
        ("-3", 1, -3),
        ("3", 1.0, 3.0),
        ("1e-4", 1.0, 1e-4),
        ("True", False, True),
        ("false", True, False),
        ("0", True, False),
        ("5", "text", "5"),
        ("('a',)", "text", "('a',)"),
        ("", "text", ""),
        ("('a', 'b')", (), ("a", "b")),
        ("['a']", (), ("a",)),
        ("a", (), ("a",)),
        ("a,b", (), ("a", "b")),
        ("a, b,", (), ("a", "b")),
        ("1,2", (3,), (1, 2)),
        ("1", (3,), (1,)),
        ("0.5", (1.0,), (0.5,)),
        ("()", (3,), ()),
        ("", (3,), ()),
        ("(('projector',0.1),)", (), (("projector", 0.1),)),
    ],
)
def test_a_text_takes_the_type_of_the_value_that_is_there(text, present, value):
    found = parse_value(text, present)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, present, message",
    [
        ("many", 1, "of type int"),
        ("1.5", 1, "of type int"),
        ("True", 1, "of type int"),
        ("x", 0.5, "of type float"),
        ("True", 0.5, "of type float"),
        ("yes", False, "True or False"),
        ("3", {"a": 1}, "a section; name one of its fields"),
    ],
)
def test_a_text_of_another_type_is_refused(text, present, message):
    with pytest.raises(ValueError, match=message):
        parse_value(text, present)


def test_overrides_change_a_copy_and_tell_every_mistake():
    config = presets.preset("tiny", STAGES).to_dict()
    changed, mistakes = apply_overrides(
        config,
        [
            ("seed", "3"),
            ("und_for_gen.nft.levels", "5"),
            ("gen_for_und.group_sise", "4"),
            ("gen_for_und.group_size", "many"),
            ("zzz.steps", "4"),
            ("seed.more", "4"),
            ("model", "x"),
            ("reward.names", "clip"),
        ],
    )
    assert (changed["seed"], changed["und_for_gen"]["nft"]["levels"]) == (3, 5)
    assert (config["seed"], config["und_for_gen"]["nft"]["levels"]) == (0, 2)
    assert mistakes[:3] == [
        "config.gen_for_und.group_sise does not exist; did you mean config.gen_for_und.group_size?",
        "config.gen_for_und.group_size is 'many'; it must be of type int",
        f"config.zzz does not exist; config has {', '.join(config)}",
    ]
    assert mistakes[3] == "config.seed.more does not exist; config.seed has no fields"
    assert mistakes[4] == "config.model is 'x'; it is a section; name one of its fields"
    assert mistakes[5].startswith("config.reward does not exist; ") and len(mistakes) == 6
