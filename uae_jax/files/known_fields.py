"""Settings files of other libraries, read by what is known: a field that may change the result is read or refused."""

import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# fields of any transformers config without an effect on the numbers of a forward pass
WITHOUT_EFFECT = frozenset(
    """
    model_type architectures auto_map transformers_version torch_dtype dtype initializer_range initializer_factor
    attention_dropout dropout hidden_dropout_prob attention_probs_dropout_prob drop_path_rate gradient_checkpointing
    use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id problem_type finetuning_task tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    begin_suppress_tokens suppress_tokens bad_words_ids prefix task_specific_params do_sample early_stopping max_length
    min_length num_beams num_beam_groups num_return_sequences diversity_penalty length_penalty repetition_penalty
    encoder_no_repeat_ngram_size no_repeat_ngram_size exponential_decay_length_penalty remove_invalid_values
    temperature top_k top_p typical_p tf_legacy_loss use_bfloat16 tie_encoder_decoder cross_attention_hidden_size
    """.split()
)


def unknown_fields(
    stored: Mapping[str, Any], read: Collection[str], usual: Mapping[str, Any] | None = None
) -> Iterable[tuple[str, Any]]:
    """The fields that are not understood and may change the result, with their values.

    A field is passed over when it is in `read`, or None, or has its value of `usual`. A field without a usual value is
    passed over when it is False or without entries. Names that begin with an underscore are notes of the libraries,
    such as `_diffusers_version`.

    Args:
      stored: the contents of the file.
      read: fields that the caller reads, or that have no effect.
      usual: values at which other fields have no effect.
    """
    usual = usual or {}
    for name, value in stored.items():
        if name in read or str(name).startswith("_") or value is None:
            continue
        empty = value is False or isinstance(value, str | list | tuple | dict) and not value
        if not (value == usual[name] if name in usual else empty):
            yield name, value


def refuse_unknown(
    stored: Mapping[str, Any], read: Collection[str], usual: Mapping[str, Any] | None = None, what: str = ""
) -> None:
    """Refuses the first of `unknown_fields`.

    Args:
      stored, read, usual: see `unknown_fields`.
      what: begins the message, such as `VAE config: `.

    Raises:
      ValueError: such a field; the message has its name and value.
    """
    for name, value in unknown_fields(stored, read, usual):
        remedy = f"its usual value is {usual[name]!r}" if usual and name in usual else "nothing here reads that setting"
        raise ValueError(f"{what}{shown(name, value)} is not supported: {remedy}; give a model without it")


def shown(name: str, value: Any) -> str:
    """`name=value` in one line and at most 100 letters or so."""
    plain = name if str(name).isprintable() else ascii(name)
    text = repr(value)
    return f"{plain[:40]}={text if len(text) <= 60 else f'{text[:57]}...'}"


def without_none(section: Any, what: str) -> dict[str, Any]:
    """A section of settings without the fields that are None, which stand for their defaults.

    Raises:
      ValueError: it is no section.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"{what} is {str(section)[:40]!r}, not a section; copy the file again")
    return {name: value for name, value in section.items() if value is not None}


def needed(section: Mapping[str, Any], field: str) -> Any:
    """A field without a default.

    Raises:
      ValueError: it is absent.
    """
    if section.get(field) is None:
        raise ValueError(f"{field} is missing")
    return section[field]


def only(section: Mapping[str, Any], field: str, supported: tuple) -> None:
    """Checks a field that has one supported value, written in one of several ways; absent means the first.

    Raises:
      ValueError: another value.
    """
    if section.get(field, supported[0]) not in supported:
        raise ValueError(f"{field} is {section[field]!r}; only {supported[0]!r} is supported")


def require(condition: bool, model: str, field: str, value: Any, supported: str) -> None:
    """Checks a setting of a model.

    Raises:
      ValueError: the condition is false; the message has the field, its value and what is supported.
    """
    if not condition:
        raise ValueError(f"{model} config: {field}={value!r} is not supported; it must be {supported}")


def check_kinds(
    stored: Mapping[str, Any], kinds: Mapping[str, Any], what: str = "", zero: Collection[str] = ()
) -> None:
    """Checks the kinds and ranges of settings, so that no later step meets a text where it computes.

    Args:
      stored: the settings; those that are not in `kinds`, or None where the kind allows it, are passed over.
      kinds: type by name, of a dataclass's annotations: `int` (from 1), `float` (finite), `bool`, `str`, `tuple[int,
        ...]` (each from 0), `tuple[float, ...]`, `tuple[str, ...]`, or a union of them.
      what: begins the message.
      zero: names of whole numbers that may be 0.

    Raises:
      ValueError: a value of another kind or out of range; the message has name and value.
    """
    for name, kind in kinds.items():
        if name in stored and not _is_of(kind, stored[name], 0 if name in zero else 1):
            words = str(getattr(kind, "__name__", kind) if not typing.get_args(kind) else kind)
            raise ValueError(
                f"{what}{shown(name, stored[name])} is not supported: it must be {_WORDS.get(kind, words)}"
            )


_WORDS = {int: "a whole number in its range", float: "a finite number", bool: "true or false", str: "a text"}


def _is_of(kind: Any, value: Any, low: int) -> bool:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        several = isinstance(value, list | tuple) and (inner[-1] is Ellipsis or len(inner) == len(value))
        return several and all(_is_of(inner[0], item, 0) for item in value)
    if inner:
        return any(_is_of(part, value, low) for part in inner)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 1e30  # NaN is not either
    return value is None if kind is type(None) else isinstance(value, kind)
