"""What a benchmark folder was made with: the same weights under any name, other weights under the same name."""

import numpy as np
import pytest

from uae_jax.evaluation import run_settings


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "uae"
    (folder / "llm").mkdir(parents=True)
    (folder / "llm/config.json").write_text("{}")
    (folder / "llm/model.safetensors").write_bytes(np.random.default_rng(0).bytes(1_000_000))
    return folder


def test_weights_are_known_by_their_content(model, tmp_path):
    before = run_settings.weights_digest(str(model))
    model.rename(tmp_path / "moved")
    assert run_settings.weights_digest(str(tmp_path / "moved")) == before
    (tmp_path / "moved/llm/notes.md").write_text("not a weight")
    assert run_settings.weights_digest(str(tmp_path / "moved")) == before
    (tmp_path / "moved/llm/model.safetensors").write_bytes(np.random.default_rng(1).bytes(1_000_000))
    assert run_settings.weights_digest(str(tmp_path / "moved")) != before
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run_settings.weights_digest(str(tmp_path / "none"))


def test_a_folder_is_continued_only_with_what_it_was_begun_with(tmp_path):
    out = tmp_path / "out"
    run_settings.begin(out, {"model": "runs/a", "weights": "1", "steps": 2, "sizes": (1, 2)})
    run_settings.begin(
        out, {"model": "runs/a", "weights": "2", "steps": 3, "sizes": (1, 2)}
    )  # nothing is written yet: begun anew
    out.mkdir()
    (out / "a.png").write_bytes(b"")
    run_settings.begin(out, {"model": "moved/a", "weights": "2", "steps": 3, "sizes": (1, 2)})
    with pytest.raises(
        ValueError, match="begun with weights=2, model=runs/a, now it is weights=4, model=runs/b; use the same"
    ):
        run_settings.begin(out, {"model": "runs/b", "weights": "4", "steps": 3, "sizes": (1, 2)})
    assert run_settings.read(out)["steps"] == 3
    run_settings.settings_file(out).write_text("{")
    with pytest.raises(ValueError, match="out.settings.json is not JSON"):
        run_settings.begin(out, {})
    run_settings.settings_file(out).unlink()
    with pytest.raises(ValueError, match="cannot be continued"):
        run_settings.begin(out, {})
