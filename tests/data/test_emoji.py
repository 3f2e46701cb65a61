"""Scenes of emoji: fetched with checksums, drawn as captions say, split without overlap, read back exactly."""

import json
import os
import pickle
import subprocess
import sys

import emoji_pieces
import numpy as np
import pytest

from uae_jax import fetch_emoji
from uae_jax.data import emoji, emoji_files, scene_captions, scene_checker, scenes
from uae_jax.data.emoji import EmojiObject, EmojiScene, EmojiSet, EmojiSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return emoji_pieces.write_emoji(tmp_path_factory.mktemp("emoji"), patch)


@pytest.fixture(scope="module")
def drawn(folder):
    return EmojiSet(folder)


def many(drawn, count=200, split="train"):
    return [drawn.scene_at(split, index, seed=5) for index in range(count)]


def test_the_folder_holds_the_emoji_with_short_names(drawn):
    assert list(drawn.names) == emoji_pieces.TAKEN  # "top hat" and "hot dog" are not short names
    assert len(set(drawn.words)) == len(drawn.words) and {"apple", "top", "describe", "pink"} <= set(drawn.words)


def test_another_process_has_the_same_emoji(drawn):
    other = pickle.loads(pickle.dumps(drawn))
    np.testing.assert_array_equal(other.draw(many(drawn, 1)[0]), drawn.draw(many(drawn, 1)[0]))


def test_the_emoji_that_look_alike_are_dropped():
    pictures = [emoji_pieces.picture(0, "red"), emoji_pieces.picture(1, "blue"), emoji_pieces.picture(0, "#fe0000")]
    assert emoji_files.most_different(pictures, 2) == [0, 1]


@pytest.mark.parametrize(
    "name, short",
    [
        ("octopus", True),
        ("red apple", True),
        ("top hat", False),
        ("hot dog", False),
        ("ox", True),
        ("one", False),
        ("red", True),
        ("pink", False),
        ("A", False),
        ("rice ball", False),
        ("red above", False),
    ],
)
def test_short_names(name, short):
    assert emoji_files.short_name(name) == short


def test_the_command_takes_archives_that_are_there_and_is_done_once(tmp_path, monkeypatch, capsys):
    emoji_pieces.write_archives(tmp_path / "packages")
    emoji_pieces.pin(tmp_path / "packages", monkeypatch)
    monkeypatch.setenv("PATH", "")
    fetch_emoji.main([f"--folder={tmp_path}", "--count=4"])
    assert "4 emoji are in" in capsys.readouterr().out and len(EmojiSet(tmp_path).names) == 4
    fetch_emoji.main([f"--folder={tmp_path}", "--count=4"])
    assert "holds 4 emoji already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .* holds 4 emoji, not 5"):
        fetch_emoji.main([f"--folder={tmp_path}", "--count=5"])


def test_an_archive_with_another_checksum_is_refused_by_name(tmp_path):
    emoji_pieces.write_archives(tmp_path / "packages")  # not pinned
    done = subprocess.run(
        [sys.executable, "-m", "uae_jax.fetch_emoji", f"--folder={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("error: ")
        and emoji_files.PICTURE_ARCHIVE.file in done.stderr
        and "checksum" in done.stderr
    )
    assert not (tmp_path / emoji.INDEX_FILE).exists()


def test_without_npm_or_network_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="npm is not installed: .* put lobehub-fluent-emoji-3d-1.1.0.tgz into"):
        fetch_emoji.main([f"--folder={tmp_path}"])
    npm = tmp_path / "npm"
    npm.write_text(
        "#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho 'npm error network request failed' >&2\nexit 1\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    with pytest.raises(
        SystemExit, match=r"npm cannot fetch @lobehub/fluent-emoji-3d@1.1.0 \(code ENOTFOUND; network request failed\)"
    ):
        fetch_emoji.main([f"--folder={tmp_path}"])


def test_what_npm_fetched_is_kept_only_with_the_right_checksum(tmp_path, monkeypatch):
    emoji_pieces.write_archives(tmp_path / "there")
    npm = tmp_path / "npm"
    npm.write_text(
        f'#!/bin/sh\nto=${{3#--pack-destination=}}\ncp "{tmp_path}/there/{emoji_files.PICTURE_ARCHIVE.file}" "$to"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    with pytest.raises(ValueError, match="checksum"):
        fetch_emoji.fetch(emoji_files.PICTURE_ARCHIVE, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())
    emoji_pieces.pin(tmp_path / "there", monkeypatch)
    fetch_emoji.fetch(emoji_files.PICTURE_ARCHIVE, tmp_path / "packages")
    assert [path.name for path in (tmp_path / "packages").iterdir()] == [emoji_files.PICTURE_ARCHIVE.file]


def test_a_folder_that_is_not_whole_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="emoji.json does not exist: fetch the emoji with"):
        EmojiSet(tmp_path)
    folder = emoji_pieces.write_emoji(tmp_path, monkeypatch)
    row = json.loads((folder / "emoji.json").read_text())["emoji"][1]
    (folder / row["file"]).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{row['file']} is not the image that was fetched"):
        EmojiSet(folder)
    (folder / row["file"]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{row['file']} does not exist"):
        EmojiSet(folder)
    (folder / "emoji.json").write_text("{}")
    with pytest.raises(ValueError, match="emoji.json cannot be read"):
        EmojiSet(folder)


def test_scenes_and_drawings_repeat_and_refuse_what_does_not_exist(drawn, folder):
    again = EmojiSet(folder)
    assert many(drawn, 20) == many(again, 20) != [drawn.scene_at("train", index, seed=6) for index in range(20)]
    scene = many(drawn, 1)[0]
    np.testing.assert_array_equal(drawn.draw(scene, 32), again.draw(scene, 32))
    assert {len(one.objects) for one in many(drawn)} == {1, 2, 3}
    with pytest.raises(ValueError, match="no 'unicorn'"):
        EmojiScene("white", (EmojiObject(0, 0, "unicorn", "large"),), drawn)
    with pytest.raises(ValueError, match="background 'red'"):
        EmojiScene("red", (), drawn)
    with pytest.raises(ValueError, match="even number"):
        drawn.draw(scene, 33)


def test_a_scene_is_drawn_as_its_caption_says(drawn):
    scene = EmojiScene(
        "blue above green", (EmojiObject(0, 1, "red apple", "large"), EmojiObject(1, 0, "dog", "small")), drawn
    )
    assert (
        scene_captions.caption(scene)
        == "blue above green background , top right large red apple , bottom left small dog"
    )
    picture = drawn.draw(scene, 64)
    assert (picture[:32, :32] == emoji.COLOURS["blue"]).all() and (picture[32:, 32:] == emoji.COLOURS["green"]).all()
    changed = [
        (picture != drawn.draw(EmojiScene("blue above green", (item,), drawn), 64)).any() for item in scene.objects
    ]
    assert all(changed) and (picture[:32, 32:] != emoji.COLOURS["blue"]).any(-1).sum() > 300


def test_test_scenes_hold_a_combination_or_a_layout_that_training_never_shows(drawn):
    def shown(scenes):
        layouts = {(item.name, item.position, item.size) for scene in scenes for item in scene.objects}
        names = [sorted({item.name for item in scene.objects}) for scene in scenes]
        return layouts, {(a, b) for row in names for a in row for b in row if a < b}

    layouts, pairs = shown(many(drawn, 1500))
    for scene in many(drawn, 300, "test"):
        own_layouts, own_pairs = shown([scene])
        assert emoji.split_of(scene) == "test" and (own_layouts - layouts or own_pairs - pairs)


def test_captions_and_pictures_read_back_exactly(drawn):
    rng, words = np.random.default_rng(0), set(drawn.words)
    for scene in many(drawn) + many(drawn, 60, "test"):
        full = scene_checker.caption_score(scene, scene_captions.caption(scene))
        assert full.fact_recall == full.fact_precision == 1 and full.total == 1 + 3 * len(scene.objects)
        assert full.recall_by_kind == dict.fromkeys(("background", "position", "size", "name"), 1)
        for text in (scene_captions.caption(scene, rng, 0.5, shuffle=True), scene_captions.mixed_caption(scene, rng)):
            score = scene_checker.caption_score(scene, text)
            assert text and score.fact_precision == 1 and not score.unparsed and set(text.split()) <= words, text


@pytest.mark.parametrize(
    "text, correct, claimed, recalled",
    [
        ("blue above green background", 1, 1, 1),
        ("blue background", 0, 1, 0),
        ("red apple", 1, 1, 1),
        ("apple", 0, 1, 0),
        ("red", 0, 1, 0),
        ("large red apple , small dog", 4, 4, 4),
        ("large green apple", 1, 2, 1),
        ("two dog", 1, 2, 1),
        ("dog below red apple", 3, 3, 2),
        ("dog above red apple", 2, 3, 2),
        ("top right object", 1, 1, 1),
        ("red apple red apple", 1, 2, 1),
        ("", 0, 0, 0),
    ],
)
def test_caption_scores(drawn, text, correct, claimed, recalled):
    scene = EmojiScene(
        "blue above green", (EmojiObject(0, 1, "red apple", "large"), EmojiObject(1, 0, "dog", "small")), drawn
    )
    score = scene_checker.caption_score(scene, text)
    assert (score.correct, score.claimed, score.recalled, score.total) == (correct, claimed, recalled, 7)


def test_the_picture_checker_is_exact_and_falls_on_noise(drawn):
    every = many(drawn) + many(drawn, 60, "test")
    pictures = np.stack([drawn.draw(scene, 64) for scene in every])
    assert scene_checker.read_like(every[0], pictures) == every
    rng = np.random.default_rng(0)
    noisy = np.clip(pictures + rng.normal(0, 20, pictures.shape), 0, 255)
    assert scene_checker.picture_scores(every, noisy).mean() > 0.98
    assert scene_checker.picture_scores(every, rng.integers(0, 256, pictures.shape)).mean() < 0.55
    assert scene_checker.picture_scores(every, pictures[rng.permutation(len(every))]).mean() < 0.55
    assert (
        scene_checker.picture_scores(every[:1], pictures[:1])[0] == 1
        and len(scene_checker.picture_scores([], pictures[:0])) == 0
    )
    with pytest.raises(ValueError, match="even S"):
        drawn.read_pictures(pictures[:, :31, :31])


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
def test_a_share_of_the_facts_is_said_wrong(drawn, mistakes):
    rng = np.random.default_rng(0)
    pairs = [(scene, scene_captions.mistaken(scene, rng, mistakes)) for scene in many(drawn, 300)]
    facts = [
        (true[1:], seen[1:])
        for scene, other in pairs
        for true, seen in zip(scenes.facts(scene), scenes.facts(other), strict=True)
    ]
    assert all(true == seen for true, seen in facts if true[0] == "position")
    for kind in ("name", "size", "background"):
        wrong = np.mean([true != seen for true, seen in facts if true[0] == kind])
        assert abs(wrong - mistakes) < (0.08 if 0 < mistakes < 1 else 1e-9)


def test_mistakes_are_in_captions_and_not_in_pictures(drawn):
    source = EmojiSource("train", seed=2, captions="full", mistakes=0.5, emoji=drawn)
    examples = [source[index] for index in range(20)]
    assert all((example.image == drawn.draw(example.scene, 64)).all() for example in examples)
    assert [example.caption for example in examples] == [source[index].caption for index in range(20)]
    scores = [scene_checker.caption_score(example.scene, example.caption) for example in examples]
    assert not any(score.unparsed for score in scores) and 0.4 < np.mean([score.fact_recall for score in scores]) < 0.9


@pytest.mark.parametrize("captions", ["full", "detail", "mixed"])
def test_the_source_gives_true_captions_and_repeats(drawn, captions):
    source = EmojiSource("test", seed=2, captions=captions, emoji=drawn)
    for index in range(20):
        example = source[index]
        np.testing.assert_array_equal(example.image, drawn.draw(example.scene, 64))
        assert example.caption == source[index].caption and emoji.split_of(example.scene) == "test"
        assert scene_checker.caption_score(example.scene, example.caption).fact_precision == 1
    with pytest.raises(ValueError, match="'dev'"):
        EmojiSource("dev", emoji=drawn)
