"""One folder with every awkward image goes through inference, a benchmark and two stages: the good ones are done."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from stage_pieces import exit_of

from uae_jax import api, evaluate, infer, main
from uae_jax.data.images import load_image

pytestmark = pytest.mark.usefixtures("one_device")
FAST = ("--steps=2", "--batch_size=2", "--max_new_tokens=6", "--seed=3")
GOOD = (
    "16_bit.png",
    "bitmap.bmp",
    "deeper/photo.webp",
    "float.tiff",
    "moving.gif",
    "name with spaces.jpg",
    "photo.jfif",
    "plain.png",
    "transparent.png",
    "upright.jpg",
)
BAD = ("cut.jpg", "damaged_exif.jpg", "empty.png", "text.png")


def _noise(seed, width=48, height=40):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_awkward(folder: pathlib.Path) -> None:
    """The images of `GOOD` and `BAD`, a hidden file, a strip of one row, and a link to nothing."""
    (folder / "deeper").mkdir(parents=True)
    image = Image.fromarray(_noise(0))
    image.save(folder / "plain.png")
    ramp = np.linspace(0, 65535, 48 * 40).reshape(40, 48)
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "16_bit.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(folder / "float.tiff")
    Image.fromarray(_noise(1)).save(folder / "bitmap.bmp")
    Image.fromarray(_noise(2)).save(folder / "deeper" / "photo.webp")
    Image.fromarray(_noise(3)).convert("P").save(folder / "moving.gif")
    Image.fromarray(_noise(4)).save(folder / "name with spaces.jpg")
    Image.fromarray(_noise(5)).save(folder / "photo.jfif", format="JPEG")
    Image.fromarray(np.dstack([_noise(6), np.full((40, 48), 128, np.uint8)])).save(folder / "transparent.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(_noise(7)).save(folder / "upright.jpg", exif=turned)
    whole = (folder / "upright.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes((folder / "name with spaces.jpg").read_bytes()[:-200])
    at = whole.index(b"Exif\x00\x00") + 6
    (folder / "damaged_exif.jpg").write_bytes(whole[: at + 10] + b"\xff\xff\xff\xff" + whole[at + 14 : at + 300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "._plain.png").write_bytes(b"\x00\x05\x16\x07")
    Image.fromarray(_noise(8, 3000, 1)).save(folder / "strip.png")
    (folder / "lost.png").symlink_to(folder / "nowhere.png")


@pytest.fixture
def folder(tmp_path):
    write_awkward(tmp_path / "awkward")
    return tmp_path / "awkward"


def test_the_good_ones_read_as_what_they_are(folder):
    ramp = load_image(folder / "16_bit.png")[..., 0]
    np.testing.assert_allclose(ramp, load_image(folder / "float.tiff")[..., 0].astype(int), atol=1)  # as they round
    assert (ramp.min(), ramp.max()) == (0, 255) and (np.diff(ramp.ravel().astype(int)) >= 0).all()
    assert load_image(folder / "upright.jpg").shape == (48, 40, 3)  # turned
    assert load_image(folder / "transparent.png").mean() > _noise(6).mean() + 50  # white shines through
    for name in BAD:
        with pytest.raises(ValueError, match=f"{name} is not a readable image"):
            load_image(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["caption", "reconstruct"])
def test_inference_does_the_good_and_names_the_bad(folder, tmp_path, capsys, action):
    out = () if action == "caption" else ("--out", str(tmp_path / "out"))
    said = exit_of(infer.main, action, str(folder), "--json", *out, *FAST)
    printed, err = capsys.readouterr()
    records = [json.loads(line) for line in printed.splitlines()]
    done = {str(pathlib.Path(record["image"]).relative_to(folder)) for record in records if "error" not in record}
    failed = {pathlib.Path(record["image"]).name for record in records if "error" in record}
    assert set(GOOD) <= done and set(BAD) <= failed and "._plain.png" not in done | failed
    assert all(isinstance(record["caption"], str) for record in records if "error" not in record)
    assert str(said).startswith("error: ") or said == 1
    assert "lost.png" in f"{said}{err}{printed}"


@pytest.mark.slow
def test_the_benchmark_scores_the_good_and_names_the_bad(folder, tmp_path):
    assets = pathlib.Path(api.__file__).parent / "assets" / "tiny"
    arguments = [f"--images={folder}", f"--out={tmp_path / 'out'}", f"--clip={assets / 'clip'}"]
    said = exit_of(evaluate.main, "unified_bench", *arguments, *FAST)
    written = (tmp_path / "out" / "unified_bench.json").read_text()
    assert str(said).startswith("error: ") and "could not be scored" in said
    assert all(name in written for name in BAD) and "NaN" not in written


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "gen_for_und"])
def test_a_stage_trains_on_the_good_and_counts_the_bad(folder, tmp_path, capsys, stage):
    for path in sorted(folder.rglob("*")) if stage == "pretrain" else ():
        if not path.is_dir() and not path.name.startswith("."):
            path.with_suffix(".txt").write_text(f"noise named {path.stem}", encoding="utf-8-sig")
    small = [f"--config.{stage}.{field}" for field in ("steps=2", "batch_size=4")]
    if stage == "gen_for_und":
        small += [f"--config.{stage}.{field}" for field in ("group_size=2", "max_new_tokens=6", "sampler_steps=2")]
    shared = ["--config.evaluation.images=2", "--config.evaluation.sampler_steps=2", "--config.evaluation.batch_size=2"]
    shared += ["--config.evaluation.geneval_per_tag=0", "--config.evaluation.questions=", "--config.data.max_caption=8"]
    data = ["--config.data.source=folder", f"--config.data.folder={folder}"]
    workdir = tmp_path / "run"
    assert exit_of(main.main, f"--config={stage}", f"--workdir={workdir}", *data, *small, *shared) == 0
    text = "".join(capsys.readouterr())
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["stages"][0]["steps"] == 2
    (record,) = summary["data"]
    assert record["left_out"]["broken"] >= len(BAD) and sum(record["left_out"].values()) == len(BAD) + 2, record
    assert any(name in text for name in BAD)
