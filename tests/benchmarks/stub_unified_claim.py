"""In place of training and scoring: notes its call; scores follow from the arm and from the seed."""

import json
import pathlib
import sys

WORTH = {"none": 0.4, "unified_ar": 0.9, "shuffled": 0.5, "supervised": 0.7}
OWN = ("fact_recall", "fact_precision", "unified_score", "heldout_score")


def main() -> int:
    options = {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in sys.argv[1:])}
    place = pathlib.Path(options["output"]).parent if "output" in options else pathlib.Path(options["workdir"])
    root, arm = place.parents[1], place.name.removesuffix("_scores")
    with (root / "calls.txt").open("a") as calls:
        calls.write(f"{place.relative_to(root)} {' '.join(sys.argv[1:])}\n")
    seed = int(place.parent.name.removeprefix("seed_"))
    if "output" in options:
        # the guidance that is worse for dev captions is better for test captions, and is not taken
        name, value = "true_caption_scene_accuracy", WORTH[arm] + 0.001 * seed
        rows = {"1": {"dev": {name: 0.8}, "test": {name: {"value": value}}}}
        found = {"scales": rows | {"2": {"dev": {name: 0.7}, "test": {name: {"value": 1.0}}}}}
        pathlib.Path(options["output"]).write_text(json.dumps(found))
    else:
        before, after = ({name: {"value": WORTH[of] + 0.001 * seed} for name in OWN} for of in ("none", arm))
        (place / "summary.json").write_text(json.dumps({"stages": [{"before": before, "after": after}]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
