"""Descriptions of NVIDIA cards for XLA's compiler, which then compiles for an absent card.

The compiler accepts programs of any size: `planning.table` compares with the card's memory. Library workspaces count 0,
since no library is called.

Sources: XLA's target descriptions of H100, H200, A100, B200 and RTX PRO 6000 (github.com/openxla/xla,
target_config/specs), NVIDIA's data sheets, and table 16 of the CUDA programming guide (limits of a compute capability).
"""

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Generation:
    """The properties of a compute capability.

    Attributes:
      major, minor: the compute capability.
      shared: bytes of shared memory per multiprocessor.
      shared_block: largest shared memory of a block in bytes.
      threads: threads per multiprocessor.
      lanes: float32 units per multiprocessor.
    """

    major: int
    minor: int
    shared: int
    shared_block: int
    threads: int
    lanes: int


TURING = Generation(7, 5, 65536, 65536, 1024, 64)
AMPERE = Generation(8, 0, 167936, 166912, 2048, 64)
AMPERE_GEFORCE = Generation(8, 6, 102400, 101376, 1536, 128)
ADA = Generation(8, 9, 102400, 101376, 1536, 128)
HOPPER = Generation(9, 0, 233472, 232448, 2048, 128)
BLACKWELL = Generation(10, 0, 233472, 232448, 2048, 128)
BLACKWELL_GEFORCE = Generation(12, 0, 131072, 101376, 1536, 128)


@dataclasses.dataclass(frozen=True)
class Target:
    """A card for the compiler.

    Attributes:
      generation: of the card.
      processors: number of multiprocessors.
      cache: bytes of the L2 cache.
      clock: in GHz.
    """

    generation: Generation
    processors: int
    cache: int
    clock: float


TARGETS = {
    "H100": Target(HOPPER, 132, 50 * MIB, 1.98),
    "H200": Target(HOPPER, 132, 50 * MIB, 1.98),
    "A100-40": Target(AMPERE, 108, 40 * MIB, 1.41),
    "A100-80": Target(AMPERE, 108, 40 * MIB, 1.41),
    "L4": Target(ADA, 58, 48 * MIB, 2.04),
    "L40S": Target(ADA, 142, 96 * MIB, 2.52),
    "RTX3090": Target(AMPERE_GEFORCE, 82, 6 * MIB, 1.70),
    "RTX4090": Target(ADA, 128, 72 * MIB, 2.52),
    "RTX5090": Target(BLACKWELL_GEFORCE, 170, 96 * MIB, 2.41),
    "B200": Target(BLACKWELL, 148, 126 * MIB, 1.965),
    "T4": Target(TURING, 40, 4 * MIB, 1.59),
}


def target_text(name: str, memory: float, bandwidth: float, device_kind: str) -> str:
    """A card as the text form of XLA's `GpuTargetConfigProto`.

    Args:
      name: a key of `TARGETS`.
      memory: in bytes.
      bandwidth: of the memory, in bytes per second.
      device_kind: CUDA's name of the card.
    """
    card = TARGETS[name]
    generation = card.generation
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": generation.shared,
        "threads_per_core_limit": generation.threads,
        "core_count": card.processors,
        "fpus_per_core": generation.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(bandwidth),
        "l2_cache_size": card.cache,
        "clock_rate_ghz": card.clock,
        "device_memory_size": int(memory),
        "shared_memory_per_block_optin": generation.shared_block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    device = " ".join(f"{key}: {value}" for key, value in limits.items())
    capability = f"cuda_compute_capability {{ major: {generation.major} minor: {generation.minor} }}"
    versions = "dnn_version_info { major: 9 minor: 12 patch: 0 } runtime_version { major: 13 minor: 0 patch: 0 }"
    kind = f'device_description_str: "{device_kind}"'
    return f'gpu_device_info {{ {device} {capability} }} platform_name: "CUDA" {versions} {kind}'
