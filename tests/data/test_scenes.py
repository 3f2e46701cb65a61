import numpy as np
import pytest

from uae_jax.data import scene_captions, scene_checker, scene_prompts, scenes, sources
from uae_jax.data.scenes import Scene, SceneObject
from uae_jax.stages.bootstrap import captioner

EXAMPLE = Scene("gray", (SceneObject(1, 1, "square", "blue", "small"), SceneObject(0, 0, "circle", "red", "large")))
FULL = "gray background , top left large red circle , bottom right small blue square"


def many(count=300, split="train"):
    return [scenes.scene_at(split, i, seed=3) for i in range(count)]


def test_full_caption_is_the_canonical_form():
    assert scene_captions.caption(EXAMPLE) == FULL
    assert len(scenes.facts(EXAMPLE)) == 9


def test_scene_refuses_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="share a cell"):
        Scene("gray", (SceneObject(0, 0, "circle", "red", "large"),) * 2)
    with pytest.raises(ValueError, match="'pink'"):
        SceneObject(0, 0, "circle", "pink", "large")
    with pytest.raises(ValueError, match="background 'red'"):
        Scene("red", ())


@pytest.mark.parametrize("side", [8, 17, 32, 50])
def test_drawing_has_the_side_asked_for_and_repeats(side):
    picture = scenes.draw(EXAMPLE, side)
    assert picture.shape == (side, side, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, scenes.draw(EXAMPLE, side))


def test_drawing_is_the_same_scene_at_every_side():
    small, large = scenes.draw(EXAMPLE, 32), scenes.draw(EXAMPLE, 64).astype(float)
    pooled = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(pooled - small).mean() < 1.5


def test_sizes_differ_clearly():
    for shape in scenes.SHAPES:
        small, large = (scenes.coverage(shape, size, 0, 0, 32).sum() for size in scenes.SIZES)
        assert large > 2.5 * small > 20


def test_splits_are_disjoint_and_repeatable():
    train, test = set(many(400)), set(many(400, "test"))
    assert not train & test
    assert many(20) == many(20)
    assert scenes.scene_at("train", 0, 1) != scenes.scene_at("train", 1, 1)
    assert {len(s.objects) for s in train} == {1, 2, 3, 4}
    share = np.mean([scenes.split_of(scenes.sample_scene(np.random.default_rng(i))) == "test" for i in range(2000)])
    assert 0.07 < share < 0.13
    with pytest.raises(ValueError, match="split 'validation'"):
        scenes.scene_at("validation", 0)


def test_vocabulary_is_small_and_covers_every_style():
    words = set(scene_captions.WORDS)
    assert len(words) == len(scene_captions.WORDS) < 64
    rng = np.random.default_rng(0)
    for scene in many():
        for style in scene_captions.applicable_styles(scene):
            assert set(scene_captions.style_caption(scene, style, rng).split()) <= words


def test_every_caption_written_from_a_scene_is_true():
    rng = np.random.default_rng(1)
    seen = set()
    for scene in many():
        full = scene_checker.caption_score(scene, scene_captions.caption(scene))
        assert full.fact_recall == full.fact_precision == 1.0 and full.claimed == full.total
        texts = [scene_captions.caption(scene, rng, d, shuffle=s) for d in (0.0, 0.3, 0.8, 1.0) for s in (False, True)]
        styles = scene_captions.applicable_styles(scene)
        seen |= set(styles)
        texts += [scene_captions.style_caption(scene, style, rng) for style in styles]
        texts += [scene_captions.mixed_caption(scene, rng)]
        for text in texts:
            score = scene_checker.caption_score(scene, text)
            assert text and not score.unparsed and score.claimed and score.fact_precision == 1.0, text
    assert seen == set(scene_captions.STYLES)


def test_detail_sets_the_expected_recall():
    rng = np.random.default_rng(2)
    means = [
        np.mean([scene_checker.caption_score(s, scene_captions.caption(s, rng, d)).fact_recall for s in many()])
        for d in (0.2, 0.5, 0.9)
    ]
    assert means[0] < 0.3 < means[1] < 0.6 < 0.75 < means[2] < 0.95


@pytest.mark.parametrize(
    "text, correct, claimed, recalled",
    [
        ("gray background", 1, 1, 1),
        ("white background", 0, 1, 0),
        ("gray background , gray background", 1, 2, 1),
        ("red circle , red circle", 2, 4, 2),
        ("two red circle", 2, 4, 2),
        ("red red circle", 2, 3, 2),
        ("large blue circle", 2, 3, 2),
        ("red circle left of blue square", 5, 5, 4),
        ("red circle right of blue square", 4, 5, 4),
        ("blue square below circle", 4, 4, 3),
        ("red circle and blue square", 4, 4, 4),
        ("blorp red circle", 2, 3, 2),
        ("object", 0, 1, 0),
        ("of of", 0, 2, 0),
        ("left of circle", 1, 3, 1),
        ("red circle above", 2, 3, 2),
        ("top left object", 1, 1, 1),
        ("top left", 1, 1, 1),
        ("red , square", 2, 2, 2),
        ("", 0, 0, 0),
        ("circle top", 1, 2, 1),
        (FULL + " , " + FULL, 9, 18, 9),
        (FULL.replace(" , ", ", "), 9, 9, 9),
    ],
)
def test_caption_scores(text, correct, claimed, recalled):
    score = scene_checker.caption_score(EXAMPLE, text)
    assert (score.correct, score.claimed, score.recalled, score.total) == (correct, claimed, recalled, 9)


def test_recall_by_kind_adds_up_to_the_recall():
    score = scene_checker.caption_score(EXAMPLE, f"{EXAMPLE.background} background , large red object , square")
    assert score.recall_by_kind == {"background": 1.0, "position": 0.0, "size": 0.5, "colour": 0.5, "shape": 0.5}
    for text in (FULL, "red circle , red circle", "two circle", ""):
        score = scene_checker.caption_score(EXAMPLE, text)
        assert [sum(column) for column in zip(*score.kinds.values())] == [score.recalled, score.total]


def test_matching_is_the_best_one_to_one():
    scene = Scene("black", (SceneObject(0, 0, "circle", "red", "small"), SceneObject(0, 1, "circle", "blue", "small")))
    # A greedy match of the first mention to the first circle would lose the colour of the second mention.
    assert scene_checker.caption_score(scene, "circle , red circle").fact_precision == 1.0
    assert scene_checker.caption_score(scene, "red circle , red circle").correct == 3


def test_long_nonsense_is_scored_quickly_and_low():
    score = scene_checker.caption_score(EXAMPLE, " , ".join(["red circle"] * 60 + ["of and"] * 20))
    assert score.fact_precision < 0.05 and score.fact_recall < 0.5


def test_unknown_detail_or_style_is_refused():
    with pytest.raises(ValueError, match="not in"):
        scene_captions.caption(EXAMPLE, np.random.default_rng(0), 1.5)
    with pytest.raises(ValueError, match="needs rng"):
        scene_captions.caption(EXAMPLE, detail=0.5)
    with pytest.raises(ValueError, match="counting"):
        scene_captions.style_caption(EXAMPLE, "counting", np.random.default_rng(0))


@pytest.mark.parametrize("side", [32, 48])
def test_drawings_read_back_exactly(side):
    every = many(400) + many(200, "test")
    pictures = np.stack([scenes.draw(s, side) for s in every])
    assert scene_checker.read_pictures(pictures) == every
    assert (scene_checker.picture_scores(every, pictures) == 1).all()


def share_read(every, pictures):
    """The share of the pictures that are read as their scenes exactly."""
    return np.mean([seen == scene for seen, scene in zip(scene_checker.read_pictures(pictures), every, strict=True)])


def test_reading_survives_noise_and_blur():
    every = many(600)
    clean = np.stack([scenes.draw(s) for s in every]).astype(float)
    noisy = clean + np.random.default_rng(0).normal(0, 12, clean.shape)
    noisy = np.clip(noisy, 0, 255).astype(np.uint8)
    assert share_read(every, noisy) >= 0.99
    padded = np.pad(clean, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = np.mean([padded[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)], 0)
    assert share_read(every, blurred) >= 0.95


def test_picture_score_counts_the_facts_found():
    wrong = Scene("gray", (SceneObject(1, 1, "square", "blue", "small"), SceneObject(0, 0, "circle", "green", "large")))
    assert scene_checker.picture_scores([EXAMPLE], scenes.draw(wrong)[None])[0] == pytest.approx(8 / 9)
    empty = Scene("gray", ())
    assert scene_checker.read_picture(scenes.draw(empty)) == empty
    assert scene_checker.picture_scores([EXAMPLE], scenes.draw(empty)[None])[0] == pytest.approx(1 / 9)
    more = Scene("gray", EXAMPLE.objects + (SceneObject(0, 1, "cross", "cyan", "small"),))
    assert scene_checker.picture_scores([EXAMPLE], scenes.draw(more)[None])[0] == 1
    with pytest.raises(ValueError, match="even S"):
        scene_checker.read_picture(scenes.draw(EXAMPLE, 31))


def test_prompts_follow_the_schema_and_repeat():
    prompts = scene_prompts.scene_prompts(20)
    assert prompts == scene_prompts.scene_prompts(20) != scene_prompts.scene_prompts(20, seed=1)
    assert [p["tag"] for p in prompts] == [tag for tag in scene_prompts.TAGS for _ in range(20)]
    assert all(set(p["prompt"].split()) <= set(scene_captions.WORDS) for p in prompts)
    with pytest.raises(ValueError, match="tags among"):
        scene_prompts.scene_prompts(3, tags=("shape",))


def test_no_training_caption_is_a_prompt_of_an_unseen_text():
    unseen, seen, every = (
        {p["prompt"] for p in scene_prompts.scene_prompts(360, texts=t)} for t in scene_prompts.TEXTS
    )
    assert unseen | seen == every and not unseen & seen
    for tag in scene_prompts.TAGS:
        shares = [
            len({p["prompt"] for p in scene_prompts.scene_prompts(360, tags=(tag,), texts=t)})
            for t in ("unseen", "all")
        ]
        assert 0.2 <= shares[0] / shares[1] <= 1 / 3, tag
    said = set()
    for kind, more in (
        ("short", {}),
        ("mixed", {}),
        ("detail", {"low": 0.1, "high": 0.4}),
        ("short", {"mistakes": 0.3}),
    ):
        source = sources.SceneSource(captions=kind, **more)
        said |= {source[index].caption for index in range(3000)}
    said |= {captioner.low_detail_caption(scene, np.random.default_rng(7), 0.1, 0.3) for scene in many(1000)}
    assert not said & unseen and len(said & seen) > 100
    # nor one that says the same in another order
    assert not any(scene_captions.withheld(text) for text in said)


@pytest.mark.parametrize(
    "text, other",
    [
        ("red circle and blue square", "blue square and red circle"),
        ("red circle and blue square", "blue square , red circle"),
        ("circle left of square", "square right of circle"),
        ("circle above square", "square below circle"),
    ],
)
def test_texts_of_one_meaning_are_withheld_together(text, other):
    colours = [(a, b) for a in scenes.COLOURS for b in scenes.COLOURS if a != b]
    pairs = [tuple(words.replace("red", a).replace("blue", b) for words in (text, other)) for a, b in colours]
    found = [tuple(scene_captions.withheld(words) for words in pair) for pair in {*pairs}]
    assert all(first == second for first, second in found)
    assert not scene_captions.withheld("top left " + text) and not scene_captions.withheld("apple and octopus")


def test_exact_counts_allow_no_other_object():
    one = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "red circle"}
    alone = Scene("gray", EXAMPLE.objects[:1])
    assert [
        scene_prompts.check_scene(one, scene, exact=exact) for scene in (alone, EXAMPLE) for exact in (False, True)
    ] == [
        True,
        True,
        True,
        False,
    ]
    both = {"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}]}
    assert scene_prompts.check_scene(both, EXAMPLE, exact=True)


def test_prompt_checker_agrees_with_the_caption_checker():
    every = many(150)
    pictures = [scenes.draw(s) for s in every]
    prompts = scene_prompts.scene_prompts(12)
    outcomes = set()
    for prompt in prompts:
        if prompt["tag"] == "counting":
            continue
        for scene, picture in zip(every, pictures):
            right = scene_prompts.check_scene(prompt, scene)
            outcomes.add((prompt["tag"], right))
            assert right == (scene_checker.caption_score(scene, prompt["prompt"]).fact_precision == 1.0)
    assert len(outcomes) == 10


def test_prompt_checker_on_pictures():
    picture = scenes.draw(EXAMPLE)
    entry = {
        "tag": "position",
        "prompt": "circle left of square",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    }
    assert scene_prompts.check_prompt(entry, picture)
    entry["include"][1]["position"] = ["right of", 0]
    assert not scene_prompts.check_prompt(entry, picture)
    three = Scene("black", tuple(SceneObject(i // 2, i % 2, "cross", "cyan", "small") for i in range(3)))
    for count in (2, 3, 4):
        entry = {"tag": "counting", "include": [{"class": "cross", "count": count}], "prompt": ""}
        assert scene_prompts.check_prompt(entry, scenes.draw(three)) == (count == 3)


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
def test_a_share_of_the_facts_is_said_wrong(mistakes):
    rng = np.random.default_rng(0)
    pairs = [
        (scene, scene_captions.mistaken(scene, rng, mistakes))
        for scene in (scenes.scene_at("train", index) for index in range(300))
    ]
    facts = [
        (true[1:], seen[1:])
        for scene, other in pairs
        for true, seen in zip(scenes.facts(scene), scenes.facts(other), strict=True)
    ]
    assert all(true == seen for true, seen in facts if true[0] == "position")
    wrong = np.mean([true != seen for true, seen in facts if true[0] != "position"])
    assert abs(wrong - mistakes) < (0.05 if 0 < mistakes < 1 else 1e-9)
