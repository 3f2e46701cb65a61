"""Bad images of a folder are counted once when it is opened, by the code that reads, and left out or refused."""

import json
import os

import numpy as np
import photographs
import pytest
from photographs import noise
from PIL import Image

from uae_jax.data.folder import Limits, open_folder
from uae_jax.data.formats import ReadOptions


@pytest.fixture
def mixed(tmp_path):
    """Two good images, and one or more of each kind that is bad."""
    Image.fromarray(noise(40, 30, 1)).save(tmp_path / "a.png")
    Image.fromarray(noise(30, 40, 2)).save(tmp_path / "b.jpg")
    (tmp_path / "copies").mkdir()
    for name in ("copies/1.png", "copies/2.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-200])
    (tmp_path / "empty.png").touch()
    os.symlink(tmp_path / "gone", tmp_path / "link.png")
    Image.fromarray(noise(7, 9)).save(tmp_path / "little.png")
    Image.fromarray(noise(8, 170)).save(tmp_path / "thin.png")
    return tmp_path


def test_bad_images_are_left_out_and_told_once(mixed):
    opened = open_folder(mixed)
    assert [opened.source[index].id for index in range(len(opened.source))] == ["a.png", "b.jpg"]
    assert opened.lines == (
        f"data: {mixed} is a folder of images without captions (9 images)",
        "data: 7 of 9 images are left out: 3 broken (cut.jpg, empty.png, link.png), 1 below 8 pixels (little.png), "
        "1 thinner than 1:20 (thin.png), 2 of the same bytes as another (copies/1.png, copies/2.png)",
    )
    record = json.loads(json.dumps(opened.inspection.record()))
    assert record["left_out"] == {"broken": 3, "small": 1, "thin": 1, "duplicate": 2}
    assert record["images"] == 9 and record["used"] == 2 and record["format"] == "images"
    assert any("link.png does not exist: it is a broken link to" in line for line in record["first"])
    assert any("thin.png is 170 x 8 pixels, and config.data.max_aspect is 20" in line for line in record["first"])


def test_bad_images_are_refused_where_the_setting_says_so(mixed):
    with pytest.raises(ValueError, match=r"7 of 9 images cannot be used: 3 broken \(cut.jpg.*set config.data.bad_im"):
        open_folder(mixed, limits=Limits(bad_images="refuse"))
    limits = Limits(min_side=50)
    with pytest.raises(ValueError, match=r"9 of 9 images cannot be used: .*give a folder with others"):
        open_folder(mixed, limits=limits)


def test_limits_are_settings(mixed):
    opened = open_folder(mixed, limits=Limits(min_side=1, max_aspect=30))
    assert opened.inspection.record()["left_out"] == {"broken": 3, "small": 0, "thin": 0, "duplicate": 2}


def test_more_names_than_three_are_not_told(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    Image.fromarray(noise(9, 9)).save(tmp_path / "good.png")
    opened = open_folder(tmp_path)
    assert opened.lines[1].endswith("5 broken (0.png, 1.png, 2.png, ...)")
    assert len(opened.inspection.record()["first"]) == 3


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.webp"])
def test_what_the_check_finds_is_what_reading_raises(tmp_path, name):
    for number, file in enumerate(("a.png", "b.jpg", "c.webp")):
        Image.fromarray(noise(90, 90, number)).save(tmp_path / file)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    checked, unchecked = open_folder(tmp_path), open_folder(tmp_path, check=False)
    assert len(checked.source) == 2 and len(unchecked.source) == 3 and unchecked.inspection is None
    with pytest.raises(ValueError, match=f"{name} is not a readable image") as raised:
        for index in range(3):
            unchecked.source[index]
    assert checked.inspection.bad["broken"][0] == (name, str(raised.value))


def test_a_used_image_has_the_captions_of_its_copies(tmp_path):
    (name, content), *_ = photographs.photographs(1).items()
    photographs.write_captions(tmp_path, {name: content, "again.jpg": content})
    source = open_folder(tmp_path, ReadOptions(caption_choice="longest")).source
    assert len(source) == 1 and source.captions(0)[2:] == tuple(photographs.captions_of("again.jpg"))
    assert source[0].caption == photographs.captions_of(name)[1]


def test_rows_of_one_file_are_no_copies(tmp_path):
    Image.fromarray(noise(9, 9)).save(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "caption": text} for text in ("one", "two")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opened = open_folder(tmp_path)
    assert [opened.source[index].caption for index in range(2)] == ["one", "two"] and opened.inspection.left_out == 0


def test_the_last_images_are_parted(tmp_path):
    for number in range(5):
        Image.fromarray(noise(9, 9, number)).save(tmp_path / f"{number}.png")
    first, last = open_folder(tmp_path).source.parted(2)
    assert [first[index].id for index in range(len(first))] == ["0.png", "1.png", "2.png"]
    assert [last[index].id for index in range(len(last))] == ["3.png", "4.png"]
    np.testing.assert_array_equal(last[1].image, noise(9, 9, 4))
