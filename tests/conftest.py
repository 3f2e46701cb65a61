"""Runs every test on faked CPU devices, without a network."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# programs are compiled in half the time; what a test checks does not depend on how well they are optimised
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
# without these a program compiles twice as fast again, and those of tests are run once; jaxlib 0.12 does not know the
# name
if "fusion_emitters" not in flags and importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags

import gc  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# tracing makes many objects and little garbage
gc.set_threshold(200_000, 20, 100)

TESTS = pathlib.Path(__file__).parent
# folders and files whose tests take a second or less each: mathematics, settings, files, protocols
FAST = (
    "data",
    "diffusion",
    "hf",
    "rl",
    "training/test_guard.py",
    "training/test_metrics.py",
    "training/test_optimizer.py",
    "planning/test_chips.py",
    "planning/test_hlo.py",
    "methods/test_registry.py",
    "test_settings.py",
    "test_config_file.py",
    "test_imports.py",
    "test_presets.py",
    "test_correctness_page.py",
    "test_shapes.py",
)
# files that mostly compile: jaxlib from 0.11 on takes twice as long for that, and they are slow ones there
COMPILING = (
    "methods/test_controls_of_rewards.py",
    "methods/test_joint.py",
    "methods/test_nft_levels.py",
    "methods/test_one_replay.py",
    "methods/test_rl_pieces.py",
    "methods/test_rl_steps.py",
    "methods/test_rollout_parts.py",
    "methods/test_unified_ar.py",
    "models/test_qwen2_5_vl.py",
    "models/test_vae.py",
    "planning/test_gpu_lowering.py",
    "rollouts/test_answering.py",
    "rollouts/test_shared_sampling.py",
    "stages/test_devices.py",
    "stages/test_run.py",
)
COMPILES_SLOWLY = jax.__version_info__ >= (0, 11)


def pytest_collection_modifyitems(items):
    """Marks the fast tier, and what is slow with this compiler.

    The longest files come first: a worker that met them last would work on alone.
    """
    for item in items:
        path = item.path.relative_to(TESTS)
        if (path.as_posix() in FAST or path.parts[0] in FAST) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)
        if COMPILES_SLOWLY and path.as_posix() in COMPILING:
            item.add_marker(pytest.mark.slow)
    items.sort(
        key=lambda item: (item.path.name not in ("test_run.py", "test_notebooks.py"), "stages" not in item.path.parts)
    )


@pytest.fixture(autouse=True)
def highest_precision():
    """Comparisons with PyTorch need full float32 products on every backend."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """A worker that kept the programs of every module would grow to several gigabytes.

    What is left belongs to libraries: the collector, which would look at a million of their objects again and again,
    leaves them alone from then on.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs that were compiled once are read back, also by the other parallel workers: most tests build the same
    ones again.

    A folder that JAX_COMPILATION_CACHE_DIR names is used instead, also by later sessions.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    base = (
        base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    )  # workers have folders of their own in that of the session
    # the many small programs of single operations too: one is read in a tenth of the time in which it is compiled
    names = {"jax_compilation_cache_dir": str(base / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
