"""Every image is read by one reader: upright, in 8 bits, on white; a bad one is a line that names it."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from photographs import noise
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from skimage import data

from uae_jax.data import images


def saved(image, path, **how):
    image.save(path, **how)
    return images.load_image(path)


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
EIGHT = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "values, end",
    [
        (RAMP, "png"),
        (RAMP, "tif"),
        (RAMP.astype(np.int32), "tif"),
        (np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16), "tif"),
        (np.linspace(0, 255, 256, dtype=np.float32).reshape(16, 16), "tif"),
        (np.linspace(-40, 900, 256, dtype=np.float32).reshape(16, 16), "tif"),
        (np.linspace(0, 2**30, 256).astype(np.int32).reshape(16, 16), "tif"),
    ],
)
def test_a_ramp_of_any_depth_becomes_the_ramp_of_eight_bits(tmp_path, values, end):
    read = saved(Image.fromarray(values), tmp_path / f"ramp.{end}")
    assert np.abs(read.astype(int) - EIGHT[..., None]).max() <= 1
    in_memory = np.array(images.to_rgb(Image.fromarray(values)))
    np.testing.assert_array_equal(in_memory, read)


def test_a_dark_image_of_sixteen_bits_stays_dark(tmp_path):
    read = saved(Image.fromarray(np.full((9, 9), 2570, np.uint16)), tmp_path / "dark.png")
    assert (read == 10).all()


def test_floats_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nan.tif is not a readable image .its pixels hold NaN"):
        saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), tmp_path / "nan.tif")


@pytest.mark.parametrize(
    "image, clear",
    [
        (Image.fromarray(EIGHT), 7),
        (Image.fromarray(RAMP), 7 * 257),
        (Image.fromarray(np.stack([EIGHT] * 3, -1)), (7, 7, 7)),
    ],
)
def test_a_transparent_colour_is_white(tmp_path, image, clear):
    read = saved(image, tmp_path / "clear.png", transparency=clear)
    expected = np.where(EIGHT == 7, 255, EIGHT)
    np.testing.assert_array_equal(read, np.stack([expected] * 3, -1))


def test_transparency_is_laid_on_white(tmp_path):
    assert (saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), tmp_path / "clear.png") == 255).all()
    half = saved(Image.new("LA", (4, 4), (0, 128)), tmp_path / "half.png")
    assert (np.abs(half.astype(int) - 127) <= 1).all()


def turned(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :20, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn clockwise to view
    Image.fromarray(wide).save(tmp_path / "side.png", exif=exif)
    return tmp_path / "side.png", np.rot90(wide, -1)


def test_a_file_and_an_image_in_memory_are_upright(tmp_path):
    path, upright = turned(tmp_path)
    np.testing.assert_array_equal(images.load_image(path), upright)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.array(images.to_rgb(image)), upright)
        np.testing.assert_array_equal(images.square_image(image, 10), upright[15:25])


@pytest.mark.parametrize("end", ["jfif", "avif", "gif", "tif", "bmp", "jp2", "ppm", "webp", "ico", "tga"])
def test_whatever_pillow_reads_is_found_and_read(tmp_path, end):
    Image.fromarray(noise(16, 16)).save(tmp_path / f"a.{end}")
    assert images.find_images(tmp_path) == [tmp_path / f"a.{end}"]
    assert images.load_image(tmp_path / f"a.{end}").shape == (16, 16, 3)


def smooth(height, width):
    """A photograph's many levels without noise: uint8 [height, width, 3], a corner of each side marked."""
    image = data.astronaut()
    image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)).copy()
    image[: height // 4, : width // 4] = (250, 10, 10)
    return image


def jpeg(image, **how):
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92, **how)
    return content.getvalue()


def both(content, side):
    """The square of a file decoded in full, and decoded at a fraction, as int."""
    return (images.decode_square(content, "a", side, scaled=scaled).astype(int) for scaled in (False, True))


@pytest.mark.parametrize("height, width", [(512, 512), (511, 700), (1030, 515), (1100, 257), (255, 255), (100, 130)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_large_jpeg_is_decoded_small_with_nearly_the_same_pixels(height, width, subsampling):
    content = jpeg(Image.fromarray(smooth(height, width)), subsampling=subsampling)
    whole, scaled = both(content, 128)
    np.testing.assert_array_equal(whole, images.square_image(images.decode_image(content, "a"), 128))
    gap = scaled - whole
    assert np.abs(gap).mean() < 2.5 and np.abs(gap.mean((0, 1))).max() < 0.5  # levels; no shift of colours
    assert (min(height, width) < 256) == (np.abs(gap).max() <= 1)  # decoded in full, and cropped first


@pytest.mark.parametrize(
    "length, scale", [(63, 1), (127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (2000, 8)]
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(monkeypatch, length, scale):
    sizes, load = [], JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: sizes.append(self.size) or load(self))
    content = jpeg(Image.new("RGB", (length + 90, length)))
    assert images.decode_square(content, "a", 64, scaled=True).shape == (64, 64, 3)
    assert sizes[0] == (-(-(length + 90) // scale), -(-length // scale))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_that_is_decoded_small_is_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(Image.fromarray(smooth(400, 600)), exif=exif)
    whole, scaled = both(content, 64)
    assert np.abs(scaled - whole).mean() < 4
    assert images.measure_image(content, "a") == ((400, 600) if orientation < 5 else (600, 400))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_printed_jpegs_keep_their_colours(mode):
    whole, scaled = both(jpeg(Image.fromarray(smooth(512, 512)).convert(mode)), 128)
    assert np.abs(scaled - whole).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_decoded_in_full(kind):
    content = io.BytesIO()
    Image.fromarray(smooth(100, 90)).save(content, kind)
    whole, scaled = both(content.getvalue(), 16)
    np.testing.assert_array_equal(scaled, whole)
    assert images.measure_image(content.getvalue(), "a") == (100, 90)


def test_a_jpeg_that_is_cut_short_is_bad_at_any_scale():
    content = jpeg(Image.fromarray(noise(256, 256)))
    square = lambda *of: images.decode_square(*of, 32, scaled=True)
    for cut in (len(content) // 3, len(content) - 300):
        for read in (images.measure_image, images.decode_image, square):
            with pytest.raises(ValueError, match="a is not a readable image"):
                read(content[:cut], "a")


def test_documents_and_films_are_no_images():
    assert not {".pdf", ".mpg", ".eps", ".h5", ".txt", ".json"} & images.image_suffixes()


def test_folders_are_walked_and_hidden_files_passed_over(tmp_path):
    for name in ("b.png", "sub/deep/a.PNG", "._b.png", ".cache/c.png", ".d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(9, 9)).save(tmp_path / name, "PNG")
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    assert images.find_images(tmp_path) == [tmp_path / "b.png", tmp_path / "sub" / "deep" / "a.PNG"]


def test_broken_links_and_formats_without_a_decoder_are_named(tmp_path):
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    found = images.find_images(tmp_path)
    assert [path.name for path in found] == ["link.png", "phone.heic"]
    assert images.find_images(tmp_path / "link.png") == [tmp_path / "link.png"]
    with pytest.raises(FileNotFoundError, match="link.png does not exist: it is a broken link to .*gone.png"):
        images.load_image(found[0])
    with pytest.raises(ValueError, match="phone.heic is not a readable image .of no known format"):
        images.load_image(found[1])


def test_images_are_found_by_file_folder_and_pattern(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(noise(9, 9)).save(tmp_path / name)
    (tmp_path / "notes.jsonl").write_text("{}")
    assert [p.name for p in images.find_images(tmp_path)] == ["a.png", "b.jpg", "c.webp"]
    assert [p.name for p in images.find_images([tmp_path / "c.webp", str(tmp_path / "*.png")])] == ["c.webp", "a.png"]
    (tmp_path / "empty").mkdir()
    found = images.find_images([tmp_path / "no.png", tmp_path / "a.png"])
    assert [p.name for p in found] == ["no.png", "a.png"]  # the others are done, and reading names the absent one
    with pytest.raises(FileNotFoundError, match="image .*no.png does not exist"):
        images.load_image(found[0])
    for missing in (tmp_path / "no.png", str(tmp_path / "*.gif"), tmp_path / "empty"):
        with pytest.raises(FileNotFoundError):
            images.find_images([missing])
    with pytest.raises(ValueError, match="notes.jsonl is not a readable image"):
        images.load_image(tmp_path / "notes.jsonl")
    with pytest.raises(ValueError, match="no image given"):
        images.find_images([])


@pytest.mark.parametrize(
    "error", [struct.error("x"), TypeError("x"), RuntimeError("x"), AttributeError(), MemoryError()]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error

    Image.fromarray(noise(9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(images.ImageOps, "exif_transpose", broken)
    with pytest.raises(ValueError, match="a.png is not a readable image .*replace or remove it"):
        images.load_image(tmp_path / "a.png")


def test_damaged_bytes_are_read_or_named(tmp_path):
    """Some hundred files with one to three bytes changed, EXIF among them: pixels, or one line with the name."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    whole = []
    for kind in ("JPEG", "PNG", "AVIF", "WEBP", "TIFF", "GIF"):
        content = io.BytesIO()
        more = {} if kind == "GIF" else {"exif": exif}
        Image.fromarray(noise(16, 24)).save(content, kind, **more)
        whole.append((kind, content.getvalue()))
    rng, bad = np.random.default_rng(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, content in whole:
            for turn in range(60):
                damaged = bytearray(content)
                for place in rng.integers(0, min(len(content), 200), 1 + turn % 3):
                    damaged[place] = rng.integers(256)
                try:
                    assert images.decode_image(bytes(damaged), "x.bin").dtype == np.uint8
                except ValueError as error:
                    bad += 1
                    assert str(error).startswith("x.bin is not a readable image") and "\n" not in str(error), kind
    assert bad > 20


def whole_resized(image, side):
    """The old way: all of the image is resized, then cropped."""
    scale = side / min(image.size)
    width, height = (max(round(length * scale), side) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("height, width", [(40, 40), (31, 120), (133, 97), (300, 200), (20, 80)])
@pytest.mark.parametrize("side", [32, 50])
def test_ordinary_images_are_cut_as_ever(height, width, side):
    image = Image.fromarray(noise(height, width))
    np.testing.assert_array_equal(images.square_image(image, side), whole_resized(image, side))


@pytest.mark.parametrize("height, width", [(20, 180), (300, 40), (7, 64)])
def test_thin_images_are_cropped_first_with_the_same_result(height, width):
    image = Image.fromarray(noise(height, width))
    gap = images.square_image(image, 32).astype(int) - whole_resized(image, 32)
    assert np.abs(gap).max() <= 2


def test_a_line_of_pixels_costs_nothing(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def seen(self, size, *rest, **how):
        sizes.append(size)
        return resize(self, size, *rest, **how)

    monkeypatch.setattr(Image.Image, "resize", seen)
    assert images.square_image(noise(1, 3000), 512).shape == (512, 512, 3)
    assert images.square_image(noise(5000, 1), 1024).shape == (1024, 1024, 3)
    assert sizes == [(512, 512), (1024, 1024)]


def test_a_transparent_colour_of_sixteen_bits_is_white(tmp_path):
    """Pillow keeps the upper eight bits of a colour image, and all sixteen of the transparent colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = np.array([[[0x1234, 0x5678, 0x9ABC], [0xFF00, 0x0000, 0x8000]]], ">u2")
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", pixels[0, 0].tobytes()), (b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*parts, (b"IEND", b"")))
    assert images.decode_image(content, "deep.png").tolist() == [[[255, 255, 255], [255, 0, 128]]]
