"""Parts of Markdown pages that a benchmark writes, between two marks; what is written by hand around them stays."""


def marks(name: str) -> tuple[str, str]:
    """First and last line of the part that `benchmarks.NAME` writes."""
    return f"<!-- {name}: written by benchmarks.{name}; do not edit up to the next mark -->", f"<!-- end of {name} -->"


def replace_block(text: str, name: str, block: str) -> str:
    """A page with the block between the marks, or at its end when it has none.

    Args:
      text: the page.
      name: of the benchmark.
      block: its part.

    Raises:
      ValueError: the page has one mark without the other.
    """
    begin, end = marks(name)
    if (begin in text) != (end in text) or text.find(end) < text.find(begin):
        raise ValueError(
            f"the page has one of the marks {begin!r} and {end!r} without the other; restore or delete both"
        )
    block = f"{begin}\n{block.strip()}\n{end}"
    if begin in text:
        return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]
    return f"{text.rstrip()}\n\n{block}\n".lstrip()
