"""What a person types: errors are one line and a code other than 0; images go in and come out."""

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys

import pytest
from PIL import Image

from uae_jax import api, convert, demo, evaluate, fetch_emoji, infer, main, precompute
from uae_jax.command_line import CommandParser, run_command
from uae_jax.data import scenes


def command(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--config=configs/unified_grpo.py", "--workdir=/no/such/parent/run"), "does not exist; make it first"),
        (("--config=configs/unified_grpo.py:huge", "--workdir=/tmp/never"), "unknown preset 'huge'"),
        (
            ("--config=configs/unified_grpo.py", "--workdir=/tmp/never", "--config.gen_for_und.group_sise=4"),
            "group_sise",
        ),
    ],
)
def test_main_ends_with_one_line(arguments, message):
    done = command("uae_jax.main", *arguments)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr


def parsers(parser):
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from parsers(part)


def every_parser():
    """The parsers of all commands and subcommands."""
    for module in (infer, convert, demo, fetch_emoji, precompute):
        parser = CommandParser(prog=f"python -m {module.__name__}", description=module.__doc__)
        module.add_arguments(parser)
        yield from parsers(parser)
    for name in evaluate.COMMANDS:  # which imports one of its commands at a time
        parser = CommandParser(prog="python -m uae_jax.evaluate", description=evaluate.__doc__)
        evaluate.add_arguments(parser, name)
        yield from (part for part in parsers(parser) if part.prog.split()[3:4] == [name])
    yield parser


@pytest.mark.parametrize("parser", list(every_parser()), ids=lambda parser: parser.prog)
def test_help_has_examples_and_defaults_and_names_have_underscores(parser):
    shown = parser.format_help()
    _, described = shown.split("\n\n", 1)
    assert described[0].isupper()
    assert re.search(rf"^ +{re.escape(parser.prog)} \S", described, re.MULTILINE)
    words = " ".join(shown.split())
    for action in parser._actions:
        assert not any("-" in name.lstrip("-") for name in action.option_strings)
        if isinstance(action.default, (int, float, pathlib.Path)) and not isinstance(action.default, bool):
            assert f"(default: {action.default})" in words
        assert "(default: [])" not in words
        assert action.help or isinstance(action, argparse._SubParsersAction)
    assert not parser.allow_abbrev
    assert parser.get_default("run") or any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)


def test_flags_take_dashes_or_underscores_but_no_abbreviations(capsys):
    seen = []

    def add_arguments(parser):
        parser.add_argument("texts", nargs="*")
        parser.add_argument("--top_p", type=float)
        parser.set_defaults(run=seen.append)

    def run(*words):
        run_command("uae_jax.infer", "A command.", add_arguments, words)
        return vars(seen.pop())

    assert run("--top-p=0.5")["top_p"] == run("--top_p", "0.5")["top_p"] == 0.5
    assert run("--top-p=1", "-- a-b", "--", "--c-d=e-f")["texts"] == ["-- a-b", "--c-d=e-f"]
    with pytest.raises(SystemExit) as end:
        run("--top=0.5")
    assert end.value.code == 2 and "unrecognized arguments: --top=0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "run, words, message",
    [
        (
            main.main,
            "--config=x --wrkdir=runs/x",
            "unrecognized arguments: --wrkdir=runs/x; did you mean --workdir=runs/x?",
        ),
        (
            main.main,
            "--config=x --confg.seed=3",
            "unrecognized arguments: --confg.seed=3; did you mean --config.seed=3?",
        ),
        (main.main, "", "the following arguments are required: --config; see python -m uae_jax.main --help"),
        (infer.main, "generate text --stepps 4", "unrecognized arguments: --stepps 4; did you mean --steps?"),
        (convert.main, "export a b --layot hub", "unrecognized arguments: --layot hub; did you mean --layout?"),
        (
            evaluate.main,
            "geneval write --prompts=scenes --out=OUT --nothing",
            "unrecognized arguments: --nothing; see python -m uae_jax.evaluate --help",
        ),
    ],
)
def test_a_mistyped_command_is_one_line_with_the_nearest_flag(run, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(words.split())
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


def test_what_a_command_returns_is_its_exit_code_and_expected_errors_are_one_line():
    def add_arguments(parser, run):
        parser.set_defaults(run=run)

    def refused(options):
        raise ValueError("two\nlines")

    run_command("uae_jax.infer", "A command.", functools.partial(add_arguments, run=lambda options: 0), [])
    with pytest.raises(SystemExit, match="^3$"):
        run_command("uae_jax.infer", "A command.", functools.partial(add_arguments, run=lambda options: 3), [])
    with pytest.raises(SystemExit, match="^error: two lines$"):
        run_command("uae_jax.infer", "A command.", functools.partial(add_arguments, run=refused), [])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, suffix in enumerate(("png", "jpg", "png")):
        Image.fromarray(scenes.draw(scenes.scene_at("test", index), 32 + 8 * index)).save(
            folder / f"scene_{index}.{suffix}"
        )
    return folder


FAST = [
    "--size",
    "16",
    "--steps",
    "2",
    "--max_new_tokens",
    "8",
    "--prompt",
    "describe",
    "--guidance_scale",
    "1",
    "--batch_size",
    "2",
]


def test_reconstruct_writes_a_strip_for_every_picture_of_a_folder(model_folder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    infer.main(["reconstruct", str(pictures), "--checkpoint", str(model_folder), "--out", str(out), "--json", *FAST])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 3
    for index, record in enumerate(records):
        strip = Image.open(out / f"scene_{index}_strip.png")
        assert strip.info["caption"] == record["caption"] and strip.width > 2 * strip.height
        assert Image.open(record["reconstruction"]).size == (16, 16)


def test_generate_draws_each_text_with_its_own_noise(model_folder, tmp_path, capsys):
    infer.main(
        ["generate", "red circle", "red circle", "--checkpoint", str(model_folder), "--out", str(tmp_path), *FAST]
    )
    first, second = (Image.open(tmp_path / f"{number:04d}.png") for number in (0, 1))
    assert first.info["caption"] == "red circle" and first.tobytes() != second.tobytes()
    infer.main(["generate", "red circle", "--checkpoint", str(model_folder), "--out", str(tmp_path / "again"), *FAST])
    assert Image.open(tmp_path / "again" / "0000.png").tobytes() == first.tobytes()
    assert "note:" not in capsys.readouterr().err
    infer.main(["generate", "red zebra", "--checkpoint", str(model_folder), "--out", str(tmp_path / "other"), *FAST])
    assert "note: the model does not know 1 word: 'zebra'" in capsys.readouterr().err


def test_a_bad_picture_among_many_leaves_the_others_done_and_a_code(model_folder, pictures, tmp_path, capsys):
    (pictures / "scene_0b.png").write_bytes(b"not an image")
    (pictures / "scene_1b.png").write_bytes((pictures / "scene_0.png").read_bytes()[:80])
    out = tmp_path / "out"
    with pytest.raises(
        SystemExit, match="error: 2 of 5 inputs could not be done: .*scene_0b.png is not a readable image"
    ):
        infer.main(
            ["reconstruct", str(pictures), "--checkpoint", str(model_folder), "--out", str(out), "--json", *FAST]
        )
    records = {
        pathlib.Path(record["image"]).name: record for record in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert {name for name, record in records.items() if "error" in record} == {"scene_0b.png", "scene_1b.png"}
    for name in ("scene_0.png", "scene_1.jpg", "scene_2.png"):
        assert Image.open(records[name]["reconstruction"]).info["caption"] == records[name]["caption"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"scene_{n}{end}.png" for n in range(3) for end in ("", "_strip")
    )


def test_an_absent_file_among_others_is_named_and_they_are_done(model_folder, pictures, capsys):
    there, absent = pictures / "scene_0.png", pictures / "gone.png"
    with pytest.raises(SystemExit, match="error: 1 of 2 inputs could not be done: image .*gone.png does not exist"):
        infer.main(["caption", str(absent), str(there), "--checkpoint", str(model_folder), "--json", *FAST])
    records = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {record["image"]: "caption" in record for record in records} == {str(there): True, str(absent): False}


def test_a_long_text_among_others_is_reported(model_folder, tmp_path, capsys):
    with pytest.raises(
        SystemExit, match="error: 1 of 3 inputs could not be done: the text 'red red .* longer than 8 tokens"
    ):
        infer.main(
            [
                "generate",
                "red circle",
                "red " * 9,
                "blue circle",
                "--checkpoint",
                str(model_folder),
                "--out",
                str(tmp_path),
                *FAST,
            ]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "0002.png"]
    assert "red : not done: the text" in capsys.readouterr().out


def test_drawings_are_written_while_others_are_still_to_come(model_folder, pictures, tmp_path, monkeypatch):
    """A run that ends after its first batch leaves what it drew."""
    out = tmp_path / "out"
    load_image = api.load_image

    def killed_at_the_last(path):
        if path.name == "scene_2.png":
            raise KeyboardInterrupt
        return load_image(path)

    monkeypatch.setattr(api, "load_image", killed_at_the_last)
    with pytest.raises(SystemExit, match="error: interrupted; what was written stays"):
        infer.main(["reconstruct", str(pictures), "--checkpoint", str(model_folder), "--out", str(out), *FAST])
    assert sorted(path.name for path in out.iterdir()) == [
        "scene_0.png",
        "scene_0_strip.png",
        "scene_1.png",
        "scene_1_strip.png",
    ]


def test_files_of_one_name_do_not_meet(tmp_path):
    paths = [tmp_path / folder / "a.png" for folder in "xy"] + [tmp_path / "a_strip.png", tmp_path / "a_2.png"]
    assert infer._names(paths) == ["a", "a_2", "a_strip_2", "a_2_2"]


@pytest.mark.parametrize("content, message", [(b"not an image", "not a readable image"), (None, "does not exist")])
def test_bad_pictures_are_named(model_folder, tmp_path, content, message):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*broken.png.*{message}"):
        infer.main(["caption", str(path), "--checkpoint", str(model_folder), *FAST])


def test_the_folder_of_a_single_model_is_no_checkpoint(pictures, model_folder):
    with pytest.raises(SystemExit, match="error: .*dit holds no `llm` folder"):
        infer.main(["caption", str(pictures), "--checkpoint", str(model_folder / "dit")])


def test_a_missing_checkpoint_is_named(pictures):
    with pytest.raises(SystemExit, match="error: model folder /no/checkpoint does not exist"):
        infer.main(["caption", str(pictures), "--checkpoint", "/no/checkpoint"])


def test_ctrl_c_before_the_steps_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    # during imports, and in the checks
    for place in ("uae_jax.main.quiet", "uae_jax.stages.checks.checked_config"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            with pytest.raises(SystemExit) as stop:
                main.main(["--config=unified_grpo", f"--workdir={tmp_path / 'run'}"])
        assert stop.value.code == 130
        err = capsys.readouterr().err
        assert err.startswith("stopped by Ctrl-C; what is saved stays.") and err.count("\n") == 1
