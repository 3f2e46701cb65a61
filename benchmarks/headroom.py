"""Is there something for und_for_gen to learn? Whether the reward tells drawings of one caption apart by what is right
in them.

    python -m benchmarks.headroom                                          # the built-in model
    python -m benchmarks.headroom runs/tiny --captions=mixed

Draws each caption of built-in scenes several times, and prints the scene accuracy of the mean drawing and of the one
with the highest reward, and the correlation of the two inside groups, all with the built-in model's settings. A model
whose best drawing is no better than the mean one cannot learn from that reward: its drawings are all right, all wrong,
or judged by something else.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

import uae_jax
from uae_jax.api import Model
from uae_jax.data.loader import to_signed
from uae_jax.data.scene_checker import picture_scores
from uae_jax.data.sources import SCENE_CAPTIONS, SceneSource
from uae_jax.rewards.similarity import cosine_reward, load_encoder
from uae_jax.stages.inference import builtin_settings
from uae_jax.stages.weights import model_folder


def headroom(accuracy: np.ndarray, reward: np.ndarray) -> dict[str, float]:
    """What choosing by reward is worth.

    Args:
      accuracy, reward: of each drawing, `[B, G]`.

    Returns:
      `mean` and `best` accuracy (of the drawing with the highest reward), `spread` of rewards in a group, and the mean
      `correlation` over groups in which both vary (NaN without one).
    """
    chosen = accuracy[np.arange(len(reward)), reward.argmax(1)]
    varied = [pair for pair in zip(accuracy, reward) if pair[0].std() > 0 and pair[1].std() > 0]
    return {
        "mean": float(accuracy.mean()),
        "best": float(chosen.mean()),
        "spread": float(reward.std(1).mean()),
        "correlation": float(np.mean([np.corrcoef(*pair)[0, 1] for pair in varied])) if varied else float("nan"),
    }


def measure(model: Model, similar: Callable, captions: str, scenes: int, drawings: int) -> dict[str, float]:
    """`headroom` of a model on training scenes of a stream of their own.

    Args:
      model: that draws.
      similar: the reward `[B]` of originals and drawings `[B, H, W, 3]` in [-1, 1].
      captions, scenes, drawings: kind of caption, how many, and how often each is drawn.
    """
    source = SceneSource("train", 5, 32, captions)
    examples = [source[index] for index in range(scenes)]
    originals = to_signed(np.stack([example.image for example in examples]))
    found = []
    for number in range(drawings):
        ids = range(number * scenes, (number + 1) * scenes)
        drawn = np.stack(
            [
                np.asarray(picture)
                for picture in model.generate([example.caption for example in examples], sample_ids=ids)
            ]
        )
        found.append(
            (picture_scores([example.scene for example in examples], drawn), similar(originals, to_signed(drawn)))
        )
    return headroom(*(np.stack(part, 1) for part in zip(*found)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one line a kind of caption."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.headroom", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="",
        help="workdir or model folder with 32-pixel pictures; the built-in model when left out",
    )
    parser.add_argument("--captions", nargs="+", choices=SCENE_CAPTIONS, default=["full", "mixed"])
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--drawings", type=int, default=8, help="of each caption, at least 2")
    options = parser.parse_args(arguments)
    if options.scenes < 1 or options.drawings < 2:
        parser.error("needs at least one scene and two drawings of each caption")
    model = uae_jax.load(options.model, **builtin_settings())
    encoder, params = load_encoder(model_folder(options.model) / "clip")
    similar = jax.jit(lambda originals, drawn: cosine_reward(encoder, params, originals, drawn, 1)[:, 0])
    for captions in options.captions:
        found = measure(model, similar, captions, options.scenes, options.drawings)
        print(
            f"{captions}: scene accuracy {found['mean']:.3f} of the mean drawing, {found['best']:.3f} of the best of "
            f"{options.drawings} by reward; "
            f"rewards spread by {found['spread']:.3f} in a group; correlation {found['correlation']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
