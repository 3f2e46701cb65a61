"""Awkward inputs for every reader: mutations of a corpus, and the targets that read them."""
