"""Sizes of diffusion models, as diffusers writes them in `config.json`: each field is read, or refused."""

import dataclasses
import pathlib
import typing
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import check_kinds, refuse_unknown, require
from uae_jax.files.paths import to_path
from uae_jax.models.language.config import check_choices


def read_fields(
    cls: Any,
    path: str | pathlib.Path,
    stored: Mapping[str, Any],
    *,
    absent: Mapping[str, Any] | None = None,
    unread: Collection[str] = (),
    usual: Mapping[str, Any] | None = None,
    zero: Collection[str] = (),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The values of a dataclass's fields in a file, lists as tuples.

    Args:
      cls: the dataclass.
      path: the folder, for messages.
      stored: the contents of its `config.json`.
      absent: values of fields that the file does not have, where they are not the dataclass's defaults.
      unread: further fields without an effect, or that the caller checks.
      usual: values at which other fields have no effect.
      zero: whole numbers that may be 0.
      without: fields that are not part of the file.

    Raises:
      ValueError: an unknown field, or a value of another kind; the message has the file, its name and its value.
    """
    absent, what = absent or {}, f"{to_path(path) / 'config.json'}: "
    values = {
        field.name: stored.get(field.name, absent.get(field.name, field.default))
        for field in dataclasses.fields(cls)
        if field.name not in without
    }
    refuse_unknown(stored, {*values, *unread}, usual, what=what)
    check_kinds(values, typing.get_type_hints(cls), what, zero=zero)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerFields:
    """What every diffusion transformer's configuration has beside its published fields.

    Attributes:
      lora_alpha: numerator of the adapters' scale; not part of the published file.
      dtype: precision of the products, `float32` or `bfloat16`; not part of the published file.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`; not part of the published file.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    # the class in diffusers; values of fields that its file does not have; fields without an effect; see `read_fields`
    published_class: ClassVar[str]
    absent: ClassVar[Mapping[str, Any]] = {}
    unread: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[tuple[str, ...]] = ()

    lora_alpha: float = 64.0
    dtype: str = "float32"
    remat: str = "none"

    @property
    def alive(self) -> float:
        """Numbers of a token that exist at once in a block without a gradient, in units of the model's width."""
        return 6.0

    def __post_init__(self):
        check_choices(self.dtype, self.remat)

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, **overrides: Any) -> Self:
        """Reads a diffusers `config.json`; `overrides` set fields such as `dtype`, `remat` and `lora_alpha`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = cls.completed(read_class_json(path, cls.published_class))
        options: dict[str, Any] = dict(absent=cls.absent, unread=cls.unread, zero=cls.zero, without=OURS)
        return cls(**{**read_fields(cls, path, stored, **options), **overrides})

    @classmethod
    def completed(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """The contents of a file with what follows from them."""
        return stored

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in OURS}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"_class_name": self.published_class, **lists}


OURS = tuple(field.name for field in dataclasses.fields(TransformerFields))


def check_axes(name: str, axes: tuple[int, ...], count: int, head: int, what: str) -> None:
    """Checks that the axes of rotary positions fill a head.

    Args:
      name: of the field.
      axes: numbers of a head that turn with each axis.
      count: of axes.
      head: width of a head.
      what: that width, for the message.

    Raises:
      ValueError: they do not.
    """
    fits = len(axes) == count and sum(axes) == head and not any(width % 2 for width in axes)
    require(fits, "transformer", name, axes, f"{count} even widths whose sum is {what}, {head}")
