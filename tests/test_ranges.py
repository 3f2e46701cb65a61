"""Numbers of flags, settings and the API are finite and in range, one line each; two seeds are two streams."""

import dataclasses

import jax
import numpy as np
import pytest

from uae_jax import api, convert, demo, evaluate, infer
from uae_jax.demo import Page
from uae_jax.settings import LAST_SEED, Mistakes, read
from uae_jax.stages.bootstrap.settings import BootstrapConfig
from uae_jax.stages.inference_config import InferenceConfig
from uae_jax.stages.run_config import RunConfig

NUMBERS = [field.name for field in dataclasses.fields(InferenceConfig) if isinstance(field.default, int | float)]
NUMBERS.remove("control_tokens")
HUGE = 10**400


def is_one_line(stop, *words):
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e39"])
@pytest.mark.parametrize("name", [name for name in NUMBERS if isinstance(getattr(InferenceConfig(), name), float)])
def test_float_settings_of_a_model_are_finite_and_in_range(name, value):
    with pytest.raises(SystemExit) as stop:
        infer.main(["generate", "red circle", f"--{name}={value}"])
    is_one_line(stop, name, "it must be")
    with pytest.raises(Mistakes, match=f"{name} is .*; it must be"):
        api.load("", **{name: float(value)})


@pytest.mark.parametrize("value", [-1, 2**64, HUGE])
@pytest.mark.parametrize("name", [name for name in NUMBERS if isinstance(getattr(InferenceConfig(), name), int)])
def test_whole_settings_of_a_model_are_in_range(name, value):
    with pytest.raises(SystemExit) as stop:
        infer.main(["generate", "red circle", f"--{name}={value}"])
    is_one_line(stop, name, "it must be")


@pytest.mark.parametrize("value", [1e-300, 1e-9])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(value):
    with pytest.raises(Mistakes, match="temperature is .*; it must be 0, or at least 0.0001"):
        api.load("", temperature=value)
    assert np.isfinite(np.float32(1e30) / np.float32(InferenceConfig(temperature=1e-4).temperature))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 7, 2**64, HUGE])
@pytest.mark.parametrize("kind", [RunConfig, BootstrapConfig, InferenceConfig])
def test_seeds_that_would_be_another_seeds_stream_are_refused(kind, seed):
    _, mistakes = read(kind, {"seed": seed})
    assert [mistake for mistake in mistakes if mistake.startswith("config.seed is ") and "it must be" in mistake]


def test_two_seeds_are_two_streams():
    seeds = [0, 1, 7, 2**31 - 1, 2**31, 2**31 + 7, LAST_SEED - 1, LAST_SEED]
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    assert tuple(jax.random.key_data(jax.random.key(LAST_SEED + 1)).tolist()) in keys
    for seed in seeds:
        assert not [line for line in read(InferenceConfig, {"seed": seed})[1] if "seed" in line]


FLAGS = [
    (convert, ("export", "a", "b"), "max_shard_gb", ("nan", "inf", "0", "-1")),
    (convert, ("import", "--llm=a", "--sd3=b", "c"), "seed", ("-1", 2**32)),
    (demo, (), "port", ("-1", 65_536)),
    (evaluate, ("unified_bench",), "report_pairs", ("-1",)),
    (evaluate, ("unified_bench",), "encoder_batch_size", ("0",)),
    (evaluate, ("captions", "--output=x"), "encoder_batch_size", ("0", -3)),
    (evaluate, ("captions", "--output=x"), "scenes", ("-1",)),
    (evaluate, ("geneval", "write", "--prompts=scenes", "--out=x"), "per_tag", ("0", "-1")),
    (evaluate, ("geneval", "write", "--prompts=scenes", "--out=x"), "images_per_prompt", ("0",)),
    (evaluate, ("dpg", "check", "a", "--prompts=b"), "size", ("0",)),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "timeout", ("nan", "inf", "0")),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "backoff", ("nan", "inf", "-1")),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "retries", ("-1",)),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "malformed_retries", ("-1",)),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "workers", ("0", HUGE)),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "image_side", ("0",)),
    (evaluate, ("judge", "--captions_a=a", "--captions_b=b"), "seed", ("-1", 2**32)),
]


@pytest.mark.parametrize(
    ("module", "arguments", "flag", "value"),
    [(module, arguments, flag, value) for module, arguments, flag, values in FLAGS for value in values],
)
def test_flags_of_all_commands_are_in_range(module, arguments, flag, value):
    with pytest.raises(SystemExit) as stop:
        module.main([*arguments, f"--{flag}={value}"])
    is_one_line(stop, f"--{flag} is ", "it must be")


@pytest.mark.parametrize("number", [None, -1, float("nan"), float("inf"), 2**31])
def test_numbers_of_the_page_are_in_range(number):
    page = Page(None, None)  # refused before a model is asked
    image = np.zeros((8, 8, 3), np.uint8)
    for call in (lambda: page.scene(number), lambda: page.caption(image, number), lambda: page.draw(None, "x", number)):
        with pytest.raises(ValueError, match="the number is .*; it must be in 0 .. 2147483647"):
            call()


def test_a_whole_number_past_every_float_is_a_mistake():
    _, mistakes = read(InferenceConfig, {"guidance_scale": HUGE})
    assert mistakes == ["config.guidance_scale is a whole number of 401 digits; it must be a finite number"]
