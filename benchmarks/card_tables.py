"""The tables of compiled plans: docs/cards.md has one a preset, docs/decoders.md and docs/janus.md one of all presets.

    python -m uae_jax.plan --config=configs/unified_grpo.py:PRESET --topology=gpu:8xH100 --json=plans/a.json
    python -m benchmarks.card_tables plans/*.json
    python -m benchmarks.card_tables --together plans/*.json

Plans of one preset and topology may lie in several files, a stage each.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen", "unified_ar")
HEAD = (
    "cards",
    "stage",
    "images",
    "stays on a card",
    "temporaries",
    "peak",
    "of the card",
    "step s, at least",
    "compile s",
)
TOGETHER = (
    "preset",
    "machine",
    "stage",
    "GiB a device",
    "of the device",
    "step s, at least",
    "of it captions or tokens",
    "drawings, of the FLOPs",
    "s of compiled instructions",
)
GIB = 2**30


def read(paths: list[pathlib.Path]) -> dict[str, dict[tuple[str, str], dict]]:
    """Stages of all files by preset, and by topology and stage, with the card's memory added.

    Raises:
      ValueError: a plan was estimated, not compiled.
    """
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for path in paths:
        plan = json.loads(path.read_text())
        for stage in plan["stages"]:
            if stage["memory"]["estimated"]:
                raise ValueError(f"{path} is an estimate; compile it with the extra `cuda` installed")
            found.setdefault(plan["preset"], {})[plan["topology"], stage["stage"]] = stage | {
                "card": plan["chip"]["memory"]
            }
    return found


def row(topology: str, stage: dict) -> str:
    """One line of Markdown."""
    memory = stage["memory"]
    cells = [
        topology.removeprefix("gpu:"),
        stage["stage"],
        str(stage["images"]),
        *(f"{memory[name] / GIB:.2f}" for name in ("arguments", "temporaries", "peak")),
        f"{100 * memory['peak'] / stage['card']:.0f} %",
        f"{stage['time']['seconds']:.1f}",
        f"{memory['seconds']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def whole_row(preset: str, topology: str, stage: dict) -> str:
    """One line of Markdown of the table of all presets; a network that draws by tokens has no share of drawings."""
    memory, time = stage["memory"], stage["time"]
    cells = [
        f"`{preset}`",
        topology.removeprefix("gpu:"),
        stage["stage"],
        f"{memory['peak'] / GIB:.1f}",
        f"{100 * memory['peak'] / stage['card']:.0f} %",
        f"{time['seconds']:.1f}",
        f"{time['decoding']:.1f}",
        f"{100 * stage['drawing'] / stage['flops']:.0f} %" if stage["drawing"] else "-",
        f"{stage['compiled']['seconds']['seconds']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def head(names: Sequence[str]) -> str:
    """The first two lines of a table."""
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def main() -> None:
    """Prints a table for each preset, or one of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=pathlib.Path)
    parser.add_argument("--together", action="store_true", help="one table of all presets")
    options = parser.parse_args()
    try:
        presets = read(options.plans)
    except KeyError as error:
        raise SystemExit(f"error: a file has no field {error}; make it with --json of uae_jax.plan") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    ordered = {
        preset: sorted(stages, key=lambda key: (key[0], STAGES.index(key[1]))) for preset, stages in presets.items()
    }
    if options.together:
        rows = [
            whole_row(preset, key[0], presets[preset][key]) for preset in sorted(ordered) for key in ordered[preset]
        ]
        print("\n".join([head(TOGETHER), *rows]))
        return
    for preset, keys in sorted(ordered.items()):
        print(f"### `{preset}`\n\n{head(HEAD)}")
        for topology, name in keys:
            print(row(topology, presets[preset][topology, name]))
        print()


if __name__ == "__main__":
    main()
