"""One result that cannot be written or printed does not end the others."""

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from uae_jax import infer
from uae_jax.api import Model
from uae_jax.command_line import printable_output
from uae_jax.evaluation.drawing import sample_number, write_pictures
from uae_jax.evaluation.records import RecordLog
from uae_jax.files.json_files import read_records

FAST = ("--steps=1", "--max_new_tokens=8", "--temperature=0")


def ascii_terminal(monkeypatch):
    """Standard output of a terminal that knows ASCII alone, strictly."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def printed(stream):
    stream.flush()
    return stream.buffer.getvalue().decode("ascii")


def photo(path):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, "PNG")
    return path


def names(folder):
    """A Latin-1 name, one in other letters, and a plain one."""
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")
    return [str(photo(path)) for path in (odd, folder / "\u732b.png", folder / "plain.png")]


@pytest.mark.parametrize("command", ["caption", "reconstruct"])
def test_names_that_the_terminal_cannot_print_are_escaped(tmp_path, monkeypatch, command):
    terminal = ascii_terminal(monkeypatch)
    infer.main([command, *names(tmp_path), f"--out={tmp_path / 'out'}", *FAST])
    text = printed(terminal)
    assert "caf\\udce9.png: " in text and "\\u732b.png: " in text and "plain.png: " in text
    assert terminal.errors == "strict"
    assert command == "caption" or len(list((tmp_path / "out").iterdir())) == 6


def test_captions_that_the_terminal_cannot_print_are_escaped(tmp_path, monkeypatch):
    terminal = ascii_terminal(monkeypatch)
    monkeypatch.setattr(
        Model, "each_caption", lambda self, inputs, **_: ((i, f"\u732b {i} \ud83d") for i in range(len(inputs)))
    )
    infer.main(["caption", *names(tmp_path), *FAST])
    assert printed(terminal).count("\\u732b") == 4 and "\\u732b 2 \\ud83d" in printed(terminal)


def test_a_picture_that_cannot_be_written_is_named_and_the_others_are_done(tmp_path, capsys):
    (tmp_path / "0001.png").mkdir()
    (tmp_path / "0001.png" / "x").touch()
    texts = ["gray background", "red circle", "blue square", "half \ud83d of one"]
    with pytest.raises(SystemExit) as stop:
        infer.main(["generate", *texts, f"--out={tmp_path}", "--json", *FAST])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["text"] for record in records if "error" in record} == {"red circle", "half \ud83d of one"}
    assert all((tmp_path / f"{number:04d}.png").is_file() for number in (0, 2))
    assert str(stop.value).startswith("error: 2 of 4 inputs could not be done: ") and "red circle: " in str(stop.value)


def test_a_reconstruction_that_cannot_be_written_is_named(tmp_path, capsys):
    images = [str(photo(tmp_path / f"{letter}.png")) for letter in "ab"]
    (tmp_path / "out" / "a_strip.png" / "x").mkdir(parents=True)
    with pytest.raises(SystemExit, match="^error: 1 of 2 inputs could not be done: .*a.png"):
        infer.main(["reconstruct", *images, f"--out={tmp_path / 'out'}", *FAST])
    assert (tmp_path / "out" / "b_strip.png").is_file() and "b.png: " in capsys.readouterr().out


def test_logs_keep_names_of_any_bytes(tmp_path):
    record = {"image_id": "caf\udce9", "caption": "caf\u00e9 \ud83d"}
    with RecordLog(tmp_path / "log.jsonl") as log:
        log.append(record)
        log.append({"image_id": "\u732b"})
    assert read_records(tmp_path / "log.jsonl") == [record, {"image_id": "\u732b"}]
    assert "\u732b".encode() in (tmp_path / "log.jsonl").read_bytes()
    assert 0 <= sample_number("caf\udce9") < 2**31 and sample_number("a") == sample_number("a")


def test_a_benchmarks_other_pictures_are_written(tmp_path):
    class Painter:
        def generate(self, texts, sample_ids):
            return [Image.new("RGB", (8, 8)) for _ in texts]

    from uae_jax.evaluation.drawing import Target

    (tmp_path / "1.png" / "x").mkdir(parents=True)
    targets = [Target(tmp_path / f"{number}.png", "red", (number,)) for number in range(3)]
    with pytest.raises(ValueError, match="1 of 3 images could not be written: .*1.png"):
        write_pictures(Painter(), targets, size=8, batch_size=1, label="x")
    assert (tmp_path / "0.png").is_file() and (tmp_path / "2.png").is_file()


def test_the_streams_are_as_before_afterwards(monkeypatch):
    terminal = ascii_terminal(monkeypatch)
    with printable_output():
        assert terminal.errors == "backslashreplace"
    assert terminal.errors == "strict"
