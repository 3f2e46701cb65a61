import io
import json

import numpy as np
import pytest
from PIL import Image

from uae_jax.data import scene_checker, scenes, sources


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("captions", sources.SCENE_CAPTIONS)
def test_scene_source_gives_true_captions_and_repeats(captions):
    source = sources.SceneSource("test", seed=4, captions=captions)
    for i in range(30):
        example = source[i]
        np.testing.assert_array_equal(example.image, scenes.draw(example.scene))
        np.testing.assert_array_equal(example.image, source[i].image)
        assert example.caption == source[i].caption and scenes.split_of(example.scene) == "test"
        score = scene_checker.caption_score(example.scene, example.caption)
        assert score.fact_precision == 1 and (captions != "full" or score.fact_recall == 1)


def test_short_captions_are_prompts_of_one_or_two_objects():
    source = sources.SceneSource("train", 3, captions="short")
    said = [source[index].caption.split() for index in range(100)]
    assert all({"background", ",", "small", "large"}.isdisjoint(words) and len(words) <= 7 for words in said)
    assert {"and", "two"} <= {word for words in said for word in words}


def test_scene_source_settings_are_checked():
    with pytest.raises(ValueError, match="'dev'"):
        sources.SceneSource("dev")
    with pytest.raises(ValueError, match="low <= high"):
        sources.SceneSource(low=0.9, high=0.2)


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.png")
    Image.fromarray(noise(24, 16)).save(tmp_path / "b.jpg")
    Image.fromarray(noise(9, 9)).save(tmp_path / "c.webp")
    lines = [
        {"file_name": "a.png", "caption": " one "},
        {"image": "b.jpg", "caption": ["two", "drei"]},
        {"file_name": "c.webp", "caption": "vier"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def test_folder_source(folder):
    source = sources.FolderSource(folder)
    assert [source[i].caption for i in range(len(source))] == ["one", "drei", "vier"]
    np.testing.assert_array_equal(source[0].image, noise(20, 30))
    assert source[1].image.shape == (24, 16, 3) and source[2].id == "c.webp"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file_name": "a.png", "caption"', "captions.jsonl line 4 is not JSON"),
        ("[1]", "line 4 is not a JSON object"),
        ('{"caption": "x"}', "line 4 names no image"),
        ('{"file_name": "a.png"}', "line 4 has no caption"),
        ('{"file_name": "a.png", "caption": []}', "line 4 has no caption"),
        ('{"file_name": "a.png", "caption": " "}', "line 4 has no caption"),
        ('{"file_name": "z.png", "caption": "x"}', "z.png does not exist"),
    ],
)
def test_broken_lines_are_named(folder, line, message):
    path = folder / "captions.jsonl"
    path.write_text(path.read_text().rstrip("\n") + "\n" + line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sources.FolderSource(folder)


def test_line_in_another_encoding_is_named(folder):
    (folder / "captions.jsonl").write_bytes(b'{"file_name": "a.png", "caption": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        sources.FolderSource(folder)


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.webp"])
def test_truncated_images_are_named_when_opened(folder, name):
    Image.fromarray(noise(90, 90)).save(folder / name)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{name} is not a readable image"):
        sources.FolderSource(folder)
    unchecked = sources.FolderSource(folder, check=False)
    with pytest.raises(ValueError, match=f"{name} is not a readable image"):
        for i in range(3):
            unchecked[i]


def test_folder_without_captions(tmp_path):
    with pytest.raises(FileNotFoundError, match="captions.jsonl does not exist"):
        sources.FolderSource(tmp_path)
    (tmp_path / "captions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no captions"):
        sources.FolderSource(tmp_path)


def test_images_are_found_by_file_folder_and_pattern(folder):
    assert [p.name for p in sources.find_images(folder)] == ["a.png", "b.jpg", "c.webp"]
    assert [p.name for p in sources.find_images([folder / "c.webp", str(folder / "*.png")])] == ["c.webp", "a.png"]
    for missing in (folder / "no.png", str(folder / "*.gif"), folder / "empty"):
        (folder / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError):
            sources.find_images([missing])
    with pytest.raises(ValueError, match="captions.jsonl is not a readable image"):
        sources.load_image(folder / "captions.jsonl")
    with pytest.raises(ValueError, match="no image given"):
        sources.find_images([])


def test_exif_orientation_is_applied(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :20, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn clockwise to view
    Image.fromarray(wide).save(tmp_path / "side.png", exif=exif)
    image = sources.load_image(tmp_path / "side.png")
    np.testing.assert_array_equal(image, np.rot90(wide, -1))


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (sources.load_image(tmp_path / "clear.png") == 255).all()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class TinyCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                        "title": tfds.features.Text(),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                buffer = io.BytesIO()
                Image.fromarray(noise(8 + i, 6, i)).save(buffer, "PNG")
                buffer.seek(0)
                yield (
                    i,
                    {
                        "image": buffer,
                        "title": f"title {i}",
                        "captions": [{"text": f"caption {i} {k}"} for k in range(2)],
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    TinyCaptions(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_source_without_tensorflow(tfds_folder):
    import sys

    source = sources.TfdsSource("tiny_captions", "train", tfds_folder, caption_key="captions/text")
    assert len(source) == 4
    seen = set()
    for i in range(4):
        example = source[i]
        _, which, number = example.caption.split()
        seen.add(int(which))
        assert int(number) == i % 2
        np.testing.assert_array_equal(example.image, noise(8 + int(which), 6, int(which)))
    assert seen == {0, 1, 2, 3}
    titles = sources.TfdsSource("tiny_captions", "train[:2]", tfds_folder, caption_key="title")
    assert len(titles) == 2 and titles[0].caption.startswith("title ")
    assert "tensorflow" not in sys.modules


def test_tfds_errors_name_the_thing(tfds_folder):
    with pytest.raises(ValueError, match="no feature 'text'"):
        sources.TfdsSource("tiny_captions", "train", tfds_folder, caption_key="text")
    with pytest.raises(ValueError, match="cannot open 'absent_set'"):
        sources.TfdsSource("absent_set", "train", tfds_folder)
    with pytest.raises(ValueError, match="split 'dev'"):
        sources.TfdsSource("tiny_captions", "dev", tfds_folder)
