"""What XLA made of a stage for a card: who runs the operations, where the bytes go, how many launches a token takes.

    python -m uae_jax.plan --config=configs/unified_grpo.py:qwen2_5_vl_3b_sd3_5_medium@1xH200 --topology=gpu:1xH100
    --hlo=hlo python -m benchmarks.gpu_program hlo/gen_for_und.hlo hlo/und_for_gen.hlo --topology=gpu:1xH100

Seconds are the roofline of the compiled instructions: each takes the longer of its operations at the card's peak in
bfloat16 and its bytes at the memory's bandwidth; collectives take the bytes of their results at the links' bandwidth,
as if nothing ran beside them. Launches, caches and float32 products cost more than that.
"""

import argparse
import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from uae_jax.planning.chips import Chip, parse_topology
from uae_jax.planning.hlo import Module, Use
from uae_jax.planning.hlo_text import COLLECTIVES

# the first pattern that the path of an instruction and of its loops holds
PHASES = (
    ("auto-encoder", "autoencoder"),
    ("image encoders", "image_encoder"),
    ("denoiser, update", r"(jvp|transpose).*Transformer"),
    ("denoiser", "Transformer"),
    ("captioner's vision", "VisionTower"),
    ("captions' update", r"(jvp|transpose).*LanguageModel"),
    ("text encoding and prompts", "LanguageModel"),
)
TEXT = "captions' loop over tokens"


@dataclasses.dataclass
class Cost:
    """Sums over instructions: launches, operations, bytes, and seconds of the roofline."""

    launches: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    seconds: float = 0.0

    def add(self, times: float, flops: float, traffic: float, seconds: float) -> None:
        """An instruction that runs so many times."""
        self.launches += times
        self.flops += times * flops
        self.traffic += times * traffic
        self.seconds += times * seconds


def collective(use: Use) -> str:
    """The kind of a collective; empty for every other instruction."""
    return next((name for name in COLLECTIVES if use.instruction.opcode.startswith(name)), "")


def runner(use: Use) -> str:
    """Who runs an instruction."""
    instruction = use.instruction
    if collective(use):
        return "NCCL"
    for name, words in (("cuDNN attention", "fmha"), ("cuDNN convolutions", "__cudnn$conv"), ("cuBLAS", "__cublas")):
        if words in instruction.target:
            return name
    if '"kind":"__triton' in instruction.attributes:
        return "Triton"
    if instruction.opcode == "copy" or "dynamic_slice_fusion" in instruction.attributes:
        return "copies"
    return "XLA's own kernels"


def phase(use: Use, tokens: int) -> str:
    """Which part of a step an instruction belongs to; sampling's loop is the one that runs once a token."""
    if use.loops and use.times % tokens == 0 and "jvp" not in "".join(use.loops):
        return TEXT
    path = " ".join((*use.loops, use.instruction.path))
    return next((name for name, pattern in PHASES if re.search(pattern, path)), "everything else")


def costs(module: Module, chip: Chip, group: Callable[[Use], str]) -> dict[str, Cost]:
    """Costs by group, the longest first."""
    found: dict[str, Cost] = defaultdict(Cost)
    for use in module.uses():
        flops, traffic = module.flops(use), module.traffic(use)
        seconds = max(flops / chip.flops, traffic / chip.memory_bandwidth)
        if collective(use):
            seconds = use.instruction.bytes / chip.link_bandwidth
        found[group(use)].add(use.times, flops, traffic, seconds)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def collectives(module: Module) -> dict[tuple[str, str], tuple[float, float]]:
    """How often each kind of collective runs, and bytes of its results, by the loop that it stands in."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for use in module.uses():
        if kind := collective(use):
            loop = (
                re.sub(r"jit\(train_step\)/|closed_call/|body/|checkpoint/", "", use.loops[-1])
                if use.loops
                else "outside of loops"
            )
            count, size = found.get((kind, loop), (0.0, 0.0))
            found[kind, loop] = count + use.times, size + use.times * use.instruction.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def report(name: str, module: Module, chip: Chip, tokens: int) -> str:
    """All tables of one stage."""

    def rows(found: dict[str, Cost]) -> list[list[str]]:
        whole = sum(cost.flops for cost in found.values()) or 1.0
        return [
            [
                key,
                f"{cost.launches:,.0f}",
                f"{100 * cost.flops / whole:.1f} %",
                f"{cost.traffic / 1e9:,.0f}",
                f"{cost.seconds:.2f}",
            ]
            for key, cost in found.items()
        ]

    head = ("launches", "of all operations", "GB", "seconds")
    by_phase = costs(module, chip, lambda use: phase(use, tokens))
    parts = [
        f"### {name} on {chip.name}",
        "",
        table(("who", *head), rows(costs(module, chip, runner))),
        "",
        table(("phase", *head), rows(by_phase)),
    ]
    if TEXT in by_phase:
        loop = by_phase[TEXT]
        parts += [
            "",
            f"A token: {loop.launches / tokens:,.0f} launches, {loop.traffic / tokens / 1e9:.2f} GB, "
            f"{1e3 * loop.seconds / tokens:.2f} ms of the roofline.",
        ]
    moved = collectives(module)
    if moved:
        lines = [
            [kind, loop, f"{count:,.0f}", f"{size / 1e9:,.2f}"]
            for (kind, loop), (count, size) in list(moved.items())[:12]
        ]
        parts += ["", table(("collective", "loop", "runs", "GB of results"), lines)]
    return "\n".join(parts)


def main() -> None:
    """Prints the tables of each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=pathlib.Path, help="files that --hlo of uae_jax.plan wrote")
    parser.add_argument("--topology", required=True, help="the one that they were compiled for")
    parser.add_argument("--tokens", type=int, default=512, help="max_new_tokens of the stage")
    options = parser.parse_args()
    if options.tokens < 1:
        parser.error(f"--tokens is {options.tokens}; it must be positive")
    try:
        topology, texts = parse_topology(options.topology), [path.read_text() for path in options.texts]
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if topology.kind != "gpu":
        raise SystemExit(f"error: {topology.name} has no cards; give the topology that the files were compiled for")
    for path, text in zip(options.texts, texts):
        module = Module(text, options.tokens)
        if not module.entry:
            raise SystemExit(f"error: {path} is no compiled program; make it with --hlo of uae_jax.plan")
        print(report(path.stem, module, topology.chip, options.tokens) + "\n")


if __name__ == "__main__":
    main()
