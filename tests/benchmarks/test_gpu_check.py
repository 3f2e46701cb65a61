"""The check of a card, dry: its parts run for real at a small size, and no part can spoil the others."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import jax_side
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import card, forms, random_model, report, steps
from benchmarks.gpu_check.part import check_card, plain
from benchmarks.gpu_check.schedule import PARTS, Part, select, time_limit
from benchmarks.mini_checkpoint import SMALL, write_configs
from benchmarks.step_settings import Settings
from benchmarks.torch_side import TorchSide
from uae_jax import trees
from uae_jax.models.sd3.transformer import position_table
from uae_jax.planning.system import abstract_system
from uae_jax.stages.program import make_program

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
IDENTITY = {"commit": "abc", "card": "none", "size": "small"}


def command(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def one_device(monkeypatch):
    """Processes that a test starts see one CPU device, as on a machine with one card."""
    flags = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))


@pytest.fixture
def known(monkeypatch):
    """The sources may change while a test runs."""
    monkeypatch.setattr(gpu_check, "identity", lambda size: dict(IDENTITY, size=size))


def check(tmp_path, parts, minutes=3.0, **more) -> dict:
    return gpu_check.check(parts, tmp_path / "out", tmp_path / "work", "small", minutes, **more)


def text(tmp_path, name=report.PAGE) -> str:
    return (tmp_path / "out" / name).read_text()


@pytest.mark.slow
def test_parts_run_for_real_and_survive_those_that_fail_or_hang(tmp_path, one_device, known, capfd):
    """One that raises, one that hangs with a child of its own, then the card's rates and a whole stage."""
    wrong = f"print('here', {str(ROOT)!r} + '/x.py'); raise ValueError('no such kernel')"
    figures, child = str(tmp_path / "work" / "figures" / "hangs.json"), tmp_path / "child"
    hangs = f"""
import pathlib, subprocess
pathlib.Path({figures!r}).write_text('{{"reached": 1}}')
child = subprocess.Popen(["sleep", "600"])
pathlib.Path({str(child)!r}).write_text(str(child.pid))
child.wait()"""
    broken = [Part("wrong", 30, 0, command(wrong)), Part("hangs", 0.7, 0, command(hangs))]
    found = check(tmp_path, [*broken, *select("device,steps:pretrain")], setup_seconds=12.0)
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        "wrong": "failed",
        "hangs": "timeout",
        "device": "ok",
        "steps:pretrain": "ok",
    }, found
    assert found["parts"]["wrong"]["error"][-1] == "ValueError: no such kernel"
    assert "here ./x.py" in found["parts"]["wrong"]["error"] and found["parts"]["hangs"]["figures"] == {"reached": 1}
    assert not pathlib.Path("/proc", child.read_text(), "exe").exists()
    device, step = (found["parts"][name]["figures"] for name in ("device", "steps:pretrain"))
    assert device["backend"] == "cpu" and device["matrix_rate"] > 1e8 and device["versions"]["jax"] == jax.__version__
    assert len(step["step_seconds"]) == 3 and step["finite"] and step["skipped"] == 0
    assert step["model_flops"] < step["flops"] and not step["from_disk"]
    assert step["compiler"]["arguments"] == pytest.approx(step["estimate"]["arguments"], rel=1e-3)
    utilisation = step["model_flops"] / step["seconds"] / device["matrix_rate"]
    assert found["derived"]["pretrain"]["of_matrix_rate"] == pytest.approx(utilisation)
    assert json.loads(text(tmp_path, report.JSON)) == found
    page = text(tmp_path)
    wanted = "A dry run", "| hangs | timeout |", "ValueError: no such kernel", "| pretrain | 2 |", "installation 12 s"
    assert not [words for words in wanted if words not in page]
    assert "## Goals" not in page and str(ROOT) not in page and "steps:pretrain: ok" in capfd.readouterr().out


def test_a_second_run_does_only_what_is_not_done(tmp_path, known):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    parts = [Part("good", 1, 0, command(count)), Part("bad", 1, 0, command("raise SystemExit('out of memory')"))]
    check(tmp_path, parts)
    parts[1] = Part("bad", 1, 0, command(count))
    found = check(tmp_path, parts)
    assert (tmp_path / "runs").read_text() == "xx" and len(found["runs"]) == 2
    assert [part["status"] for part in found["parts"].values()] == ["ok", "ok"]
    assert "out of memory" not in text(tmp_path)
    check(tmp_path, parts)
    assert (tmp_path / "runs").read_text() == "xx"


def test_figures_of_another_commit_are_kept_apart(tmp_path, known, monkeypatch):
    parts = [Part("good", 1, 0, command(""))]
    check(tmp_path, parts)
    monkeypatch.setattr(gpu_check, "identity", lambda size: IDENTITY | {"commit": "def"})
    assert len(check(tmp_path, parts)["runs"]) == 1
    assert json.loads(text(tmp_path, report.PREVIOUS))["identity"]["commit"] == "abc"


def test_time_flows_on_and_a_part_without_time_is_skipped(tmp_path, known):
    parts = [Part("a", 60, 20), Part("b", 30, 20), Part("c", 30, 20)]
    assert time_limit(parts[0], parts, 120) == 120 and time_limit(parts[1], parts[1:], 60) == 60
    assert time_limit(parts[0], parts, 480) == 480 and time_limit(parts[2], parts[2:], 500) == 500
    assert time_limit(PARTS[0], PARTS, 540) < 60
    found = check(tmp_path, [Part("late", 1, 120, command(""))], minutes=1)
    assert found["parts"] == {"late": {"status": "skipped-for-time"}}
    assert "| late | skipped-for-time |" in text(tmp_path)


def test_the_expected_time_is_that_of_the_whole_check():
    assert sum(part.seconds for part in PARTS) <= 540 and all(part.least < part.seconds for part in PARTS)


def test_parts_are_chosen_by_kind_or_by_name():
    assert [part.name for part in select("torch:und_for_gen,device")] == ["device", "torch:und_for_gen"]
    assert [part.name for part in select("steps")] == [f"steps:{stage}" for stage in steps.STAGES]
    assert select("") == list(PARTS)
    with pytest.raises(ValueError, match="--parts names 'step'"):
        select("step")


def test_the_exit_code_is_that_of_the_whole(tmp_path, known, monkeypatch, capsys):
    arguments = [f"--out={tmp_path / 'out'}", f"--work={tmp_path}", "--size=small", "--minutes=1"]
    for code, expected in (("", 0), ("raise SystemExit(3)", 1)):
        monkeypatch.setattr(gpu_check, "select", lambda names, code=code: [Part(f"part{code}", 1, 0, command(code))])
        (tmp_path / "out" / report.JSON).unlink(missing_ok=True)
        assert gpu_check.main(arguments) == expected
    assert str(tmp_path / "out" / report.PAGE) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_check.main([*arguments, "--minutes=0"])


def test_full_size_is_refused_without_a_card():
    for kind in ("steps", "torch"):
        with pytest.raises(RuntimeError, match="computes on cpu, not on a card"):
            check_card(kind)


def test_a_commit_is_told_from_changed_sources(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.py").write_text("a = 1")
    monkeypatch.setattr(card, "ROOT", tmp_path)
    first = card.commit()
    (tmp_path / "configs" / "a.py").write_text("a = 2")
    assert first.startswith("+") and card.commit() != first


def test_what_is_not_finite_is_a_text_in_json():
    found = plain({"a": np.float32(1.5), "b": (float("nan"), np.int64(2)), 3: True})
    assert found == {"a": 1.5, "b": ["nan", 2], "3": True}


def fake_parts() -> dict:
    """Figures as a card would leave them."""
    device = {"backend": "gpu", "matrix_rate": 8e14, "copy_bandwidth": 2.5e12, "dtype": "bfloat16", "versions": {}}
    step = {
        "preset": "medium",
        "images": 8,
        "model_flops": 4e15,
        "flops": 5e15,
        "peak_flops": 1e15,
        "seconds": 8.0,
        "step_seconds": [9.0, 8.0, 8.0],
        "images_per_second": 1.0,
        "compile_seconds": 40.0,
        "finite": True,
        "peak_before_steps": 2**34,
        "peak_bytes": 3 * 2**33,
        "compiler": {"arguments": 2**34, "peak": 2**34},
        "estimate": {"arguments": 2**34, "peak": 2**35},
    }
    ours = {
        "side": "jax",
        "total": 1.0,
        "compile_seconds": 30.0,
        "sampling": 0.5,
        "first_token": 0.1,
        "denoising": 0.2,
        "work": {"decoding_bytes": 8e11, "denoising_flops": 9.6e13},
    }
    theirs = {"side": "torch_compiled", "total": 1.5, "compile_seconds": 60.0}
    figures = {"device": device, "steps:gen_for_und": step, "phases:gen_for_und": ours, "torch:gen_for_und": theirs}
    return {name: {"status": "ok", "seconds": 1.0, "limit": 2.0, "figures": value} for name, value in figures.items()}


def page_of(parts: dict, **identity: str) -> str:
    return report.page({"identity": IDENTITY | identity, "runs": [], "derived": report.derive(parts), "parts": parts})


def test_shares_and_goals_follow_from_the_figures():
    parts = fake_parts()
    assert report.derive(parts)["gen_for_und"] == pytest.approx(
        {
            "of_peak": 0.5,
            "of_matrix_rate": 0.625,
            "of_compiler": 1.5,
            "of_estimate": 0.75,
            "denoising_share": 0.6,
            "decoding_share": 0.8,
            "times_as_fast": 1.5,
        }
    )
    page = page_of(parts, size="full", card="NVIDIA H100")
    assert "dry run" not in page and "| total | 1000.0 | 1500.0 |" in page and "has 80.0% of the copy bandwidth" in page
    assert "whole step, times as fast as compiled PyTorch | gen_for_und | 2.00 | 1.50 | no |" in page
    assert "denoising, share of the matrix rate | gen_for_und | 55.0% | 60.0% | yes |" in page
    assert "| gen_for_und | 8 | 40.0 | 9.00, 8.00, 8.00 | 1.00 | 4.00e+15 | 50.0% | 62.5% | yes |" in page
    assert "| gen_for_und | 16.00 | 16.00 | 32.00 | 16.00 | 24.00 | 150.0% | 75.0% |" in page


@pytest.mark.parametrize(
    "gone",
    [("matrix_rate",), ("seconds", "step_seconds", "peak_bytes"), ("denoising",), ("work",), ("total",), ("compiler",)],
)
def test_the_report_is_written_from_whatever_is_there(gone):
    parts = fake_parts()
    for part in parts.values():
        for name in gone:
            part["figures"].pop(name, None)
    parts["attention"] = {"status": "timeout", "error": ["slow"]}
    page = page_of(parts)
    assert "## attention: timeout" in page and "| attention | timeout | - | - |" in page


def test_a_partial_run_of_each_stage_makes_a_page():
    """With every subset of parts that comes in the order of the schedule."""
    whole = fake_parts()
    for count in range(len(whole) + 1):
        assert page_of(dict(list(whole.items())[:count]))


@pytest.mark.parametrize("stage", steps.STAGES)
def test_random_arguments_of_full_size_are_those_of_the_step(stage):
    config = steps.check_config("full")
    system = abstract_system(config)
    program = make_program(config, system, system.parts, system.batch, stage)
    for shapes in (program.frozen, program.state.params):
        for name, tree in shapes.items():
            make = functools.partial(random_model._random_tree, {name: tree}, system.model.transformer)
            made = jax.eval_shape(make, jax.random.key(0))[name]
            assert jax.tree.structure(made) == jax.tree.structure(tree)
            for ours, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(tree)):
                assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)


def test_random_weights_have_the_scale_of_the_initialisers():
    system = abstract_system(steps.check_config("small"))
    names = ["transformer", "language", "language_lora"]
    parts = random_model.random_parts({name: system.parts[name] for name in names}, system.model.transformer)
    assert list(parts) == names
    leaves = trees.flatten(parts)
    np.testing.assert_array_equal(leaves["transformer/pos_embed/table"], position_table(system.model.transformer))
    assert all((leaf == 1).all() for name, leaf in leaves.items() if name.endswith("scale"))
    assert not any(leaf.any() for name, leaf in leaves.items() if name.endswith(("bias", "/b")))
    kernel = leaves["language/layers/mlp/down/kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(kernel.shape[-2] ** -0.5, rel=0.03)
    assert abs(float(jnp.mean(kernel))) < 0.01
    # no two leaves share their numbers
    first = [float(leaf.reshape(-1)[0]) for name, leaf in leaves.items() if name.endswith("kernel")]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("size", ("full", "small"))
def test_a_random_batch_is_one_that_the_loader_could_make(size):
    system = abstract_system(steps.check_config(size))
    batch = random_model.random_batch(system, 10)
    ids, captioner = batch["prompt_ids"], system.model.captioner
    image_tokens = np.sum(ids == captioner.image_token_id, axis=1)
    assert (image_tokens * system.processor.merge_size**2 == system.spec.max_patches).all()
    assert batch["prompt_mask"].all() and batch["caption_mask"].all()
    assert (batch["caption_ids"][:, -1] == system.stops[0]).all()
    assert ids.min() >= 0 and max(ids.max(), batch["caption_ids"].max()) < captioner.text.vocab_size
    assert len(set(batch["sample_id"].tolist())) == 10 and batch["pixels"].dtype == np.uint8


def test_forms_are_compared_with_the_plain_one():
    usual = {name: np.array([[1.0, -2.0]], np.float32) for name in ("hidden", "velocity", "gradient")}
    usual["tokens"] = np.array([[1, 2, 3, 4]])
    other = usual | {"tokens": np.array([[1, 2, 9, 9]]), "hidden": np.array([[1.0, -1.0]], np.float32)}
    found = forms.compared(other, usual)
    assert found["equal_tokens"] == 0.5 and found["equal_first"] == 1
    assert found["hidden"] == 0.5 and found["velocity"] == 0
    assert found["hidden_rms"] == pytest.approx((0.5 / 2.5) ** 0.5)


@pytest.mark.slow
def test_both_sides_open_a_folder_without_weights(tmp_path):
    write_configs(tmp_path, SMALL)
    system = jax_side.open_system(tmp_path, 64, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(system.parts["language"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(system.parts["vae"])} == {"float32"}
    settings = Settings(images=2, group=2, tokens=5, steps=2, window=1, image_size=64, lora_rank=4)
    model = TorchSide(tmp_path, jax_side.make_inputs(tmp_path, settings), "inference", compiled=False).model

    def count(*modules) -> int:
        return sum(tensor.numel() for module in modules for tensor in module.parameters())

    assert trees.parameter_count(system.parts["language"]) == count(model.llm.model.language_model)
    assert trees.parameter_count(system.parts["vision"]) == count(model.llm.model.visual)
    assert trees.parameter_count(system.parts["projector"]) == count(model.projector)
    assert trees.parameter_count(system.parts["vae"]) == count(model.vae)
    # the position table is a buffer there
    table = model.dit.pos_embed.pos_embed
    assert trees.parameter_count(system.parts["transformer"]) == count(model.dit) + table.numel()
    assert np.isfinite(model.decode(model.noise[:1]).numpy()).all()


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=os.environ | environment)


def test_the_script_is_clean_and_says_what_it_does(tmp_path):
    linter = pathlib.Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([linter, "-x", SCRIPT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    said, names = run_script("--help").stdout, ("out", "minutes", "size", "parts", "work", "python", "dry-run")
    assert said.startswith("Usage:") and all(f"--{name}" in said for name in names)
    given = "--dry-run", f"--python={sys.executable}", "--minutes", "5", "--parts=steps"
    dry = run_script(*given, OUT=str(tmp_path / "a b")).stdout
    assert dry.startswith(f"{sys.executable} -m benchmarks.gpu_check --out {tmp_path}/a\\ b ")
    assert "--minutes 5 --parts steps" in dry
    for arguments, message in ((("--fast",), "unknown option --fast"), (("here",), "unexpected argument here")):
        done = run_script(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_without_packages_the_script_installs_them(tmp_path):
    bare = tmp_path / "python3"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    dry = run_script("--dry-run", PATH=f"{tmp_path}:{os.environ['PATH']}")
    lines = dry.stdout.splitlines()
    if not (ROOT / ".venv").exists():
        assert lines[0].strip() == "python3 -m venv .venv" and "pip install -q .\\[cuda\\] torch" in lines[1]
    assert lines[-1].startswith(".venv/bin/python -m benchmarks.gpu_check")


@pytest.mark.slow
def test_the_whole_check_runs_dry(tmp_path, one_device):
    folders = f"--out={tmp_path}", f"--work={tmp_path / 'work'}"
    done = run_script("--size=small", "--minutes=15", *folders, f"--python={sys.executable}")
    whole = json.loads((tmp_path / report.JSON).read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["status"] for name, part in whole["parts"].items()} == {part.name: "ok" for part in PARTS}
    attention = whole["parts"]["attention"]["figures"]
    assert attention["forms"] == ["plain", "by_query_blocks", "by_head", forms.EXACT]
    assert all(0 < row["hidden"] < 0.1 and 0 < row["gradient"] < 0.1 for row in attention["against_plain"].values())
    for stage in steps.STAGES[:2]:
        row = whole["derived"][stage]
        assert {"denoising_share", "decoding_share", "times_as_fast_eager", "of_matrix_rate"} <= set(row)
    page = (tmp_path / report.PAGE).read_text()
    for title in ("Parts", "Device", "Steps of `tiny`", "Memory, GiB", "Attention", "Phases of gen_for_und"):
        assert f"## {title}" in page
