"""Settings: read from mappings with every mistake at once, described, and compared."""

import dataclasses
import math
from collections.abc import Iterator

import ml_collections
import pytest

from uae_jax.settings import (
    Meaning,
    Mistakes,
    Settings,
    as_dict,
    changed,
    describe,
    differences,
    frozen,
    read,
    sections,
    setting,
)
from uae_jax.stages.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Inner(Settings):
    """A section."""

    rate: float = setting(0.5, "share that is kept", low=0, high=1, unit="of all", source="a paper")
    kind: str = setting("round", "shape", choices=("round", "square"))


@dataclasses.dataclass(frozen=True)
class Other(Inner):
    """The same section with another default."""

    rate: float = changed(Inner, "rate", 0.25, source="another paper")
    kind: str = changed(Inner, "kind", "square")


@dataclasses.dataclass(frozen=True)
class Outer(Settings):
    """Settings with sections of both kinds."""

    steps: int = setting(10, "how long", low=1)
    sizes: tuple[int, ...] = setting((1, 2), "of the parts", low=1)
    pair: tuple[str, float] = setting(("a", 1.0), "a name and its weight")
    fast: bool = setting(False, "whether it is fast")
    inner: Inner = Inner()
    round: Inner = Inner(rate=0.75)
    own: dict = sections(lambda: {"first": Inner, "second": Other})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.fast and self.steps > 100:
            yield f"steps is {self.steps}; a fast run has at most 100"


def test_what_is_not_written_is_the_default_and_the_mapping_comes_back():
    made = frozen(Outer, {"steps": 3, "inner": {"rate": 1}, "second": {"kind": "round"}})
    assert made.steps == 3 and made.sizes == (1, 2) and made.inner == Inner(rate=1.0)
    assert type(made.inner.rate) is float and made.own == {"first": Inner(), "second": Other(kind="round")}
    values = as_dict(made)
    assert values["second"] == {"rate": 0.25, "kind": "round"} and "own" not in values
    assert frozen(Outer, values) == made == frozen(Outer, ml_collections.ConfigDict(values))


def test_a_section_begins_with_what_its_owner_has():
    assert frozen(Outer, {"round": {"kind": "square"}}).round == Inner(0.75, "square")
    assert frozen(Outer, {"inner": {"kind": "square"}}).inner == Inner(0.5, "square")
    made, mistakes = read(Outer, {"round": {"rate": 2.0, "kind": "square"}})
    assert made.round == Inner(0.75, "square") and len(mistakes) == 1
    optimizer = frozen(RunConfig, {"pretrain": {"optimizer": {"b2": 0.98}}}).stage("pretrain").optimizer
    assert optimizer == dataclasses.replace(RunConfig().stage("pretrain").optimizer, b2=0.98)
    assert optimizer.warmup_steps == 500 and optimizer.schedule == "cosine"


def test_lists_become_tuples():
    made = frozen(Outer, {"sizes": [3], "pair": ["b", 2]})
    assert made.sizes == (3,) and made.pair == ("b", 2.0) and type(made.pair[1]) is float


@pytest.mark.parametrize(
    "values, line",
    [
        ({"stepz": 1}, "config.stepz does not exist; did you mean config.steps?"),
        ({"zzz": 1}, "config.zzz does not exist; config has steps, sizes, pair, fast, inner, round, first, second"),
        ({"inner": {"raet": 1}}, "config.inner.raet does not exist; did you mean config.inner.rate?"),
        ({"secnd": {}}, "config.secnd does not exist; did you mean config.second?"),
        ({"steps": 1.0}, "config.steps is 1.0; it must be of type int"),
        ({"steps": True}, "config.steps is True; it must be of type int"),
        ({"fast": 1}, "config.fast is 1; it must be of type bool"),
        ({"inner": {"kind": 3}}, "config.inner.kind is 3; it must be of type str"),
        ({"inner": {"rate": "x"}}, "config.inner.rate is 'x'; it must be of type float"),
        ({"inner": 3}, "config.inner is 3; it is a section with fields of its own"),
        ({"first": 3}, "config.first is 3; it is a section with fields of its own"),
        ({"sizes": 3}, "config.sizes is 3; it must be a tuple such as (3,)"),
        ({"sizes": (1, "b")}, "config.sizes[1] is 'b'; it must be of type int"),
        ({"pair": ("a",)}, "config.pair is ('a',); it must have 2 entries"),
        ({"steps": 0}, "config.steps is 0; it must be at least 1"),
        ({"sizes": (1, 0)}, "config.sizes is (1, 0); it must be at least 1"),
        ({"inner": {"rate": 1.5}}, "config.inner.rate is 1.5; it must be at least 0, at most 1"),
        ({"second": {"rate": -0.5}}, "config.second.rate is -0.5; it must be at least 0, at most 1"),
        ({"inner": {"rate": math.nan}}, "config.inner.rate is nan; it must be at least 0, at most 1"),
        ({"pair": ("a", math.inf)}, "config.pair is ('a', inf); it must be a finite number"),
        (
            {"inner": {"kind": "rund"}},
            "config.inner.kind is 'rund'; choose one of round, square; did you mean 'round'?",
        ),
        ({"inner": {"kind": "x"}}, "config.inner.kind is 'x'; choose one of round, square"),
        ({"steps": 101, "fast": True}, "config.steps is 101; a fast run has at most 100"),
    ],
)
def test_a_mistake_names_its_field_its_value_and_what_is_right(values, line):
    made, mistakes = read(Outer, values)
    assert mistakes == [line] and isinstance(made, Outer)
    with pytest.raises(Mistakes) as wrong:
        frozen(Outer, values)
    assert wrong.value.lines == [line] and str(wrong.value) == line


def test_all_mistakes_are_told_at_once_and_the_rest_is_kept():
    values = {
        "steps": 0,
        "stepz": 1,
        "fast": True,
        "inner": {"rate": 2.0, "kind": "rund"},
        "first": {"rate": 0.75, "kynd": "round"},
        "second": {"rate": "much"},
    }
    made, mistakes = read(Outer, values)
    assert [line.split()[0] for line in mistakes] == [
        "config.stepz",
        "config.inner.rate",
        "config.inner.kind",
        "config.first.kynd",
        "config.second.rate",
        "config.steps",
    ]
    assert made == Outer(fast=True, own={"first": Inner(rate=0.75), "second": Other()})


def test_construction_checks_what_reading_checks():
    with pytest.raises(Mistakes, match="^steps is 0; it must be at least 1$"):
        Outer(steps=0)
    with pytest.raises(Mistakes, match="^rate is nan"):
        dataclasses.replace(Inner(), rate=math.nan)


def test_a_changed_default_keeps_the_meaning_and_not_the_source():
    (rate, kind), (base, _) = dataclasses.fields(Other), dataclasses.fields(Inner)
    meaning = rate.metadata["meaning"]
    assert (rate.default, meaning.source) == (0.25, "another paper")
    assert dataclasses.replace(meaning, source="a paper") == base.metadata["meaning"]
    assert kind.default == "square" and kind.metadata["meaning"].choices == ("round", "square")

    @dataclasses.dataclass(frozen=True)
    class Ours(Inner):
        rate: float = changed(Inner, "rate", 0.1, above=0, low=None)

    (ours, _) = dataclasses.fields(Ours)
    assert ours.metadata["meaning"].source == "" and ours.metadata["meaning"].text == "share that is kept"
    with pytest.raises(Mistakes, match="rate is 0.0; it must be above 0, at most 1"):
        Ours(rate=0.0)
    assert Inner(rate=0.0).rate == 0.0


def test_describe_shows_type_default_value_range_meaning_unit_and_source():
    made = frozen(Outer, {"inner": {"rate": 0.75}})
    lines = describe(Outer, made)
    assert lines[:2] == ["config.steps: int = 10", "    how long (at least 1)"]
    place = lines.index("config.inner.rate: float = 0.5; here 0.75")
    assert lines[place + 1] == "    share that is kept [of all] (at least 0, at most 1); a paper"
    assert "config.second.rate: float = 0.25" in lines and "    shape (round | square)" in lines
    assert "config.sizes: tuple[int, ...] = (1, 2)" in lines
    assert describe(Outer, made, wanted="second.kind") == [
        "config.second.kind: str = 'square'",
        "    shape (round | square)",
    ]
    assert describe(Outer, made, wanted="inner") == lines[place : place + 4]
    assert describe(Outer, made, wanted="inn") == []


def test_differences_have_both_values_and_a_missing_section_is_one():
    old = {"a": 1, "b": [1, 2], "c": {"x": 0.5, "y": ()}, "gone": {"x": 1, "y": 2}}
    new = {"a": 1, "b": (1, 2), "c": {"x": 0.25, "y": (), "z": None}, "new": True}
    assert differences(old, new) == [
        "c.x was 0.5 and is 0.25",
        "c.z was absent and is None",
        "gone was set and is absent",
        "new was absent and is True",
    ]
    assert differences(old, old) == [] == differences({"b": [[1]]}, {"b": ((1,),)})
    (long,) = differences({"text": "a" * 100}, {"text": "b"})
    assert len(long) < 100 and long.endswith("... and is 'b'")


# ---- the settings of a run ----


def test_every_setting_of_a_run_says_what_it_is():
    lines = describe(RunConfig, RunConfig())
    names, meanings = lines[::2], lines[1::2]
    assert len(names) > 150 and all(line.startswith("config.") for line in names)
    assert all(line.startswith("    ") and len(line.strip()) > 10 for line in meanings)
    assert any(line.startswith("config.und_for_gen.nft.levels: int = 10") for line in names)


def test_the_methods_that_are_not_chosen_are_checked_too():
    flow, nft = {"method": "flow_grpo"}, {"method": "nft"}
    for chosen, section, line in (
        (flow, {"nft": {"levels": 0}}, "config.und_for_gen.nft.levels is 0; it must be at least 1"),
        (nft, {"flow_grpo": {"window": 0}}, "config.und_for_gen.flow_grpo.window is 0; it must be at least 1"),
        (
            nft,
            {"flow_grpo": {"step_rule": "cps", "grpo_guard": True}},
            "config.und_for_gen.flow_grpo.grpo_guard needs the Gaussian",
        ),
        (
            nft,
            {"flow_gpro": {}},
            "config.und_for_gen.flow_gpro does not exist; did you mean config.und_for_gen.flow_grpo",
        ),
    ):
        _, mistakes = read(RunConfig, {"und_for_gen": {**chosen, **section}})
        assert len(mistakes) == 1 and mistakes[0].startswith(line)


def test_a_window_must_fit_the_steps_of_the_method_that_has_it():
    few = {"sampler_steps": 4}
    _, mistakes = read(RunConfig, {"und_for_gen": {"method": "flow_grpo", **few}})
    assert (
        len(mistakes) == 1 and "flow_grpo.window is 3 steps in [0, 5]; it does not fit into the first 3" in mistakes[0]
    )
    assert read(RunConfig, {"und_for_gen": {"method": "nft", **few}})[1] == []


def test_a_run_tells_mistakes_of_all_sections_at_once():
    values = {
        "stages": ("pretrain", "warm_start"),
        "model": {"dtype": "float16"},
        "pretrain": {"optimizer": {"learning_rate": 0.0}},
        "gen_for_und": {"reward": {"names": ("clip",), "weights": ()}},
        "und_for_gen": {"reward": {"overlong_penalty": 0.5}},
        "guard": {"gradient_ratio": 0.5},
        "mesh": {"fsdp": -1},
    }
    made, mistakes = read(RunConfig, values)
    assert [line.split()[0] for line in mistakes] == [
        "config.model.dtype",
        "config.mesh.data,",
        "config.guard.gradient_ratio",
        "config.pretrain.optimizer.learning_rate",
        "config.gen_for_und.reward.names",
        "config.und_for_gen.reward.overlong_penalty",
        "config.stages",
    ]
    assert made == RunConfig()


def test_counts_fit_the_integers_of_devices():
    meaning = Meaning("steps", low=1)
    assert meaning.problem(2**31 - 1) is None
    assert meaning.problem(10**20) == "it must be at most 2147483647"
    assert Meaning("seed", low=0, high=2**32 - 1).problem(2**32 - 1) is None
