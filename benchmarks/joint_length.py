"""To which multiple the joint sequence of the denoiser is padded: seconds on this CPU, and what compilers say for cards
and TPUs.

    python -m benchmarks.joint_length cpu             # seconds, the multiples in turn
    python -m benchmarks.joint_length gpu:1xH100      # needs the extra `cuda`; no card
    python -m benchmarks.joint_length v5e:2x2         # needs the extra `tpu`; no TPU

Blocks of SD3.5 medium's size, 512 x 512 images and captions of 512 tokens: 1,024 image and 531 context tokens. For
devices that are not there the forward pass and the gradient are compiled in bfloat16: temporaries, bytes moved, and the
seconds of a roofline of the compiled instructions (cards; see `benchmarks.gpu_program`). Multiple 1 leaves padding to
the kernels.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

from uae_jax.plan import prepare_environment

MULTIPLES = (1, 2, 16, 64, 128)
TOKENS, CONTEXT = 32, 531  # patches of a side; of the condition


def build(batch: int, layers: int, dtype: str) -> tuple[Callable, Callable, tuple]:
    """Forward pass and gradient of a denoiser, and the shapes of their arguments."""
    import jax
    import jax.numpy as jnp

    from uae_jax.models.sd3.config import TransformerConfig
    from uae_jax.models.sd3.transformer import Transformer, abstract_params

    config = TransformerConfig(num_layers=layers, dual_attention_layers=(), dtype=dtype, remat="full")
    side = config.patch_size * TOKENS
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(config))
    shapes = (
        (batch, side, side, config.in_channels),
        (batch,),
        (batch, CONTEXT, config.joint_attention_dim),
        (batch, config.pooled_projection_dim),
    )
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    mask = jax.ShapeDtypeStruct((batch, CONTEXT), bool)

    def forward(params: dict, *given):
        return Transformer(config).apply({"params": params}, *given)

    def gradient(params: dict, *given):
        return jax.grad(lambda params: jnp.sum(jnp.square(forward(params, *given))))(params)

    return forward, gradient, (params, *inputs, mask)


def compile_for(topology: str, batch: int, layers: int) -> None:
    """Prints a line for each multiple, forward pass and gradient."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.gpu_program import costs
    from uae_jax import sharding
    from uae_jax.nn.attention import entry
    from uae_jax.planning.chips import parse_topology
    from uae_jax.planning.compile import QUICK_GPU, plan_mesh
    from uae_jax.planning.hlo import Module
    from uae_jax.stages.run_config import RunConfig

    chips = parse_topology(topology)
    config = mock.Mock(spec=RunConfig, mesh=sharding.MeshConfig())
    devices = plan_mesh(config, chips).devices.flat[:1]
    mesh = sharding.make_mesh(sharding.MeshConfig(), list(devices))
    place = NamedSharding(mesh, PartitionSpec())
    print("| multiple | program | temporaries, MiB | GB moved | seconds |\n|---|---|---|---|---|")
    for multiple in MULTIPLES:
        forward, gradient, shapes = build(batch, layers, "bfloat16")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
        for name, function in (("forward", forward), ("gradient", gradient)):
            with mock.patch.dict(entry.MULTIPLES, {chips.kind: multiple}), sharding.in_use(mesh):
                options = QUICK_GPU if chips.kind == "gpu" else {"exec_time_optimization_effort": -0.5}
                compiled = jax.jit(lambda *x, f=function: f(*x)).lower(*shapes).compile(compiler_options=options)
            found = costs(Module(compiled.as_text()), chips.chip, lambda use: "all")["all"]
            size = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(
                f"| {multiple} | {name} | {size:,.0f} | {found.traffic / 1e9:.2f} | {found.seconds:.5f} |", flush=True
            )


def time_here(batch: int, layers: int, repeats: int) -> None:
    """Prints seconds of a velocity in float32 on this CPU, the multiples in turn, and the medians."""
    import jax
    import jax.numpy as jnp

    from uae_jax.nn.attention import entry

    calls, arguments = {}, None
    for multiple in MULTIPLES:
        forward, _, shapes = build(batch, layers, "float32")
        if arguments is None:
            arguments = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
        with mock.patch.dict(entry.MULTIPLES, {"cpu": multiple}):
            calls[multiple] = jax.jit(lambda *x, f=forward: f(*x)).lower(*arguments).compile()
    seconds: dict[int, list[float]] = {multiple: [] for multiple in MULTIPLES}
    for _ in range(repeats + 1):
        for multiple, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds[multiple].append(time.perf_counter() - begin)
    print("| multiple | seconds |\n|---|---|")
    for multiple, taken in seconds.items():
        print(f"| {multiple} | {statistics.median(taken[1:]):.3f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", help="cpu, or a topology of uae_jax.plan")
    parser.add_argument("--batch", type=int, default=0, help="images; 1 on the CPU and 16 elsewhere")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    prepare_environment(options.device)
    if options.device == "cpu":
        time_here(options.batch or 1, options.layers, options.repeats)
    else:
        try:
            compile_for(options.device, options.batch or 16, options.layers)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
