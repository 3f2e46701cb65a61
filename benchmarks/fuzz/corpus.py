"""The files that the mutations start from: small, whole, and with the awkward ones of earlier reports among them."""

import io
import json
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save

from uae_jax.files.json_files import read_json
from uae_jax.stages.weights import BUILTIN

SIDE = 24


def picture(kind: str = "PNG", mode: str = "RGB", **more: Any) -> bytes:
    """A small image file with a gradient."""
    ramp = np.arange(SIDE * SIDE * 3, dtype=np.uint32).reshape(SIDE, SIDE, 3)
    if mode in ("I;16", "F"):
        image = Image.fromarray((ramp[..., 0] * 29).astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray((ramp % 256).astype(np.uint8)).convert(mode)
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


def images() -> list[bytes]:
    """Files of every format that Pillow writes here, of several depths, turned and transparent."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    files = [
        picture("JPEG", exif=exif),
        picture("JPEG", "L"),
        picture("JPEG", "CMYK"),
        picture("JPEG", progressive=True),
    ]
    files += [picture(mode=mode) for mode in ("RGB", "RGBA", "LA", "P", "1", "I;16")]
    files += [picture(transparency=(0, 1, 2)), picture(exif=exif)]
    files += [picture("TIFF", mode) for mode in ("RGB", "I;16", "F", "CMYK")] + [
        picture("TIFF", compression="tiff_lzw")
    ]
    for kind in ("GIF", "WEBP", "BMP", "ICO", "PPM", "TGA", "DDS", "SGI", "JPEG2000", "AVIF"):
        try:
            files.append(picture(kind))
        except (OSError, KeyError, ValueError):  # Pillow was built without it
            continue
    return files


def tensors() -> list[bytes]:
    """Whole safetensors files."""
    plain = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros((), np.float16), "c": np.zeros((0, 4), np.int64)}
    return [save(plain), save({"x": np.ones(5, np.uint8)}, metadata={"format": "pt"})]


def header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def adapters() -> list[dict[str, Any]]:
    """Contents of adapter_config.json: plain, and those that move the base model's weights."""
    plain = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "layers_to_transform": None,
        "exclude_modules": None,
        "modules_to_save": None,
    }
    others = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_rslora": True}, {"bias": "all"}]
    others += [{"target_modules": ".*q_proj"}, {"rank_pattern": {"q_proj": 3}}, {"alpha_pattern": {"q_proj": 8}}]
    return [plain, *(plain | other for other in others)]


def configs() -> dict[str, list[dict[str, Any]]]:
    """{part of the built-in model: contents of its settings}."""
    files = {"SD3/scheduler": "scheduler_config.json", "llm_processor": "preprocessor_config.json"}
    parts = ("llm", "dit", "SD3/vae", "SD3/scheduler", "SD3/text_encoder", "clip", "dinov2", "llm_processor")
    found = {part: [read_json(BUILTIN / part, files.get(part, "config.json"))] for part in parts}
    found["clip_images"] = [read_json(BUILTIN / "clip", "preprocessor_config.json")]
    flat = found["llm"][0]
    inner = {name: value for name, value in flat.items() if name not in ("vision_config", "model_type")}
    found["llm"].append({name: flat[name] for name in ("vision_config", "model_type")} | {"text_config": inner})
    return found


CAPTIONS = [
    {"image": "a.png", "caption": "a cat"},
    {"file_name": "b/a.png", "caption": ["a cat", "two cats"]},
    {"image_id": "a", "text": "a <|im_end|> sign"},
    {"image_id": 7, "captions": ["x"]},
]
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}],
}


def parquet_file() -> bytes:
    """One parquet file with an image and its caption, as the Hub has them."""
    table = pa.table({"image": [{"bytes": picture(), "path": "a.png"}], "caption": [["a cat", "two cats"]]})
    data = io.BytesIO()
    parquet.write_table(table, data)
    return data.getvalue()


def tar_file() -> bytes:
    """One webdataset shard."""
    data = io.BytesIO()
    members = {"a.png": picture(), "a.txt": b"a cat", "b.jpg": picture("JPEG"), "b.json": b'{"caption": "two"}'}
    with tarfile.open(fileobj=data, mode="w") as shard:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def example_message() -> bytes:
    """A tf.train.Example of an image and a caption, as array_record files hold them."""

    def tagged(number: int, inner: bytes) -> bytes:
        length, size = b"", len(inner)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + inner

    def field(name: str, content: bytes) -> bytes:
        return tagged(1, tagged(1, name.encode()) + tagged(2, tagged(1, tagged(1, content))))

    return tagged(1, field("image", picture()) + field("caption", b"a cat"))
