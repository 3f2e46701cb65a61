"""Divergence guard: bounds on what a stage reports of its steps, and on the questions that it answers in between.

The loop asks `Guard` after every step and after every evaluation. When a bound is passed it stops the stage and
restores the stage's last good checkpoint. A single gradient outlier does no harm: `skip_outliers` leaves its update out
inside the compiled step.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from uae_jax.settings import Settings, setting

PyTree = Any

# what the guard reads of a step's metrics; a stage that does not report one of them is not judged by it
WATCHED = ("loss", "grad_norm", "reward", "kl", "truncated_fraction", "outlier_updates")
# what tripped, in words that continue "... is VALUE, its bound is BOUND"
MEANINGS = {
    "non_finite": "the number of recent steps whose loss or gradient is not finite",
    "gradient_outliers": "the number of recent updates that were left out as gradient outliers",
    "reward_fall": "the fall of the running-mean reward from its best",
    "kl": "the running-mean KL to the reference policy",
    "truncated": "the running share of captions cut off at the length limit",
    "understanding_fall": "the fall of the accuracy on a category of questions from before the stage",
}
# scores of this name and a category, as in `understanding_colour`, are accuracies on questions
UNDERSTANDING = "understanding"
COUNTS = ("non_finite", "gradient_outliers")
# bounds on running means, and the metric of each
MEANS = {"reward_fall": "reward", "kl": "kl", "truncated": "truncated_fraction"}


@dataclasses.dataclass(frozen=True)
class GuardConfig(Settings):
    """Bounds of every stage; 0 switches one off. Means are judged once their window is full."""

    window: int = setting(10, "steps of running means and of recent counts", unit="steps", low=2)
    reward_fall: float = setting(0.1, "the running-mean reward may fall by so much from its best", low=0, free=True)
    non_finite: int = setting(
        3,
        "so many recent steps with a non-finite loss or gradient trip; with 0 the first such loss ends the run",
        low=0,
        free=True,
    )
    gradient_ratio: float = setting(
        10.0, "an update whose gradient norm is above so many running medians is skipped", low=0
    )
    gradient_outliers: int = setting(3, "so many recent skipped updates trip", low=0, free=True)
    kl: float = setting(1.0, "bound of the running-mean KL, a token", low=0, free=True)
    flow_kl: float = setting(0.0, "the same for und_for_gen, a latent value", low=0, free=True)
    truncated: float = setting(0.5, "bound of the running share of captions without an end", low=0, free=True)
    # The same questions are answered before and during a stage. With 40 questions of a category (`questions_during` of
    # the built-in ones) and a true accuracy of p at both times, the difference of the two accuracies has a standard
    # deviation of at most sqrt(2 p (1 - p) / 40): .067 at p = .9, of which .25 is 3.7, and .11 at p = .5, of which it
    # is 2.2. Where a model answers near p = .5, ask 100 questions a category or more.
    understanding_fall: float = setting(
        0.25,
        "the accuracy on a category of questions may fall by so much from before the stage",
        low=0,
        high=1,
        free=True,
    )
    margin: float = setting(0.5, "a checkpoint is good below this share of every bound", above=0, high=1, free=True)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, and a ratio that skips ordinary updates."""
        yield from super().problems()
        if 0 < self.gradient_ratio <= 1 or (self.gradient_outliers and not self.gradient_ratio):
            yield (
                f"gradient_ratio is {self.gradient_ratio}; it must be above 1, and set where gradient_outliers is; "
                "0 switches both off"
            )

    def bounds(self) -> dict[str, float]:
        """Bound by name (`MEANINGS`), those that are off included."""
        return {name: getattr(self, name) for name in MEANINGS}

    @property
    def on(self) -> bool:
        """Whether anything can trip."""
        return any(self.bounds().values())


OFF = GuardConfig(
    reward_fall=0.0,
    non_finite=0,
    gradient_ratio=0.0,
    gradient_outliers=0,
    kl=0.0,
    flow_kl=0.0,
    truncated=0.0,
    understanding_fall=0.0,
)


@dataclasses.dataclass(frozen=True)
class Trip:
    """What passed its bound: a name of `MEANINGS`, after which step, its value and its bound.

    Of questions also their `category`, and the accuracy `before` the stage and `now`.
    """

    what: str
    step: int
    value: float
    bound: float
    category: str = ""
    before: float | None = None
    now: float | None = None

    def record(self) -> dict[str, Any]:
        """The JSON-able part: the fields that are set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in ("", None)}


def meaning(trip: Mapping[str, Any]) -> str:
    """What passed its bound, in words that continue "... is VALUE"; of a `Trip.record`."""
    if not trip.get("category"):
        return MEANINGS[trip["what"]]
    return (
        f"the fall of the accuracy on the questions about {trip['category']} ({trip['before']:.3g} before the stage, "
        f"{trip['now']:.3g} now)"
    )


def reason(trip: Mapping[str, Any]) -> str:
    """A sentence without its end on what passed its bound; of a `Trip.record`."""
    return f"{meaning(trip)} is {trip['value']:.4g} after step {trip['step']}, its bound is {trip['bound']:.4g}"


class Tripped(Exception):
    """Ends the steps of a stage; the loop restores its last good checkpoint."""

    def __init__(self, trip: Trip) -> None:
        super().__init__(reason(trip.record()))
        self.trip = trip


class Guard:
    """The running statistics of a stage. Equal numbers in equal order give equal statistics, over restarts too.

    Args:
      config: bounds.
      statistics: of `statistics()`, to go on from there.
    """

    def __init__(self, config: GuardConfig, statistics: Mapping[str, Any] | None = None) -> None:
        self.config = config
        saved = statistics or {"recent": {}, "best": None, "outliers": 0, "answers": {"before": {}, "now": {}}}
        self._recent: dict[str, list[float]] = {name: list(values) for name, values in saved["recent"].items()}
        self._best: float | None = saved["best"]
        self._outliers: float = saved["outliers"]
        self._before, self._now = (dict(saved["answers"][when]) for when in ("before", "now"))

    def statistics(self) -> dict[str, Any]:
        """Everything the next step is judged by, JSON-able."""
        return {
            "recent": {name: list(values) for name, values in self._recent.items()},
            "best": self._best,
            "outliers": self._outliers,
            "answers": {"before": dict(self._before), "now": dict(self._now)},
        }

    def begin(self, scores: Mapping[str, float]) -> None:
        """Takes in the scores before the stage, from which the answers may fall; other scores are ignored."""
        self._before = _accuracies(scores)

    def observe_answers(self, step: int, scores: Mapping[str, float]) -> Trip | None:
        """Takes in scores after a step, and says whether a bound is passed; categories without a start are ignored."""
        self._now = {name: value for name, value in _accuracies(scores).items() if name in self._before}
        return self._passed(step)

    def observe(self, step: int, metrics: Mapping[str, float]) -> Trip | None:
        """Takes in the metrics of the next step, and says whether a bound is passed.

        Args:
          step: its number.
          metrics: those of `WATCHED` that the stage reports; values that are not finite stay out of the means.
        """
        lost = not all(math.isfinite(metrics.get(name, 0.0)) for name in ("loss", "grad_norm"))
        self._append("non_finite", float(lost))
        outliers = metrics.get("outlier_updates", 0.0)
        self._append("gradient_outliers", outliers - self._outliers)
        self._outliers = outliers
        for name in MEANS.values():
            if math.isfinite(metrics.get(name, math.nan)):
                self._append(name, metrics[name])
        mean = self._mean("reward")
        if mean is not None:
            self._best = mean if self._best is None else max(self._best, mean)
        return self._passed(step)

    def _passed(self, step: int) -> Trip | None:
        for name, value in self.measured().items():
            bound = self.config.bounds()[name]
            if bound and (value >= bound if name in COUNTS else value > bound):
                more = self._worst() if name == "understanding_fall" else {}
                return Trip(name, step, float(value), float(bound), **more)
        return None

    def _worst(self) -> dict[str, Any]:
        """The category whose accuracy fell most, with both accuracies."""
        category = max(self._now, key=lambda name: self._before[name] - self._now[name])
        return {"category": category, "before": self._before[category], "now": self._now[category]}

    def measured(self) -> dict[str, float]:
        """What is compared with the bounds, by name; running means only once their window is full."""
        mean = self._mean("reward")
        means = {
            "reward_fall": None if mean is None or self._best is None else self._best - mean,
            **{name: self._mean(MEANS[name]) for name in ("kl", "truncated")},
            "understanding_fall": max((self._before[name] - value for name, value in self._now.items()), default=None),
        }
        counts = {name: sum(self._recent.get(name, ())) for name in COUNTS}
        return counts | {name: value for name, value in means.items() if value is not None}

    @property
    def fine(self) -> bool:
        """Whether a checkpoint written now is good: everything has been judged, and nothing exceeds `margin` of its
        bound. A mean whose window is not full yet says nothing.
        """
        bounds = self.config.bounds()
        reported = (self._recent.get(field, ()) for name, field in MEANS.items() if bounds[name])
        if any(0 < len(values) < self.config.window for values in reported):
            return False
        return all(
            not bounds[name] or value <= self.config.margin * bounds[name] for name, value in self.measured().items()
        )

    def _append(self, name: str, value: float) -> None:
        self._recent[name] = [*self._recent.get(name, ()), float(value)][-self.config.window :]

    def _mean(self, name: str) -> float | None:
        values = self._recent.get(name, ())
        return math.fsum(values) / len(values) if len(values) == self.config.window else None


def _accuracies(scores: Mapping[str, float]) -> dict[str, float]:
    """The accuracies of the categories by name."""
    start = f"{UNDERSTANDING}_"
    return {name.removeprefix(start): float(value) for name, value in scores.items() if name.startswith(start)}


class OutlierState(NamedTuple):
    """Optimizer state of `skip_outliers`.

    Attributes:
      norms: float32 [window], gradient norms of the last updates, 0 where there was none yet.
      seen: int32 [], norms written so far.
      outliers: int32 [], updates left out so far.
      inner: state of the optimizer inside.
    """

    norms: jax.Array
    seen: jax.Array
    outliers: jax.Array
    inner: PyTree


def skip_outliers(optimizer: optax.GradientTransformation, config: GuardConfig) -> optax.GradientTransformation:
    """The optimizer, which leaves out updates whose gradient norm is more than `gradient_ratio` times the running
    median.

    An outlier changes neither parameters nor moments. Its norm does enter the window, so that a lasting change of scale
    is taken for what it is within half a window; norms of 0 (no sample had an advantage) do not. Nothing is left out
    before the window is full. With `gradient_ratio` 0 the optimizer is returned as it is.

    Args:
      optimizer: clipping included: norms are measured before it.
      config: of the guard.
    """
    if not config.gradient_ratio:
        return optimizer
    window = config.window

    def init(params: PyTree) -> OutlierState:
        return OutlierState(
            jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), optimizer.init(params)
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, OutlierState]:
        norm = optax.tree.norm(updates).astype(jnp.float32)
        outlier = (state.seen >= window) & (norm > config.gradient_ratio * jnp.median(state.norms))
        changes, inner = optimizer.update(updates, state.inner, params)
        changes = jax.tree.map(lambda change: jnp.where(outlier, jnp.zeros_like(change), change), changes)
        inner = jax.tree.map(lambda new, old: jnp.where(outlier, old, new), inner, state.inner)
        counted = norm > 0
        norms = jnp.where(counted, state.norms.at[state.seen % window].set(norm), state.norms)
        return changes, OutlierState(norms, state.seen + counted, state.outliers + outlier, inner)

    return optax.GradientTransformation(init, update)


def outlier_metrics(opt_state: PyTree) -> dict[str, jax.Array]:
    """`outlier_updates`, the updates left out so far, where the optimizer is one of `skip_outliers`."""
    return {"outlier_updates": opt_state.outliers} if isinstance(opt_state, OutlierState) else {}
