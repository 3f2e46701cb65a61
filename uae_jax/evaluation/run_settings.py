"""Settings of a benchmark folder, kept beside the folder, so that only equal settings continue it."""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uae_jax.files.json_files import write_json

if TYPE_CHECKING:
    from uae_jax.api import Model

PIECE, PIECES = 4096, 16  # bytes of a sample of a weight file, samples of a file
WEIGHTS = (".safetensors", ".bin", ".pt", ".json")
# settings that a result depends on; the others affect the speed alone
DRAWING = ("seed", "steps", "guidance_scale", "size", "negative_prompt", "shift", "schedule", "condition")
ANSWERING = ("seed", "temperature", "top_p", "max_new_tokens")
NOT_COMPARED = ("model",)  # a moved folder has equal weights


def settings_file(output: pathlib.Path) -> pathlib.Path:
    """`OUT.settings.json` beside a folder or file `OUT`; DPG-Bench reads every file inside its folder as an image."""
    output = output.resolve()
    return output.with_name(f"{output.name}.settings.json")


def digest(text: str) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def weights_digest(checkpoint: str) -> str:
    """Sixteen hexadecimal digits of the weights and configs of `--checkpoint`, from at most 64 KiB of each file.

    The digits of a workdir change with further training.

    Raises:
      FileNotFoundError: no such model.
    """
    from uae_jax.stages.weights import (  # an import of seconds, which checks and summaries do not need
        DEFAULT,
        model_folder,
    )

    folder, state = model_folder(checkpoint or DEFAULT), hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS and path.is_file()):
        length = path.stat().st_size
        state.update(f"{path.relative_to(folder).as_posix()} {length} ".encode())
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(max(length - PIECE, 0) * number // (PIECES - 1))
                state.update(file.read(PIECE))
    return state.hexdigest()[:16]


def model_settings(options: argparse.Namespace, model: "Model", names: tuple[str, ...]) -> dict[str, Any]:
    """The weights and the settings `names` of a model, for `begin`.

    Args:
      options: flags of `model_flags.add_model_flags`.
      model: loaded from these flags.
      names: `DRAWING` or `ANSWERING`.
    """
    values = {name: getattr(model.settings, name) for name in names}
    if model.settings.control_tokens:  # folders that were begun without this setting continue
        values["control_tokens"] = True
    return {
        "model": options.checkpoint or "built-in",
        "weights": weights_digest(options.checkpoint),
        "dtype": options.dtype,
        "adapters": not options.without_adapters,
        **values,
    }


def begin(output: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings beside `output`, or compares them with those of an earlier run.

    Args:
      output: the folder or file of the results.
      settings: JSON values.

    Raises:
      ValueError: the earlier settings differ, or are missing although `output` holds results.
    """
    path, settings = settings_file(output), json.loads(json.dumps(settings))
    if not (output.is_file() or output.is_dir() and any(output.iterdir())):
        write_json(path, settings)
        return
    if not path.is_file():
        raise ValueError(
            f"{output} is not empty and {path.name} is not beside it, so it cannot be continued; choose another --out"
        )
    before = read(output)
    changed = [
        name for name in sorted({*before, *settings} - set(NOT_COMPARED)) if before.get(name) != settings.get(name)
    ]
    if changed:
        changed += ["model"] if "weights" in changed else []
        was, now = (", ".join(f"{name}={values.get(name)}" for name in changed) for values in (before, settings))
        raise ValueError(
            f"{output} was begun with {was}, now it is {now}; use the same settings to continue, or another --out"
        )


def read(output: pathlib.Path) -> dict[str, Any]:
    """The settings beside `output`; {} if there are none.

    Raises:
      ValueError: the file is damaged.
    """
    path = settings_file(output)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it together with {output}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings; delete it together with {output}")
    return found
