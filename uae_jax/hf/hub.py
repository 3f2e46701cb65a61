"""Models of the Hugging Face Hub by their id, downloaded after their size and licence are told."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from uae_jax.hf.formats import is_hub_id, snapshot_of

# weights in other formats, which many repositories hold a second time
OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "onnx/*")
OWN_OFFLINE = "UAE_JAX_OFFLINE"  # set where the commands, and not the person, turned the Hub off


def local_folder(
    path: str | pathlib.Path, *, needs: str = "", tell: Callable[[str], None] | None = None
) -> pathlib.Path:
    """The folder behind a path: the snapshot of a Hub cache folder, or of a Hub id, which is downloaded.

    Args:
      path: a path, or an id such as `Qwen/Qwen2.5-VL-3B-Instruct` where no such path exists.
      needs: beginning of a file name without which nothing is downloaded, such as `llm/`.
      tell: called with one line before the download; None for stderr.

    Raises:
      FileNotFoundError: an id that cannot be downloaded: no `huggingface_hub`, no network, no such model or no access.
      ValueError: a model without the needed files, or a cache folder without one snapshot.
    """
    if not is_hub_id(path):
        return snapshot_of(path)
    name = str(path)
    hub = _hub(name)
    with contextlib.suppress(Exception):  # of many kinds; whatever they are, the model is not here yet
        return pathlib.Path(hub.snapshot_download(name, local_files_only=True, ignore_patterns=list(OTHERS)))
    if _asked_offline():
        raise FileNotFoundError(
            f"{name} is a Hub id, and HF_HUB_OFFLINE is set; unset it, or run elsewhere: hf download {name}"
        )
    try:
        with _online(hub):
            info = hub.HfApi().model_info(name, files_metadata=True)
            _check_needs(name, info, needs)
            _told(name, info, tell or (lambda line: print(line, file=sys.stderr, flush=True)))
            return pathlib.Path(hub.snapshot_download(name, ignore_patterns=list(OTHERS)))
    except _Unfit as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # the library's own, those of its HTTP client, and those of the system
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FileNotFoundError(
            f"{name} does not exist here, and as a Hub id it cannot be downloaded ({reason}); check the id, the "
            "network and, for a gated model, `hf auth login`"
        ) from None


class _Unfit(Exception):
    """The model is on the Hub and is of no use here."""


def _hub(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f'{name} does not exist here; to download it as a Hub id: pip install "uae_jax[hub]"'
        ) from None
    return huggingface_hub


def _asked_offline() -> bool:
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return asked and OWN_OFFLINE not in os.environ


@contextlib.contextmanager
def _online(hub: Any) -> Iterator[None]:
    """The commands keep the libraries offline; an id that was given is the exception."""
    constants, before = hub.constants, hub.constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _files(info: Any) -> list[Any]:
    """The files of a model that would be downloaded."""
    return [file for file in info.siblings or () if not any(pathlib.PurePath(file.rfilename).match(p) for p in OTHERS)]


def _licence(info: Any) -> str:
    tags = [tag.partition(":")[2] for tag in info.tags or () if tag.startswith("license:")]
    return tags[0] if tags else "not stated"


def _size(info: Any) -> str:
    return f"{sum(file.size or 0 for file in _files(info)) / 1e9:.2f} GB"


def _told(name: str, info: Any, tell: Callable[[str], None]) -> None:
    tell(f"{name}: {len(_files(info))} files, {_size(info)}, licence {_licence(info)}; downloading to the Hub's cache")


def _check_needs(name: str, info: Any, needs: str) -> None:
    files = _files(info)
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise _Unfit(f"{name} is a Hub id of a model without safetensors; give one that has them")
    if needs and not any(file.rfilename.startswith(needs) for file in files):
        raise _Unfit(
            f"{name} is a Hub id ({_size(info)}, licence {_licence(info)}) of one model and not of a UAE folder; build "
            "that from ids or folders: python -m uae_jax.convert import --llm QWEN --sd3 SD3 OUT"
        )
