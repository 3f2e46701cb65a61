import io

import numpy as np
import pytest
from PIL import Image

from uae_jax.data import scene_checker, scenes, sources
from uae_jax.data.folder import Limits, open_folder
from uae_jax.data.formats import ReadOptions


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


def test_array_records_that_tfds_wrote_are_read_as_they_are(tfds_folder):
    source = open_folder(tfds_folder, limits=Limits(min_side=1)).source
    assert source.records.name == "array_record" and len(source) == 4
    for example in (source[index] for index in range(4)):
        _, which, number = example.caption.split()
        np.testing.assert_array_equal(example.image, noise(8 + int(which), 6, int(which)))
        assert number in "01"
    titles = open_folder(tfds_folder, ReadOptions(caption_key="title"), check=False).source
    assert titles[0].caption.startswith("title ")


def test_tfds_errors_name_the_thing(tfds_folder):
    with pytest.raises(ValueError, match="no feature 'text'"):
        sources.TfdsSource("tiny_captions", "train", tfds_folder, caption_key="text")
    with pytest.raises(ValueError, match="cannot open 'absent_set'"):
        sources.TfdsSource("absent_set", "train", tfds_folder)
    with pytest.raises(ValueError, match="split 'dev'"):
        sources.TfdsSource("tiny_captions", "dev", tfds_folder)
