"""The tables of docs/cards.md from plans that were compiled for cards.

    python -m uae_jax.plan --config=configs/unified_grpo.py:PRESET --topology=gpu:8xH100 --json=plans/a.json
    python -m benchmarks.card_tables plans/*.json

Plans of one preset and topology may lie in several files, a stage each.
"""

import argparse
import json
import pathlib

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
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


def main() -> None:
    """Prints a table for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=pathlib.Path)
    try:
        presets = read(parser.parse_args().plans)
    except KeyError as error:
        raise SystemExit(f"error: a file has no field {error}; make it with --json of uae_jax.plan") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for preset, stages in sorted(presets.items()):
        print(f"### `{preset}`\n\n| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
        for topology, name in sorted(stages, key=lambda key: (key[0], STAGES.index(key[1]))):
            print(row(topology, stages[topology, name]))
        print()


if __name__ == "__main__":
    main()
