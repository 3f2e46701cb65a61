"""The objective: similarity of reconstruction and original under frozen image encoders (arXiv 2509.09666, section 3).

Shape letters: b originals, g reconstructions of each, n = b * g; m images of either; d features. H and W are the size
of the originals, H2 and W2 that of the reconstructions.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from uae_jax.models.encoders import weights
from uae_jax.models.encoders.config import CLIPVisionConfig, Dinov2Config, Dinov3Config
from uae_jax.models.encoders.features import AnyConfig, image_features
from uae_jax.models.encoders.preprocess import Preprocess, apply
from uae_jax.rl.losses import Scalar
from uae_jax.settings import Settings, setting
from uae_jax.trees import Tree

CLAMPS = ("hard", "straight_through", "none")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen image encoder with its own image processing; parameters are separate.

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
    config: AnyConfig
    preprocess: Preprocess
    remat: bool = False
    dtype: str = "float32"

    def features(self, params: Tree, pixels: Float[Array, "m H W 3"]) -> Float32[Array, "m d"]:
        """Features of length 1 of images in [-1, 1], of any size."""
        return self.embed(params, self.prepare(pixels))

    def prepare(self, pixels: Float[Array, "m H W 3"]) -> Float[Array, "m H_in W_in 3"]:
        """Images in [-1, 1] as the encoder wants them."""
        with jax.named_scope("image_encoder"):
            return apply(self.preprocess, (pixels.astype(jnp.float32) + 1) / 2).astype(self.dtype)

    def embed(self, params: Tree, images: Float[Array, "m H_in W_in 3"]) -> Float32[Array, "m d"]:
        """Features of length 1 of prepared images."""
        with jax.named_scope("image_encoder"):
            features = image_features(self.config, params, images, remat=self.remat).astype(jnp.float32)
        return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-12)


def load_encoder(
    folder: str | pathlib.Path,
    name: str | None = None,
    *,
    variant: str = "published",
    placement: Callable[[Tree], Tree] | None = None,
) -> tuple[Encoder, dict]:
    """An encoder and its parameters from a CLIP, Long-CLIP, DINOv2 or DINOv3 folder.

    Args:
      folder: see `weights.open_encoder`.
      name: the encoder's name; None takes `clip`, `longclip`, `dinov2` or `dinov3`.
      variant: image processing: `published`, or `uae` (see `Preprocess.from_folder`).
      placement: how the parameters are sharded, see `hf.rules.load_params`.

    Returns:
      The encoder, and float32 parameters; of CLIP the image tower only.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its tensors do not fit.
    """
    source = weights.open_encoder(folder).image_tower()
    config = cast(CLIPVisionConfig | Dinov2Config | Dinov3Config, source.config)  # a text tower has been refused
    kind = "clip" if source.kind == "longclip" else source.kind
    encoder = Encoder(name or source.kind, kind, config, source.preprocess(variant))
    return encoder, source.load(placement=placement)


def clamp_image(pixels: Float[Array, "*s"], clamp: str = "hard") -> Float[Array, "*s"]:
    """Clips images to [-1, 1].

    Args:
      pixels: any shape.
      clamp: `hard` has no gradient outside of the range; `straight_through` passes the gradient as if nothing were
        clipped; `none` leaves the values.

    Raises:
      ValueError: another word.
    """
    if clamp not in CLAMPS:
        raise ValueError(f"clamp {clamp!r} is not known; use one of {', '.join(CLAMPS)}")
    if clamp == "none":
        return pixels
    clipped = jnp.clip(pixels, -1.0, 1.0)
    return clipped if clamp == "hard" else pixels + jax.lax.stop_gradient(clipped - pixels)


def _check_groups(original: Array, reconstruction: Array, group: int) -> None:
    if len(reconstruction) != len(original) * group:
        raise ValueError(
            f"{len(reconstruction)} reconstructions are not groups of {group} for {len(original)} originals"
        )


def _group_features(
    encoder: Encoder,
    params: Tree,
    original: Float[Array, "b H W 3"],
    reconstruction: Float[Array, "n H2 W2 3"],
    group: int,
) -> tuple[Float32[Array, "b d"], Float32[Array, "b g d"]]:
    """Features of the originals and of their reconstructions.

    A group goes through the encoder with its original, in one batch that is sharded as images are. A single
    reconstruction does not: where the loss is differentiated (cold start), the backward pass would contain the original
    and be twice as long.
    """
    if group == 1:
        return encoder.features(params, original), encoder.features(params, reconstruction)[:, None]
    prepared = encoder.prepare(original), encoder.prepare(reconstruction)
    rows = [images.reshape(len(original), -1, *images.shape[1:]) for images in prepared]
    features = encoder.embed(params, jnp.concatenate(rows, axis=1).reshape(-1, *prepared[0].shape[1:]))
    features = features.reshape(len(original), 1 + group, -1)
    return features[:, 0], features[:, 1:]


def cosine_reward(
    encoder: Encoder,
    params: Tree,
    original: Float[Array, "b H W 3"],
    reconstruction: Float[Array, "n H2 W2 3"],
    group: int,
    *,
    clamp: str = "hard",
    contrast: float = 0.0,
    contrast_temperature: float = 0.0,
) -> Float32[Array, "b g"]:
    """Cosine of the features of each reconstruction and its original (arXiv 2509.09666, eq. 1).

    A contrast subtracts a share of the mean cosine with the other originals; equal images count as one. A caption that
    says little is best rebuilt by an image that is a little like every other; such an image then earns nothing. With a
    temperature the mean is a soft maximum. At contrast 1 the reward is the log-odds of the original among the batch's
    images, in units of that temperature. CLIP's loss has the same log-odds (arXiv 2103.00020, section 2.3).

    Args:
      encoder: frozen image encoder.
      params: its parameters.
      original: in [-1, 1]; its features are computed once an image.
      reconstruction: the g reconstructions of an original follow one another.
      group: g.
      clamp: see `clamp_image`.
      contrast: the share; 0 leaves the other originals out.
      contrast_temperature: 0 takes the plain mean of the other originals; a low one above 0 counts the most similar.

    Returns:
      Cosines, in [-1, 1] without contrast. Gradients flow to both images; callers stop the ones that are not wanted.

    Raises:
      ValueError: there are not g reconstructions for each original, or a contrast in a batch of one.
    """
    _check_groups(original, reconstruction, group)
    if contrast and len(original) < 2:
        raise ValueError(
            "a reward with contrast compares with the batch's other images; it needs a batch of two or more"
        )
    target, features = _group_features(encoder, params, original, clamp_image(reconstruction, clamp), group)
    own = jnp.sum(features * target[:, None], axis=-1)
    if not contrast:
        return own
    # an image that a batch has twice is not another image
    other = ~jax.lax.map(lambda image: jnp.all(original == image, axis=(1, 2, 3)), original)
    count = jnp.sum(other, -1, dtype=jnp.float32)[:, None]
    cosines = jnp.einsum("bgd,cd->bgc", features, target, precision="highest")
    if not contrast_temperature:
        others = jnp.sum(jnp.where(other[:, None], cosines, 0.0), -1) / jnp.maximum(count, 1)
        return own - contrast * others
    # without another image nothing is taken off
    others = jax.nn.logsumexp(cosines / contrast_temperature, axis=-1, where=other[:, None])
    others = jnp.where(count > 0, others - jnp.log(jnp.maximum(count, 1)), 0.0)
    return own - contrast * contrast_temperature * others


def pixel_reward(
    original: Float[Array, "b H W 3"], reconstruction: Float[Array, "n H2 W2 3"], group: int, *, clamp: str = "hard"
) -> Float32[Array, "b g"]:
    """One minus the mean absolute difference over half the image range: 1 for equal images, 0 for black and white.

    Args:
      original: in [-1, 1].
      reconstruction: of the same size, grouped by original.
      group: g.
      clamp: see `clamp_image`.

    Returns:
      Similarities, in [0, 1] unless `clamp` is `none`.

    Raises:
      ValueError: not g reconstructions for each original, or images of different sizes.
    """
    _check_groups(original, reconstruction, group)
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
        "taken off a caption without an end; gen_for_und and unified_ar have it",
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
    params: Mapping[str, Tree],
    original: Float[Array, "b H W 3"],
    reconstruction: Float[Array, "n H2 W2 3"],
    group: int,
    said: Float[Array, "b g"] | None = None,
    unfinished: Bool[Array, "b g"] | None = None,
) -> tuple[Float32[Array, "b g"], dict[str, Float32[Array, "b g"]]]:
    """The weighted sum of the configured similarities, less the penalty.

    Args:
      config: which terms, with which weights.
      encoders: at least those that the config names.
      params: encoder name to parameters.
      original: in [-1, 1].
      reconstruction: grouped by original.
      group: g.
      said: caption similarities; needed with a caption weight.
      unfinished: captions without an end; needed with a penalty.

    Returns:
      The reward, and each term without its weight by name (`pixel` for the pixel term, `caption` for the captions').

    Raises:
      ValueError: an encoder of the config, or what it needs of the captions, is not given.
    """
    terms = {
        encoder.name: cosine_reward(
            encoder,
            params[encoder.name],
            original,
            reconstruction,
            group,
            clamp=config.clamp,
            contrast=config.contrast,
            contrast_temperature=config.contrast_temperature,
        )
        for encoder in chosen_encoders(config, {encoder.name: encoder for encoder in encoders})
    }
    weighted = [weight * term for term, weight in zip(terms.values(), config.weights)]
    if config.pixel_weight:
        terms["pixel"] = pixel_reward(original, reconstruction, group, clamp=config.clamp)
        weighted.append(config.pixel_weight * terms["pixel"])
    if config.caption_weight:
        if said is None:
            raise ValueError(
                "the reward has a caption weight, but there are no caption similarities; only gen_for_und has them"
            )
        terms["caption"] = said
        weighted.append(config.caption_weight * said)
    if config.overlong_penalty:
        if unfinished is None:
            raise ValueError(
                "the reward has an overlong penalty, but nothing says which captions have no end; only gen_for_und does"
            )
        weighted.append(-config.overlong_penalty * unfinished.astype(jnp.float32))
    return sum(weighted[1:], start=weighted[0]), terms


def term_metrics(terms: Mapping[str, Float[Array, "b g"]]) -> dict[str, Scalar]:
    """The mean of each term of `mixed_reward` as the metric `reward_<name>`."""
    return {f"reward_{name}": jnp.mean(term) for name, term in terms.items()}
