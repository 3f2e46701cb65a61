"""What the writers of picture folders share: load the model, note the settings, draw what is missing."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uae_jax.evaluation import run_settings
from uae_jax.evaluation.picture_files import Target, write_pictures
from uae_jax.files.whole import remove_partial
from uae_jax.model_flags import load_model


def draw_folder(
    options: argparse.Namespace,
    benchmark: str,
    targets: Sequence[Target],
    settings: Mapping[str, Any],
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Draws the missing files of a benchmark's folder and prints how many there were.

    Args:
      options: `out` and the flags of `add_model_flags`.
      benchmark: its name.
      targets: all files of the folder.
      settings: what else the folder follows from, such as its prompts.
      prepare: writes what is not a picture, once the settings are known to fit.

    Raises:
      ValueError: a prompt is too long, or the folder was begun with other settings.
    """
    model = load_model(options, sum(len(target.sample_ids) for target in targets))
    for target in targets:
        try:
            model.engine.text_fields(target.prompt)
        except ValueError as error:
            raise ValueError(f"the prompt of {target.path}: {error}") from error
    drawing = {"benchmark": benchmark, **run_settings.model_settings(options, model, run_settings.DRAWING), **settings}
    run_settings.begin(options.out, drawing)
    options.out.mkdir(parents=True, exist_ok=True)
    remove_partial(options.out)
    prepare()
    written, kept = write_pictures(
        model, targets, size=model.settings.size, batch_size=model.settings.batch_size, label=benchmark
    )
    print(f"{options.out}: {written} pictures written, {kept} were there")
