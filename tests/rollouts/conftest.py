"""The small model of `small_model.py`."""

from small_model import config, model_folder, whole  # noqa: F401
