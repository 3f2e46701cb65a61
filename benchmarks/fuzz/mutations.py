"""Hypothesis strategies that change a few bytes of a file, or a few values of a JSON document."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# numbers and texts that reports of users had
ODD_NUMBERS = (0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"))
ODD_TEXTS = (
    "",
    " ",
    "nan",
    "\ufeff",
    "\ud83d",
    "<|im_end|>",
    "../x",
    "a/b",
    "x" * 300,
    "\n",
    "a\nb",
    "\x00",
    "{}",
    "[",
)
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS), st.text(max_size=6)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def changed_bytes(draw: Any, corpus: Sequence[bytes], first: int = 0) -> bytes:
    """A file of the corpus with up to four bytes changed, a part left out or doubled, or the end cut off.

    Args:
      draw: of hypothesis.
      corpus: whole files.
      first: bytes of the beginning in which every second change is, such as a header; 0 for none.
    """
    data = bytearray(draw(st.sampled_from(list(corpus))))
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        reach = min(first, len(data)) if first and draw(st.booleans()) else len(data)
        at, kind = draw(st.integers(0, reach - 1)), draw(st.sampled_from("change change cut drop double".split()))
        if kind == "change":
            data[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from((0, 1, 0x7F, 0x80, 0xFF))))
        elif kind == "cut":
            del data[at:]
        else:
            end = min(len(data), at + draw(st.integers(1, 64)))
            data[at:end] = b"" if kind == "drop" else bytes(data[at:end]) * 2
    return bytes(data)


@st.composite
def changed_json(draw: Any, corpus: Sequence[Any]) -> Any:
    """A document of the corpus with one to three values replaced, removed, added or renamed."""
    document = copy.deepcopy(draw(st.sampled_from(list(corpus))))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from("replace replace replace remove add rename".split()))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(values)
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(key)
        else:
            del holder[key]
    return document


def _places(document: Any) -> Any:
    """(dictionary or list, key or index) of every value, those of inner ones too."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    if not isinstance(document, dict | list):
        return
    for key, value in list(entries):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def json_bytes(corpus: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Documents as files: most with changed values, some with changed bytes, some with a byte-order mark."""
    whole = [json.dumps(document).encode() for document in corpus]
    written = changed_json(corpus).map(lambda document: json.dumps(document).encode())
    marked = written.map(lambda data: b"\xef\xbb\xbf" + data)
    return st.one_of(written, written, marked, changed_bytes(whole))
