"""The objective: similarity of reconstruction and original under frozen image encoders (arXiv 2509.09666, section
3).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax import trees
from uae_jax.models.encoders import clip, dino, weights
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.rl.advantages import group_advantages
from uae_jax.settings import Settings, setting

CLAMPS = ("hard", "straight_through", "none")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen image encoder with its own image processing; parameters are passed beside it.

    Attributes:
      name: under which its parameters and metrics are kept.
      kind: `clip`, `dinov2` or `dinov3`.
      config: of the model.
      preprocess: how it wants its images.
      remat: recompute layers in the backward pass (for rewards that are differentiated).
      dtype: precision of the computation; image processing and features are float32.
    """

    name: str
    kind: str
    config: CLIPConfig | CLIPVisionConfig | Dinov2Config | Dinov3Config
    preprocess: Preprocess
    remat: bool = False
    dtype: str = "float32"

    def features(self, params: trees.Tree, pixels: Array) -> Array:
        """Features of length 1.

        Args:
          params: of the encoder.
          pixels: `[B, H, W, 3]` in [-1, 1], of any size.

        Returns:
          float32 `[B, D]`.
        """
        return self.embed(params, self.prepare(pixels))

    def prepare(self, pixels: Array) -> Array:
        """Pictures `[B, H, W, 3]` in [-1, 1] as the encoder wants them, `[B, S, S', 3]`."""
        with jax.named_scope("image_encoder"):
            return apply(self.preprocess, (pixels.astype(jnp.float32) + 1) / 2).astype(self.dtype)

    def embed(self, params: trees.Tree, images: Array) -> Array:
        """Features of length 1, float32 `[B, D]`, of prepared pictures."""
        model = clip.image_features if self.kind == "clip" else dino.cls_features
        with jax.named_scope("image_encoder"):
            features = model(self.config, params, images, remat=self.remat).astype(jnp.float32)
        return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-12)


def load_encoder(
    folder: str | pathlib.Path,
    name: str | None = None,
    *,
    variant: str = "published",
    placement: Callable[[trees.Tree], trees.Tree] | None = None,
) -> tuple[Encoder, dict]:
    """An encoder and its parameters from a CLIP, Long-CLIP, DINOv2 or DINOv3 folder.

    Args:
      folder: see `weights.open_encoder`.
      name: the encoder's name; None takes `clip`, `longclip`, `dinov2` or `dinov3`.
      variant: image processing: `published`, or `uae` (see `Preprocess.from_folder`).
      placement: where the parameters go, see `hf.rules.load_params`.

    Returns:
      The encoder, and float32 parameters; of CLIP the image tower only.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its tensors do not fit.
    """
    source = weights.open_encoder(folder).image_tower()
    kind = "clip" if source.kind == "longclip" else source.kind
    encoder = Encoder(name or source.kind, kind, source.config, source.preprocess(variant))
    return encoder, source.load(placement=placement)


def clamp_image(pixels: Array, clamp: str = "hard") -> Array:
    """Cuts images to [-1, 1].

    Args:
      pixels: any shape.
      clamp: `hard` has no gradient outside of the range; `straight_through` passes the gradient as if it had not
        cut; `none` leaves the values.

    Raises:
      ValueError: another word.
    """
    if clamp not in CLAMPS:
        raise ValueError(f"clamp {clamp!r} is not known; use one of {', '.join(CLAMPS)}")
    if clamp == "none":
        return pixels
    cut = jnp.clip(pixels, -1.0, 1.0)
    return cut if clamp == "hard" else pixels + jax.lax.stop_gradient(cut - pixels)


def _groups(original: Array, reconstruction: Array, group: int) -> None:
    if len(reconstruction) != len(original) * group:
        raise ValueError(
            f"{len(reconstruction)} reconstructions are not groups of {group} for {len(original)} originals"
        )


def _group_features(
    encoder: Encoder, params: trees.Tree, original: Array, reconstruction: Array, group: int
) -> tuple[Array, Array]:
    """Features of the originals `[B, D]` and of their reconstructions `[B, G, D]`.

    Groups go through the encoder with their original, in one batch that is cut over devices as they are. A single
    reconstruction does not: where a loss is differentiated (cold start), the original would be, too, and the backward
    pass twice as long.
    """
    if group == 1:
        return encoder.features(params, original), encoder.features(params, reconstruction)[:, None]
    pictures = encoder.prepare(original), encoder.prepare(reconstruction)
    rows = [images.reshape(len(original), -1, *images.shape[1:]) for images in pictures]
    features = encoder.embed(params, jnp.concatenate(rows, axis=1).reshape(-1, *pictures[0].shape[1:]))
    features = features.reshape(len(original), 1 + group, -1)
    return features[:, 0], features[:, 1:]


def cosine_reward(
    encoder: Encoder,
    params: trees.Tree,
    original: Array,
    reconstruction: Array,
    group: int,
    *,
    clamp: str = "hard",
    contrast: float = 0.0,
    contrast_temperature: float = 0.0,
) -> Array:
    """Cosine of the features of each reconstruction and its original (arXiv 2509.09666, eq. 1).

    With a contrast, so many times the mean cosine with the other originals is taken off: a drawing that is a little
    like every picture, which is the best answer to a caption that says little, then earns nothing by that. At a
    temperature the mean is a softer maximum, and the reward at contrast 1 the log-odds of the original among the
    batch's pictures, as in CLIP's loss (arXiv 2103.00020, section 2.3), in units of the temperature.

    Args:
      encoder: frozen image encoder.
      params: its parameters.
      original: `[B, H, W, 3]` in [-1, 1]; its features are computed once an image.
      reconstruction: `[B * G, H', W', 3]`; the G reconstructions of an original follow one another.
      group: G.
      clamp: see `clamp_image`.
      contrast: 0 leaves the other originals out.
      contrast_temperature: 0 takes the plain mean of the other originals; the lower above 0, the more the likest ones
        count.

    Returns:
      float32 `[B, G]` in [-1, 1] without contrast. Gradients flow to whatever is passed; callers stop them where they
      want none.

    Raises:
      ValueError: there are not G reconstructions for each original, or a contrast and one original alone.
    """
    _groups(original, reconstruction, group)
    if contrast and len(original) < 2:
        raise ValueError(
            "a reward with contrast compares with the batch's other pictures; it needs a batch of two or more"
        )
    target, features = _group_features(encoder, params, original, clamp_image(reconstruction, clamp), group)
    own = jnp.sum(features * target[:, None], axis=-1)
    if not contrast:
        return own
    if not contrast_temperature:
        others = (jnp.einsum("bgd,d->bg", features, target.sum(0), precision="highest") - own) / (len(original) - 1)
        return own - contrast * others
    cosines = jnp.einsum("bgd,cd->bgc", features, target, precision="highest")
    others = jax.nn.logsumexp(
        cosines / contrast_temperature, axis=-1, where=~jnp.eye(len(original), dtype=bool)[:, None]
    )
    return own - contrast * contrast_temperature * (others - math.log(len(original) - 1))


def pixel_reward(original: Array, reconstruction: Array, group: int, *, clamp: str = "hard") -> Array:
    """One minus the mean absolute difference over half the image range: 1 for equal images, 0 for black and white.

    Args:
      original: `[B, H, W, 3]` in [-1, 1].
      reconstruction: `[B * G, H, W, 3]`.
      group: G.
      clamp: see `clamp_image`.

    Returns:
      float32 `[B, G]` in [0, 1] (unless `clamp` is `none`).

    Raises:
      ValueError: not G reconstructions for each original, or images of different sizes.
    """
    _groups(original, reconstruction, group)
    if original.shape[1:] != reconstruction.shape[1:]:
        raise ValueError(
            f"the pixel reward compares images of one size, not {original.shape[1:3]} and {reconstruction.shape[1:3]}"
        )
    images = clamp_image(reconstruction, clamp).reshape(len(original), group, *original.shape[1:])
    gap = jnp.abs(images.astype(jnp.float32) - original[:, None].astype(jnp.float32))
    return 1.0 - gap.mean((-3, -2, -1)) / 2.0


@dataclasses.dataclass(frozen=True)
class RewardConfig(Settings):
    """A weighted sum of encoder similarities and, optionally, of pixel similarity and of caption similarity."""

    names: tuple[str, ...] = setting(("clip",), "image encoders whose cosine is rewarded", source="arXiv 2509.09666")
    weights: tuple[float, ...] = setting((1.0,), "one weight for each of them")
    pixel_weight: float = setting(0.0, "weight of pixel_reward; 0 leaves it out")
    caption_weight: float = setting(
        0.0, "weight of the similarity of caption and original, without any reconstruction; gen_for_und alone has it"
    )
    contrast: float = setting(
        0.0, "share of the similarity to the batch's other images that is taken off; the paper has none", low=0, high=1
    )
    contrast_temperature: float = setting(0.0, "0 takes the mean of the others; above, a soft maximum", low=0)
    overlong_penalty: float = setting(
        0.0,
        "taken off a caption without an end; gen_for_und alone has it",
        low=0,
        source="arXiv 2503.14476, section 3.4",
    )
    clamp: str = setting("hard", "how images are clipped to their range, see clamp_image", choices=CLAMPS)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, names and weights that do not go together, and a reward without a term."""
        yield from super().problems()
        if len(self.names) != len(self.weights) or len(set(self.names)) != len(self.names):
            yield f"names {self.names} need one weight each and no repetition; weights: {self.weights}"
        if not self.names and not self.pixel_weight and not self.caption_weight:
            yield "names is empty: the reward has no term; name an encoder or give a pixel or a caption weight"

    def caption_terms(self, stage: str) -> Iterator[str]:
        """The mistakes of a stage that does not train captions: terms about them."""
        for name in ("caption_weight", "overlong_penalty"):
            value = getattr(self, name)
            if value:
                yield f"reward.{name} is {value}, but {stage} does not train captions; only gen_for_und can use it"


def chosen_encoders(config: RewardConfig, encoders: Mapping[str, Encoder]) -> tuple[Encoder, ...]:
    """The image encoders of a reward, in its order.

    Raises:
      ValueError: one of them is not loaded.
    """
    for name in config.names:
        if name not in encoders:
            loaded = ", ".join(sorted(encoders)) or "none"
            raise ValueError(f"reward encoder {name!r} is not loaded; loaded: {loaded}")
    return tuple(encoders[name] for name in config.names)


def mixed_reward(
    config: RewardConfig,
    encoders: Sequence[Encoder],
    params: Mapping[str, trees.Tree],
    original: Array,
    reconstruction: Array,
    group: int,
    said: Array | None = None,
    unfinished: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the configured similarities, less the penalty.

    Args:
      config: which terms, with which weights.
      encoders: at least those that the config names.
      params: encoder name to parameters.
      original: `[B, H, W, 3]` in [-1, 1].
      reconstruction: `[B * G, H, W, 3]`, grouped by original.
      group: G.
      said: caption similarities `[B, G]`; needed with a caption weight.
      unfinished: bool `[B, G]`, captions without an end; needed with a penalty.

    Returns:
      The reward, float32 `[B, G]`, and each term without its weight by name (`pixel` for the pixel term, `caption` for
      the captions').

    Raises:
      ValueError: an encoder of the config, or what it needs of the captions, is not given.
    """
    known = {encoder.name: encoder for encoder in encoders}
    missing = [name for name in config.names if name not in known or name not in params]
    if missing:
        raise ValueError(f"reward encoder {missing[0]!r} is not loaded; loaded: {', '.join(sorted(known)) or 'none'}")
    terms = {
        name: cosine_reward(
            known[name],
            params[name],
            original,
            reconstruction,
            group,
            clamp=config.clamp,
            contrast=config.contrast,
            contrast_temperature=config.contrast_temperature,
        )
        for name in config.names
    }
    pairs = list(zip(terms.values(), config.weights))
    if config.pixel_weight:
        terms["pixel"] = pixel_reward(original, reconstruction, group, clamp=config.clamp)
        pairs.append((terms["pixel"], config.pixel_weight))
    if config.caption_weight:
        if said is None:
            raise ValueError(
                "the reward has a caption weight, but there are no caption similarities; only gen_for_und has them"
            )
        terms["caption"] = said
        pairs.append((said, config.caption_weight))
    if config.overlong_penalty:
        if unfinished is None:
            raise ValueError(
                "the reward has an overlong penalty, but it is not said which captions have no end; only gen_for_und "
                "does"
            )
        pairs.append((unfinished.astype(jnp.float32), -config.overlong_penalty))
    return sum(weight * term for term, weight in pairs), terms


def reward_advantages(
    config: RewardConfig,
    encoders: Sequence[Encoder],
    params: Mapping[str, trees.Tree],
    original: Array,
    reconstruction: Array,
    group: int,
    scale: str,
    said: Array | None = None,
    unfinished: Array | None = None,
) -> tuple[Array, dict]:
    """Rewards of groups of reconstructions, and each one's advantage over its group.

    Args:
      config, encoders, params, original, reconstruction, group, said, unfinished: see `mixed_reward`.
      scale: see `advantages.group_advantages`.

    Returns:
      Advantages `[B, G]`, and metrics: `reward`, each term as `reward_<name>`, spread and degenerate groups.
    """
    reward, terms = mixed_reward(config, encoders, params, original, reconstruction, group, said, unfinished)
    advantage, metrics = group_advantages(reward, scale=scale)
    metrics["reward"] = metrics.pop("reward_mean")
    return advantage, metrics | {f"reward_{name}": jnp.mean(term) for name, term in terms.items()}
