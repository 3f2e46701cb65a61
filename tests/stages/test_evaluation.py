"""Held-out scores belong to pictures: neither the batch size nor a last batch that is not full moves them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from stage_pieces import changed, make_run

from uae_jax import sharding
from uae_jax.data.scene_checker import caption_score
from uae_jax.methods.stage_settings import denoising
from uae_jax.stages.batching import in_batches
from uae_jax.stages.data import open_sources
from uae_jax.stages.evaluation import DecoderEvaluator

IMAGES = 5
ADVANCED: dict[tuple[int, bool], int] = {}  # rows that a bar over the scores was told of, by batch size and kind


@pytest.fixture(scope="module")
def scored(whole, tmp_path_factory):
    """Scores, sample folder, evaluator of five pictures, and scores of two of them, for batches of four (the second
    holds one picture) and of five.
    """
    found = {}
    for size in (4, 5):
        settings = dataclasses.replace(
            whole.config.evaluation, images=IMAGES, images_during=2, batch_size=size, samples=IMAGES
        )
        _, examples = open_sources(whole.config.data, whole.config.seed, IMAGES)
        evaluator = DecoderEvaluator(
            whole.system,
            settings,
            denoising(whole.system.model, whole.config.sampler, settings.sampler_steps, settings.guidance_scale),
            examples,
            whole.rows,
            whole.config.data.max_caption,
            whole.config.seed,
        )
        folder = tmp_path_factory.mktemp(f"batches_of_{size}")
        done: list[int] = []
        evaluator.advance = done.append
        scores = evaluator(whole.parts, folder)
        ADVANCED[size, True] = sum(done)
        done.clear()
        found[size] = scores, folder, evaluator, evaluator.during(whole.parts)
        ADVANCED[size, False] = sum(done)
    return found


@pytest.mark.trap(39)
@pytest.mark.parametrize("size", [4])
def test_a_last_batch_that_is_not_full_is_not_counted_twice(scored, size):
    expected, scores = scored[5][0], scored[size][0]
    assert scores.keys() == expected.keys() and scores["reward"]["n"] == IMAGES
    for name in expected:
        assert scores[name]["n"] == expected[name]["n"], name
        for part in ("value", "low", "high"):
            assert scores[name][part] == pytest.approx(expected[name][part], abs=1e-4), name


@pytest.mark.parametrize("size", [4])
def test_every_picture_keeps_its_caption_and_drawing_in_any_batch(scored, size):
    expected, samples = (json.loads((scored[number][1] / "samples.json").read_text()) for number in (5, size))
    assert len({sample["caption"] for sample in expected}) > 1
    assert [sample["caption"] for sample in samples] == [sample["caption"] for sample in expected]
    for ours, theirs in zip(samples, expected, strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=2e-4)


@pytest.mark.parametrize("size", [4, 5])
def test_scores_are_compiled_once_and_padding_adds_no_program(scored, size):
    evaluator = scored[size][2]
    assert [function._cache_size() for function in (evaluator._write, evaluator._picture, evaluator._compare)] == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("complete", [True, False])
def test_a_bar_over_the_scores_ends_full(scored, size, complete):
    assert ADVANCED[size, complete] == scored[size][2].rows_of(complete)


def test_scores_are_means_over_pictures(scored):
    scores, folder, evaluator, _ = scored[4]
    samples = json.loads((folder / "samples.json").read_text())
    assert scores["reward"]["value"] == pytest.approx(
        np.mean([sample["scores"]["clip"] for sample in samples]), abs=1e-4
    )
    assert scores["heldout_score"]["value"] == pytest.approx(
        np.mean([sample["scores"]["dinov2"] for sample in samples]), abs=1e-4
    )
    assert scores["unified_score"]["value"] == pytest.approx(
        (scores["reward"]["value"] + scores["heldout_score"]["value"]) / 2
    )
    said = [
        caption_score(example.scene, sample["caption"])
        for example, sample in zip(evaluator.examples, samples, strict=True)
    ]
    assert scores["fact_recall"]["value"] == pytest.approx(np.mean([score.fact_recall for score in said]))


@pytest.mark.trap(39)
@pytest.mark.parametrize("count", range(1, 10))
def test_batches_are_filled_with_their_own_rows_and_cut_again(count):
    sizes = []

    def doubled(rows):
        sizes.append(len(rows["id"]))
        assert set(rows["id"]) <= set(range(count))
        return {"twice": 2 * rows["id"], "id": jax.numpy.asarray(rows["id"])}

    found = in_batches(doubled, 4, {"id": np.arange(count)})
    np.testing.assert_array_equal(found["id"], np.arange(count))
    np.testing.assert_array_equal(found["twice"], 2 * np.arange(count))
    assert sizes == [4] * -(-count // 4)


def test_scores_during_a_stage_are_those_of_the_first_pictures(scored):
    scores, folder, _, found = scored[4]
    first = json.loads((folder / "samples.json").read_text())[:2]
    for name, key in (
        ("reward", "clip"),
        ("heldout_score", "dinov2"),
        ("fact_recall", "fact_recall"),
        ("scene_accuracy", "scene_accuracy"),
    ):
        assert found[name] == pytest.approx(np.mean([sample["scores"][key] for sample in first]), abs=1e-4)
    assert found.keys() < scores.keys()


@pytest.mark.parametrize("count", [1, 5, 8, 11])
def test_batches_are_sharded_over_the_devices_that_share_them(count):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    seen = []

    def double(rows):
        seen.append((rows.shape, len({str(shard.index) for shard in rows.addressable_shards})))
        return rows * 2

    rows = np.arange(count * 3.0).reshape(count, 3)
    np.testing.assert_array_equal(in_batches(double, 3, rows, mesh=mesh), rows * 2)
    assert set(seen) == {((4, 3), 4)}, "three rows are rounded up to four, one for each share of the mesh"


@pytest.mark.slow
def test_scores_do_not_depend_on_the_devices(config, tmp_path):
    mixed = changed(config, evaluation=dict(images=5, questions="builtin"), mesh=dict(data=2, fsdp=2, tensor=2))
    (tmp_path / "one").mkdir(), (tmp_path / "eight").mkdir()
    one = make_run(changed(mixed, mesh=dict(data=1, fsdp=1, tensor=1)), tmp_path / "one")
    eight = make_run(mixed, tmp_path / "eight", devices=8)
    with sharding.in_use(eight.mesh):
        sharded = eight.scores(eight.parts, tmp_path / "eight")
    with sharding.in_use(one.mesh):
        alone = one.scores(one.parts, tmp_path / "one")
    assert sharded.keys() == alone.keys()
    for name, score in alone.items():
        assert sharded[name]["value"] == pytest.approx(score["value"], abs=2e-3), name
