"""What a path holds that is not a folder of safetensors, in words, with what helps."""

import pathlib
import re

from uae_jax.files.paths import to_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CACHE_NAME = re.compile(r"models--(.+?)--(.+)")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def is_hub_id(path: str | pathlib.Path) -> bool:
    """Whether a path that is not there has the form of a Hub id, such as `Qwen/Qwen2.5-VL-3B-Instruct`.

    A path into an existing folder, such as `runs/smal`, is a slip of the pen and no id.
    """
    place = to_path(path)
    return bool(HUB_ID.fullmatch(str(path))) and not place.exists() and not place.parent.exists()


def snapshot_of(path: str | pathlib.Path) -> pathlib.Path:
    """The snapshot in a Hub cache folder `models--OWNER--NAME` or its `snapshots`; other paths as they are.

    Raises:
      ValueError: there is no snapshot, or there are several and none is that of the branch `main`.
    """
    place = to_path(path)
    root = place.parent if place.name == "snapshots" else place
    if not CACHE_NAME.fullmatch(root.name) or not root.is_dir():
        return place
    found = sorted(inner for inner in (root / "snapshots").glob("*") if inner.is_dir())
    branch = root / "refs" / "main"
    name = branch.read_text(errors="replace").strip() if branch.is_file() else ""
    main = [inner for inner in found if inner.name == name]
    if not main and len(found) != 1:
        owner, model = CACHE_NAME.fullmatch(root.name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        what = f"{len(found)} snapshots" if found else "no complete snapshot"
        raise ValueError(
            f"{root} is a cache folder of the Hub with {what}; give one of its snapshots, or download it again: "
            f"hf download {owner}/{model}"
        )
    return (main or found)[0]


def other_format(path: str | pathlib.Path) -> str:
    """What a folder without safetensors holds, and what helps, for the end of a message; empty if nothing is known."""
    place = to_path(path)
    names = sorted(file.name for file in place.iterdir() if file.is_file()) if place.is_dir() else []
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    torch = [name for name in names if name.endswith(TORCH_SUFFIXES)]
    if any(name.startswith("models--") for name in (entry.name for entry in place.iterdir() if entry.is_dir())):
        return f"{place} is the cache of the Hub; give the folder of one model in it, models--OWNER--NAME"
    if gguf:
        return (
            f"{place} holds {gguf[0]}, a quantised format of llama.cpp; get the original weights in safetensors: "
            "hf download OWNER/NAME --local-dir FOLDER"
        )
    if torch:
        return (
            f"{place} holds {torch[0]}, a format of PyTorch alone; write safetensors with `save_pretrained` of "
            "transformers or diffusers, or get them: hf download OWNER/NAME --local-dir FOLDER"
        )
    return ""
