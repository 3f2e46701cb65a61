"""What `rollout_slots` saves: turns of the loop over tokens, and the seconds of what they read.

    python -m benchmarks.caption_slots

Nothing runs on a card. Lengths of captions are drawn from a normal distribution that is cut at the longest caption. A
rollout in parts takes as many turns as the longest caption of each part has tokens; slots take the turns of a queue. A
turn reads the language model once, and the keys and values that its rows have room for, at the memory's bandwidth.
"""

import argparse
import heapq
from collections.abc import Sequence

import numpy as np

from configs.presets import preset
from uae_jax.models.language.config import TextConfig
from uae_jax.planning.chips import CHIPS
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig

MEDIUM = "qwen2_5_vl_3b_sd3_5_medium"
# preset, card, stage, slots
CASES = (
    *(
        (f"{MEDIUM}@1x24GB", card, *stage)
        for card in ("L4", "RTX4090")
        for stage in (("gen_for_und", 64), ("und_for_gen", 48))
    ),
    *((f"{MEDIUM}@1x80GB", "H100", *stage) for stage in (("gen_for_und", 128), ("und_for_gen", 48))),
)
WIDTH = 2  # bytes of a number


def queue_turns(lengths: Sequence[int], slots: int) -> int:
    """Turns until a queue of captions has been served by so many slots."""
    ends = [0] * slots
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


def part_turns(lengths: np.ndarray, parts: int) -> int:
    """Turns of parts, one after the other, each as long as its longest caption."""
    return int(lengths.reshape(parts, -1).max(1).sum())


def turn_bytes(text: TextConfig, rows: int, prompts: int, prompt: int, length: int) -> float:
    """Bytes that a turn reads: the language model, and room for keys and values of rows and prompts."""
    heads = text.key_heads * text.head_width
    layer = 2 * text.width * (text.width + heads) + 3 * text.width * text.mlp_width
    kept = 2 * text.layers * heads * (rows * length + prompts * prompt)
    return WIDTH * (text.layers * layer + text.vocab_size * text.width + kept)


def row(name: str, card: str, stage: str, slots: int, mean: int, spread: float, seeds: int) -> str:
    """A line of the table; figures are means over the seeds."""
    config = frozen(RunConfig, preset(name, (stage,)).to_dict())
    settings, text = config.stage(stage), TextConfig()
    group, parts = settings.captions_per_image, settings.rollout_parts
    count, longest = settings.batch_size * group, settings.max_new_tokens
    turns = []
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).normal(mean, spread * mean, count)
        lengths = np.clip(drawn.round().astype(int), 1, longest)
        turns.append((part_turns(lengths, parts), queue_turns(lengths.tolist(), slots)))
    before, after = np.mean(turns, axis=0)
    bandwidth, some = CHIPS[card].memory_bandwidth, count // parts
    old, new = (
        turn_bytes(text, some, some // group, config.data.max_prompt, longest) / bandwidth,
        turn_bytes(text, slots, slots, config.data.max_prompt, longest) / bandwidth,
    )
    cells = (f"`{name}`", card, stage, f"{parts} x {some}", slots, mean, f"{before:,.0f}", f"{after:,.0f}")
    return "| " + " | ".join(map(str, (*cells, f"{before * old:.1f}", f"{after * new:.1f}"))) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--means", default="150,300", help="mean lengths of captions in tokens")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation over the mean")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args(arguments)
    print("| preset | card | stage | parts x captions | slots | mean length | turns | with slots | s | with slots |")
    print("|" + "---|" * 10)
    for case in CASES:
        for mean in options.means.split(","):
            print(row(*case, int(mean), options.spread, options.seeds))


if __name__ == "__main__":
    main()
