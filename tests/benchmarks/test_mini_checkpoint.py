"""A random model in the official layout: made one tensor at a time, and opened by both sides."""

import weakref

import diffusers
import numpy as np
import pytest
import transformers

from benchmarks import mini_checkpoint
from benchmarks.loading import PARTS
from benchmarks.mini_checkpoint import SMALL, write_checkpoint
from uae_jax.stages.weights import ModelConfig, load_system


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, and the most tensors of noise that were alive at once."""
    folder, alive, most, noise = tmp_path_factory.mktemp("made"), set(), 0, mini_checkpoint._noise

    def counted(*arguments):
        nonlocal most
        tensor = noise(*arguments)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_checkpoint, "_noise", counted)
        write_checkpoint(folder, SMALL)
    return folder, most


def test_one_tensor_at_a_time_is_in_memory(made):
    assert made[1] == 1


@pytest.mark.parametrize("part", ["llm", "dit", "SD3/vae", "SD3/text_encoder", "SD3/text_encoder_2", "clip"])
def test_the_libraries_find_all_their_tensors(made, part):
    library, name = PARTS[part].split(".")
    model = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    _, info = model.from_pretrained(made[0] / part, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # transformers' captioner does not know the projector
    assert all(key.startswith("projector.") for key in info["unexpected_keys"])


def test_it_is_opened_here_with_scales_about_one(made):
    parts = load_system(ModelConfig(folder=str(made[0])), image_size=16).parts
    scale = np.asarray(parts["language"]["final_norm"]["scale"])
    assert 0.9 < scale.mean() < 1.1 and 0.01 < scale.std() < 0.04
