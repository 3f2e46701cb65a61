"""Strips: the package's own font, long captions, and what is kept in metadata."""

from PIL import Image

from uae_jax.files.pictures import save_picture
from uae_jax.files.strips import ELLIPSIS, font, strip, wrapped


def test_the_font_is_matplotlib_s_and_knows_other_scripts():
    letters = font(12)
    assert letters.getname()[0] == "DejaVu Sans" and "matplotlib" in str(letters.path)
    box = letters.getmask("\U0010ffff").getbbox()  # what stands for a letter that is not there
    for text in "\u00e9\u03a9\u0416\u0627\u0e3f":
        assert (
            letters.getmask(text).getbbox() != box
            or letters.getmask(text).tobytes() != letters.getmask("\U0010ffff").tobytes()
        )


def test_words_stay_apart():
    letters = font(12)
    assert letters.getlength("top left small") - letters.getlength("top leftsmall") > 2


def test_a_long_caption_ends_in_an_ellipsis_and_a_long_word_is_broken():
    letters = font(12)
    lines = wrapped("large red circle , " * 30, letters, 120, 4)
    assert len(lines) == 4 and lines[-1].endswith(ELLIPSIS) and all(letters.getlength(line) <= 120 for line in lines)
    assert wrapped("a b", letters, 120, 4) == ["a b"]
    broken = wrapped("\u6f22" * 60, letters, 120, 20)
    assert "".join(broken) == "\u6f22" * 60 and all(letters.getlength(line) <= 120 for line in broken)


def test_the_whole_caption_is_in_the_metadata(tmp_path):
    caption = "a very long caption \u4e2d " * 40
    picture = Image.new("RGB", (32, 32), "red")
    save_picture(strip(picture, caption, picture, 128), tmp_path / "strip.png", caption)
    with Image.open(tmp_path / "strip.png") as stored:
        assert stored.info["caption"] == caption and stored.size == (3 * 128 + 4 * 4, 128 + 2 * 4)
