import json

import numpy as np
import pytest

from uae_jax.diffusion.schedule import ScheduleConfig, sigma_schedule

GOLDEN = {
    "diffusers": [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876] + [0.278049, 0.008929, 0],
    "single": [1, 0.960043, 0.913146, 0.857326, 0.789773, 0.706349, 0.600719, 0.462656] + [0.274510, 0.002994, 0],
    # 3 s / (1 + 2 s) at s = 1 - i / 10
    "linspace_shift": [3 * s / (10 + 2 * s) for s in range(10, -1, -1)],
}


@pytest.mark.trap(16)
@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_values_at_ten_steps(kind):
    sigmas = sigma_schedule(10, 3.0, kind)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, GOLDEN[kind], atol=6e-7)


@pytest.mark.trap(16)
@pytest.mark.parametrize("steps", [1, 2, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_the_diffusers_scheduler(steps, shift):
    import diffusers  # slow import, needed only here

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = sigma_schedule(steps, shift)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(1000 * sigmas[:-1], scheduler.timesteps.numpy(), atol=1e-3)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1e-3, steps))
    single = sigma_schedule(steps, shift, "single")
    np.testing.assert_allclose(single, scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.trap(16)
@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("steps", [10, 28, 40])
def test_decreases_from_one_to_zero(kind, steps):
    sigmas = sigma_schedule(steps, 3.0, kind)
    assert sigmas.shape == (steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.trap(16)
def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="karras"):
        sigma_schedule(10, 3.0, "karras")
    with pytest.raises(ValueError, match="at least 1 step"):
        sigma_schedule(0)
    with pytest.raises(ValueError, match="shift"):
        sigma_schedule(10, 0.0)


@pytest.mark.trap(16)
def test_reads_a_scheduler_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        ScheduleConfig.from_folder(tmp_path)
    content = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 2.0,
        "num_train_timesteps": 500,
    }
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(content))
    for folder in (tmp_path, tmp_path / "scheduler"):
        config = ScheduleConfig.from_folder(folder)
        assert (config.shift, config.num_train) == (2.0, 500)
    np.testing.assert_array_equal(config.sigmas(4), sigma_schedule(4, 2.0, num_train=500))
    path.write_text(json.dumps(content | {"use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        ScheduleConfig.from_folder(tmp_path)
    path.write_text(json.dumps(content | {"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match="DDIMScheduler"):
        ScheduleConfig.from_folder(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        ScheduleConfig.from_folder(tmp_path)
