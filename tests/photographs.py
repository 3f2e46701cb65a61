"""Photographs that scikit-image ships, small, as image files, and the same ones in each format of a data folder."""

import csv
import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from pyarrow import parquet
from skimage import data

NAMES = (
    "astronaut brick camera chelsea coffee coins grass gravel immunohistochemistry moon retina rocket".split()
)  # of functions of skimage.data whose files are part of the package


def photographs(count: int = 12, side: int = 48) -> dict[str, bytes]:
    """{file name: JPEG or PNG file} in order of the names, `side` to twice as many pixels wide."""
    found = {}
    for number, name in enumerate(NAMES[:count]):
        image = Image.fromarray(getattr(data, name)()).resize((side + 4 * number, side))
        kind, content = ("png", io.BytesIO()) if number % 4 == 3 else ("jpg", io.BytesIO())
        image.save(content, "PNG" if kind == "png" else "JPEG")
        found[f"{name}.{kind}"] = content.getvalue()
    return found


def captions_of(name: str) -> list[str]:
    """A short and a long caption of a photograph."""
    word = pathlib.PurePath(name).stem
    return [f"a {word}", f"a photograph of a {word}, as scikit-image has it"]


def _loose(folder: pathlib.Path, photos: dict[str, bytes]) -> None:
    for name, content in photos.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_images(folder, photos):
    _loose(folder, photos)


def write_captions(folder, photos):
    _loose(folder, photos)
    rows = [{"file_name": name, "caption": captions_of(name)} for name in photos]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def write_metadata_jsonl(folder, photos):
    _loose(folder, photos)
    rows = [{"file_name": name, "text": captions_of(name)} for name in photos]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def write_metadata_csv(folder, photos):
    _loose(folder, photos)
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption", "text"])
        rows.writerows([name, *captions_of(name)] for name in photos)


def write_metadata_parquet(folder, photos):
    _loose(folder, photos)
    table = pa.table({"file_name": list(photos), "caption": [captions_of(name) for name in photos]})
    parquet.write_table(table, folder / "metadata.parquet")


def write_text_files(folder, photos):
    _loose(folder, photos)
    for name in photos:
        (folder / name).with_suffix(".txt").write_text("\n".join(captions_of(name)) + "\n")


def write_coco(folder, photos):
    _loose(folder / "train2017", photos)
    images = [{"id": 7 * number, "file_name": name} for number, name in enumerate(photos)]
    notes = [
        {"id": 2 * number + turn, "image_id": 7 * number, "caption": text}
        for turn in range(2)
        for number, name in enumerate(photos)
        for text in captions_of(name)[turn : turn + 1]
    ]
    (folder / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": notes})
    (folder / "annotations" / "captions_train2017.json").write_text(content)


def write_parquet(folder, photos):
    (folder / "data").mkdir(parents=True)
    names = list(photos)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part, some in enumerate((names[:5], names[5:])):
        images = [{"bytes": photos[name], "path": name} for name in some]
        table = pa.table(
            {"image": pa.array(images, kind), "caption": [captions_of(name) for name in some]},
        )
        parquet.write_table(table, folder / "data" / f"train-{part:05d}-of-00002.parquet", row_group_size=2)


def write_webdataset(folder, photos):
    folder.mkdir(parents=True, exist_ok=True)
    names = list(photos)
    for part, some in enumerate((names[:7], names[7:])):
        with tarfile.open(folder / f"{part:05d}.tar", "w") as tar:
            for name in some:
                stem, _, end = name.partition(".")
                short, long = captions_of(name)
                add_member(tar, f"{stem}.{end}", photos[name])
                add_member(tar, f"{stem}.txt", short.encode())
                add_member(tar, f"{stem}.json", json.dumps({"caption": long, "width": 3}).encode())


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_array_record(folder, photos):
    folder.mkdir(parents=True, exist_ok=True)
    names = list(photos)
    for part, some in enumerate((names[:7], names[7:])):
        writer = ArrayRecordWriter(str(folder / f"photos.array_record-{part:05d}-of-00002"), "group_size:1")
        for name in some:
            texts = [text.encode() for text in captions_of(name)]
            writer.write(tf_example({"image": [photos[name]], "caption": texts, "width": 3}))
        writer.close()


def tf_example(features: dict) -> bytes:
    """A serialised tf.train.Example of lists of bytes, and of single integers."""

    def field(number: int, content: bytes) -> bytes:
        size, digits = len(content), b""
        while True:
            size, low = size >> 7, size & 127
            digits += bytes([low | (128 if size else 0)])
            if not size:
                return bytes([number << 3 | 2]) + digits + content

    entries = b""
    for name, value in features.items():
        if isinstance(value, int):
            feature = field(3, field(1, bytes([value])))
        else:
            feature = field(1, b"".join(field(1, item) for item in value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


# (format, writer); images alone have no captions
WRITERS = {
    "images": ("images", write_images),
    "captions": ("captions", write_captions),
    "metadata.jsonl": ("image_folder", write_metadata_jsonl),
    "metadata.csv": ("image_folder", write_metadata_csv),
    "metadata.parquet": ("image_folder", write_metadata_parquet),
    "text_files": ("text_files", write_text_files),
    "coco": ("coco", write_coco),
    "parquet": ("parquet", write_parquet),
    "webdataset": ("webdataset", write_webdataset),
    "array_record": ("array_record", write_array_record),
}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
