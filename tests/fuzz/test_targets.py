"""Every reader on some changed inputs; `python -m benchmarks.fuzz` runs the same targets for long."""

import pytest
from hypothesis import strategies as st

from benchmarks.fuzz import corpus
from benchmarks.fuzz.__main__ import fuzz, main
from benchmarks.fuzz.targets import Target, finding, make_targets
from uae_jax.settings import Mistakes

TARGETS = make_targets()
# each of them has to take a few seconds at most
INPUTS = {"texts": 60, "COCO captions": 60, "captions.jsonl": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs_end_with_a_result_or_one_line(name, tmp_path):
    count, found = fuzz(TARGETS[name], INPUTS.get(name, 120), 1, tmp_path)
    assert count >= 50 and found == {}


WHOLE = {
    "images": corpus.images(),
    "safetensors": corpus.tensors(),
    "adapter configs": [corpus.json.dumps(corpus.adapters()[0]).encode()],
    "model configs": [
        (part, corpus.json.dumps(content).encode()) for part, found in corpus.configs().items() for content in found
    ],
    "captions.jsonl": [b"\n".join(corpus.json.dumps(line).encode() for line in corpus.CAPTIONS[:2])],
    "captions beside images": [b"a cat"],
    "COCO captions": [corpus.json.dumps(corpus.COCO).encode()],
    "parquet": [corpus.parquet_file()],
    "webdataset": [corpus.tar_file()],
    "tf.train.Example": [corpus.example_message()],
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_files_of_the_corpus_are_read(name, tmp_path):
    """Else the targets would try the first check of a reader alone."""
    for number, value in enumerate(WHOLE[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        TARGETS[name].run(value, folder)


def raising(error):
    def run(value, folder):
        raise error

    return Target("x", st.integers(0, 10**6), run)


@pytest.mark.parametrize(
    "error", [KeyError("a"), ValueError("a\nb"), ValueError(""), TypeError("a"), Mistakes(["a\nb"])]
)
def test_what_is_more_than_one_line_counts_as_found(tmp_path, error):
    assert finding(raising(error), 0, tmp_path)
    count, found = fuzz(raising(error), 40, 0, tmp_path)
    assert count == 40 and len(found) == 1


@pytest.mark.parametrize("error", [ValueError("a"), FileNotFoundError("a"), OSError(2, "a"), Mistakes(["a", "b"])])
def test_errors_of_one_line_do_not(tmp_path, error):
    assert finding(raising(error), 0, tmp_path) == ""


def test_the_command_prints_a_table_and_counts_its_inputs(capsys):
    assert main(["--inputs=80", "--targets", "judge texts", "tf.train.Example"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["target", "judge texts", "tf.train.Example", "all"]
    assert lines[-1].split()[1:] == ["80", "0"]
