"""Inputs of frozen parts computed once: the same steps as without, whole shards after a kill, refusals of one line."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import photographs
import pytest
from stage_pieces import changed, exit_of, largest_gap, linear, make_run, start_of, step_of

from configs import presets
from uae_jax import precompute as command
from uae_jax import sharding
from uae_jax.data import precomputed as pre
from uae_jax.data.scene_captions import WORDS
from uae_jax.hf.safetensors import TensorFolder, write_tensors
from uae_jax.planning.system import abstract_system
from uae_jax.rollouts.frozen_inputs import FIELDS, field_shapes
from uae_jax.settings import frozen
from uae_jax.stages import checks, precompute
from uae_jax.stages import precomputed as inputs
from uae_jax.stages import run as run_module
from uae_jax.stages.precompute import Request
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import load_frozen, load_system
from uae_jax.training.metrics import read_lines
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.signals import StopTraining

pytestmark = pytest.mark.usefixtures("all_on_one_device")

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    """The supervised stages of the small model on twelve photographs, one of them held out."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    photographs.write_captions(folder, photographs.photographs())
    rows = [  # in words that the small tokenizer knows, no two captions alike
        {"file_name": name, "caption": [" ".join(WORDS[number : number + count]) for count in (2, 3 + number % 7)]}
        for number, name in enumerate(photographs.photographs())
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return changed(
        config,
        stages=("pretrain", "cold_start"),
        data=dict(source="folder", folder=str(folder), negative_prompt="red circle"),
        evaluation=dict(images=1, batch_size=2, geneval_per_tag=0, samples=1),
        pretrain=dict(steps=3, condition_dropout=0.5),
        cold_start=dict(guidance_scale=3.0),
    )


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The precomputed inputs of `base`, in three shards."""
    out = tmp_path_factory.mktemp("precomputed") / "inputs"
    precompute.precompute(base, Request(out, shard_examples=5, batch_size=4))
    return out


def reading(base: dict, folder: pathlib.Path, **sections) -> dict:
    """The configuration that reads a folder."""
    return changed(changed(base, data=dict(precomputed=str(folder))), **sections)


@pytest.fixture(scope="module")
def runs(base, folder, tmp_path_factory):
    """A run that computes and one that reads; an optimizer's step is the gradient in small: rounding stays rounding."""
    rates = {
        stage: dict(optimizer=dict(learning_rate=rate)) for stage, rate in (("pretrain", 1.0), ("cold_start", 1e2))
    }
    config = changed(linear(base), **rates)
    return [make_run(values, tmp_path_factory.mktemp("run")) for values in (config, reading(config, folder))]


def three_steps(run, stage: str) -> tuple[dict, dict, list[dict], list[dict]]:
    """Parameters at the start and after three steps of a stage, metrics, and the batches of the run's own loader."""
    run = copy.copy(run)  # another stage keeps its parameters
    settings, before = run.config.stage(stage), sharding.host_values(start_of(run, stage))
    optimizer = make_optimizer(settings.optimizer, 10)
    run.parts = jax.tree.map(jnp.copy, run.parts)
    state = run.start_state(stage, optimizer, run.key)
    step, frozen_parts = step_of(run, stage, state, optimizer), run.frozen_of(stage)
    batches, told, seen = run.batches(stage, settings.batch_size), [], []
    for _ in range(3):
        seen.append(next(batches))
        with sharding.in_use(run.mesh):
            state, metrics = step(state, frozen_parts, sharding.shard_batch(seen[-1], run.mesh), run.key)
        told.append({name: float(value) for name, value in metrics.items()})
    batches.close()
    return before, sharding.host_values(state.params), told, seen


@pytest.mark.parametrize(
    "stage, fields",
    [
        ("pretrain", {"sample_id", *FIELDS["latents"], *FIELDS["states"]}),
        pytest.param("cold_start", {"sample_id", "pixels", *FIELDS["states"]}, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_a_run_that_computes(runs, stage, fields):
    before, params, metrics, batches = three_steps(runs[0], stage)
    _, found, told, read = three_steps(runs[1], stage)
    template = runs[0].system.model.template
    around = len(template.prefix) + len(template.suffix) - 1  # the stop token has no state
    assert all(batch.keys() == fields for batch in read)
    for one, other in zip(batches, read):
        np.testing.assert_array_equal(one["sample_id"], other["sample_id"])
        np.testing.assert_array_equal(one["caption_mask"].sum(-1) + around, other["text_mask"].sum(-1))
    for one, other in zip(metrics, told):
        assert one.keys() == other.keys() and other == pytest.approx(one, rel=1e-5)
    assert largest_gap(params, found) < 1e-6
    changes = [jax.tree.map(np.subtract, after, before) for after in (params, found)]
    assert largest_gap(*changes) < 1e-3
    for part in before:
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(changes[0][part])), part


def test_the_position_in_the_data_is_that_of_a_run_that_computes(runs):
    computing, read, again = (run.batches("pretrain", 4) for run in (*runs, runs[1]))
    next(read), next(read)
    state = json.loads(json.dumps(read.get_state()))
    computing.set_state(state)
    again.set_state(state)
    third, same, plain = next(read), next(again), next(computing)
    for name, leaf in third.items():
        np.testing.assert_array_equal(leaf, same[name])
    np.testing.assert_array_equal(third["sample_id"], plain["sample_id"])
    for batches in (computing, read, again):
        batches.close()


def test_latents_alone_leave_the_captions_to_the_step(base, runs, tmp_path):
    out = tmp_path / "latents"
    precompute.precompute(base, Request(out, parts=("latents",), batch_size=4))
    assert pre.read_manifest(out).arrays.keys() == {"caption_ids", *FIELDS["latents"]}
    run = make_run(reading(base, out), tmp_path)
    batches = run.batches("pretrain", 8)
    batch = next(batches)
    batches.close()
    assert batch.keys() == {"sample_id", "caption_ids", "caption_mask", *FIELDS["latents"]}
    computing = runs[0].batches("pretrain", 8)
    plain = next(computing)
    computing.close()
    for name in ("sample_id", "caption_ids", "caption_mask"):
        np.testing.assert_array_equal(batch[name], plain[name])
    # cold_start reads nothing of it
    (line,) = inputs.notes(run.config)
    assert line == f"{out} is read for latents in pretrain; nothing of it serves cold_start: computed as before"
    assert run.config.reads("cold_start", inputs.parts_read(run.config, "cold_start")) == run.config.reads("cold_start")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("written", [0, 2])
def test_a_killed_call_goes_on_and_leaves_the_same_bytes(base, folder, tmp_path, monkeypatch, capsys, written):
    out, write_shard = tmp_path / "inputs", pre.write_shard
    request = Request(out, shard_examples=5, batch_size=4)

    def first_alone(examples):
        yield next(examples)
        raise KeyboardInterrupt

    def killed(path, examples):
        write_shard(path, first_alone(examples) if path.name == pre.Manifest.name(written) else examples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(precompute, "write_shard", killed)
        precompute.precompute(base, request)
    assert sorted(path.name for path in out.glob("inputs-*")) == [pre.Manifest.name(shard) for shard in range(written)]
    (line,) = checks.read_model(frozen(RunConfig, reading(base, out)))[1]
    assert (
        line
        == f"{out} is not complete: it has {written} of 3 shards; run its command again, which goes on where "
        + ("it is not done")
    )
    capsys.readouterr()
    precompute.precompute(base, request)
    told = capsys.readouterr().out
    if written:
        assert "precompute: 2 shards are there; 1 examples are left\n" in told
    assert contents(out) == contents(folder)
    # nothing is left to do, and nothing is read or written
    monkeypatch.setattr(precompute, "load_frozen", lambda *_, **__: pytest.fail("the weights were read"))
    precompute.precompute(base, request)
    assert contents(out) == contents(folder)


def test_a_damaged_shard_is_named_and_made_again(base, folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "inputs")
    shard = out / pre.Manifest.name(1)
    shard.write_bytes(shard.read_bytes()[:-64])
    (line,) = checks.read_model(frozen(RunConfig, reading(base, out)))[1]
    assert line.startswith(f"{shard} is damaged: it has ")
    precompute.precompute(base, Request(out, batch_size=4))
    assert contents(out) == contents(folder)


def other_autoencoder(config: dict, place: pathlib.Path) -> dict:
    """The configuration with a model whose auto-encoder was trained on."""
    model = shutil.copytree(config["model"]["folder"], place / "model")
    part = model / "SD3" / "vae"
    tensors = TensorFolder(part)
    values = {name: 1.01 * np.array(tensors.read(name)) for name in sorted(tensors.names())}
    (file,) = part.glob("*.safetensors")
    file.unlink()
    write_tensors(part, values, stem="diffusion_pytorch_model")
    return changed(config, model=dict(folder=str(model)))


CHANGES = {
    "weights": (other_autoencoder, r"contents of SD3/vae was '\w+' and is '\w+'"),
    "size": (lambda base, _: changed(base, data=dict(image_size=32)), "data.image_size was 16 and is 32"),
    "captions": (lambda base, _: changed(base, data=dict(max_caption=10)), "data.max_caption was 12 and is 10"),
    "precision": (
        lambda base, _: changed(base, model=dict(dtype="bfloat16")),
        "model.dtype was 'float32' and is 'bfloat",
    ),
    "stored precision": (
        lambda base, _: changed(base, model=dict(frozen_dtype="bfloat16")),
        "precision of the language model was 'float32' and is 'bfloat16'",
    ),
    "choice": (
        lambda base, _: changed(base, data=dict(caption_choice="longest")),
        "data.caption_choice was 'each' and is 'longest'",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_and_settings_are_refused_before_anything_is_read(base, folder, tmp_path, monkeypatch, name):
    change, message = CHANGES[name]
    monkeypatch.setattr(run_module, "load_system", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(ValueError) as refused:
        run_module.run(reading(change(base, tmp_path), folder), tmp_path / "run")
    line = str(refused.value)
    assert re.search(f"^{folder} was computed for other inputs: {message}", line), line
    assert line.endswith(
        "; compute them for this run by `python -m uae_jax.precompute` with its --config flags and a new --out, or "
        "leave data.precomputed out"
    )
    assert not (tmp_path / "run").exists()


def test_a_projector_that_trains_on_is_no_other_input(base, folder):
    config = frozen(RunConfig, reading(base, folder, pretrain=dict(train_projector=False, steps=9), seed=5))
    system, found = checks.read_model(config)
    assert system and found == []


@pytest.mark.parametrize("name", ["image", "names", "content", "caption", "held out"])
def test_other_images_and_captions_are_refused(base, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(run_module, "load_system", lambda *_, **__: pytest.fail("the weights were read"))
    photos = shutil.copytree(base["data"]["folder"], tmp_path / "photos")
    captions, config = photos / "captions.jsonl", changed(base, data=dict(folder=str(photos)))
    more = json.dumps({"file_name": "zebra.jpg", "caption": "a zebra"})
    if name == "image":
        (photos / "zebra.jpg").write_bytes(photographs.photographs(1, 60)["astronaut.jpg"])
        captions.write_text(f"{captions.read_text()}\n{more}")
    elif name == "names":
        (photos / "brick.jpg").rename(photos / "bricks.jpg")
        captions.write_text(captions.read_text().replace("brick.jpg", "bricks.jpg"))
    elif name == "content":
        (photos / "brick.jpg").write_bytes(photographs.photographs(2, 60)["brick.jpg"])
    elif name == "caption":
        captions.write_text(captions.read_text().replace(f'"{WORDS[1]} {WORDS[2]}"', '"red"'))
    else:
        config = changed(config, data=dict(heldout_folder=str(photos)))
    told = {
        "image": "11 images then and 12 now, other captions and contents and names, where",
        "names": "11 images then and 11 now, other names",
        "content": "11 images then and 11 now, other contents",
        "caption": "11 images then and 11 now, other captions",
        "held out": "11 images then and 12 now, other captions and names, where config.evaluation.images holds",
    }[name]
    with pytest.raises(ValueError, match=re.escape(f"the images are not those of {folder} ({told}")):
        make_run(reading(config, folder), tmp_path)
    with pytest.raises(ValueError, match=f"holds inputs that were computed for others: {told}"):
        precompute.precompute(config, Request(folder))


def test_what_does_not_agree_with_the_computation_is_refused(base, folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "inputs")
    manifest = pre.read_manifest(out)
    stored = pre.StoredExamples(out, manifest)
    records = [stored[record] for record in range(11)]
    moved = {"latents": [records[0] | {"latent_mean": records[0]["latent_mean"] + 0.1}, *records[1:]]}
    moved["order"] = [records[-1], *records[:-1]]
    told = {
        "latents": r"latent_mean differs by 0\.\d+ of its size .* of example astronaut.jpg",
        "order": "other caption_ids",
    }
    for name, examples in moved.items():
        sizes = []
        for shard in range(manifest.count):
            path = out / manifest.name(shard)
            pre.write_shard(path, [examples[record] for record in manifest.records(shard)])
            sizes.append(path.stat().st_size)
        pre.write_manifest(out, dataclasses.replace(manifest, shards=tuple(sizes)))
        with pytest.raises(ValueError, match=f"inputs does not hold what this run computes: {told[name]}"):
            make_run(reading(base, out), tmp_path)


@pytest.mark.slow
def test_a_run_is_continued_with_and_without(base, folder, tmp_path, monkeypatch, capsys):
    config = changed(base, stages=("pretrain",))
    run_module.run(reading(config, folder), tmp_path / "whole")
    run_stage = run_module.run_stage

    def stopping(name, step, **arguments):
        hook = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 1 else None  # noqa: E731
        arguments["hooks"] = dataclasses.replace(arguments["hooks"], on_step=hook)
        return run_stage(name, step, **arguments)

    for name, later in (("read", reading(config, folder)), ("computed", config)):
        with monkeypatch.context() as patch, pytest.raises(StopTraining):
            patch.setattr(run_module, "run_stage", stopping)
            run_module.run(reading(config, folder), tmp_path / name)
        capsys.readouterr()
        run_module.run(later, tmp_path / name)
        told = f"note: pretrain continues with other settings: data.precomputed was '{folder}' and is ''"
        assert (told[:70] in capsys.readouterr().err) == (name == "computed")
    lines = {name: read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "read", "computed")}
    values = {
        name: [
            {k: v for k, v in line.items() if k in ("step", "loss", "grad_norm")} for line in found if "loss" in line
        ]
        for name, found in lines.items()
    }
    assert [line["step"] for line in values["whole"]] == [1, 2, 3]
    assert values["read"] == values["whole"]
    for one, other in zip(values["computed"], values["whole"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights = {name: (tmp_path / name / "export" / "dit").glob("*.safetensors") for name in ("whole", "read")}
    (whole,), (read,) = weights.values()
    assert whole.read_bytes() == read.read_bytes()


def test_the_parts_of_a_run_are_those_that_are_encoded_with(config, model_folder):
    settings = frozen(RunConfig, config).model
    whole, found = load_system(settings, image_size=16).parts, load_frozen(settings, ("vae", "language"))
    assert found.keys() == {"vae", "language"}
    for name, tree in found.items():
        jax.tree.map(np.testing.assert_array_equal, tree, whole[name])


# the command

run_command = functools.partial(exit_of, command.main)


@pytest.fixture
def scenes(config, tmp_path):
    """Flags of a configuration on endless scenes: two steps of eight images."""
    (tmp_path / "values.json").write_text(json.dumps(changed(config, stages=("pretrain",))))
    text = (
        "import json, pathlib, ml_collections\n"
        "def get_config(argument=None):\n"
        "    return ml_collections.ConfigDict(json.loads(pathlib.Path(argument).read_text()))\n"
    )
    (tmp_path / "small.py").write_text(text)
    return f"--config={tmp_path / 'small.py'}:{tmp_path / 'values.json'}"


def test_of_endless_scenes_those_are_computed_that_the_run_reads(scenes, tmp_path, capsys):
    out = tmp_path / "inputs"
    assert run_command(scenes, f"--out={out}", "--dry_run") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "precompute: latents and states for pretrain" and not out.exists()
    assert re.fullmatch(
        r"precompute: 16 examples; latents 2\.0 kB, states 1\.\d kB \(1\d tokens a caption\) an example; about "
        rf"6\d\.\d kB in 1 shard of {out}",
        told[1],
    )
    assert run_command(scenes, f"--out={out}") == 0
    told = capsys.readouterr().out.splitlines()
    size = (out / pre.Manifest.name(0)).stat().st_size
    assert told[2] == f"done: {out} holds 16 examples in 1 shard, {size / 1e3:.1f} kB; train with " + (
        f"--config.data.precomputed={out}"
    )
    config = frozen(RunConfig, json.loads((tmp_path / "values.json").read_text()))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, precomputed=str(out)))
    assert checks.read_model(config)[1] == []
    # more steps need more examples: the folder grows
    (line,) = checks.read_model(config.with_stage("pretrain", steps=3))[1]
    assert line.startswith(
        f"pretrain reads 24 examples (3 steps of 8), and {out} holds the first 16; compute the rest "
    )
    assert f"`python -m uae_jax.precompute --out={out} --examples=24`" in line
    assert run_command(scenes, f"--out={out}", "--examples=24") == 0
    assert pre.read_manifest(out).examples == 24
    assert checks.read_model(config.with_stage("pretrain", steps=3))[1] == []
    # another seed draws other scenes
    (line,) = checks.read_model(dataclasses.replace(config, seed=1))[1]
    assert "was computed for other inputs: seed was 0 and is 1; " in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts=pixels"], "--parts names 'pixels'; the parts are latents, states"),
        (
            ["--config.stages=cold_start", "--parts=latents"],
            "no stage of this configuration can read latents (cold_start reads states); leave it out of --parts",
        ),
        (
            ["--config.stages=gen_for_und,und_for_gen"],
            "this configuration runs gen_for_und, und_for_gen, and that reads nothing that can be precomputed; give "
            "the one of pretrain, align or cold_start",
        ),
        (
            ["--config.stages=cold_start", "--config.cold_start.condition=caption_states"],
            "this configuration runs cold_start, and that reads nothing that can be precomputed; give the one of "
            "pretrain, align or cold_start",
        ),
        (
            ["--config.data.precomputed=x"],
            "config.data.precomputed is what this command makes; leave it out, and name a folder by --out",
        ),
        (["--examples=0"], "--examples is 0; it must be at least 1"),
        (["--config.pretrain.stepz=1"], "config.pretrain.stepz does not exist; did you mean config.pretrain.steps?"),
        (
            ["--config.data.max_caption=2", "--config.data.negative_prompt=red red circle"],
            "the negative prompt has 3 tokens, more than config.data.max_caption = 2: states of captions cannot be "
            "precomputed; raise data.max_caption, or give --parts=latents",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_one_line(scenes, tmp_path, arguments, message):
    assert run_command(scenes, f"--out={tmp_path / 'inputs'}", *arguments) == f"error: {message}"
    assert not (tmp_path / "inputs").exists()


def test_a_folder_that_cannot_be_used_is_named(scenes, base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    out = tmp_path / "none" / "inputs"
    assert run_command(scenes, f"--out={out}") == (
        f"error: the folder {out.parent} that --out needs does not exist; make it first"
    )
    assert (
        run_command(scenes, f"--out={tmp_path / 'file'}")
        == f"error: --out={tmp_path / 'file'} is a file; name a folder"
    )
    assert run_command(scenes, f"--out={tmp_path / 'full'}") == (
        f"error: --out={tmp_path / 'full'} holds notes.txt and no precomputed.json; name a new folder"
    )
    inside = pathlib.Path(base["data"]["folder"]) / "inputs"
    with pytest.raises(ValueError, match="lies in the data folder .*, and would be read as data; name another"):
        precompute.precompute(base, Request(inside))
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 20_000))
    with pytest.raises(
        ValueError, match=r"about 3\d\.\d kB are needed, and 20.0 kB are free where .* choose another disk"
    ):
        precompute.precompute(base, Request(tmp_path / "inputs", dry_run=True))


def test_stages_that_cannot_use_it_are_told(base, folder):
    config = frozen(RunConfig, reading(base, folder, stages=STAGES))
    assert list(inputs.notes(config)) == [
        f"{folder} is read for latents, states in pretrain and states in cold_start; nothing of it serves gen_for_und, "
        "und_for_gen: computed as before"
    ]
    assert not list(inputs.notes(frozen(RunConfig, base)))
    assert inputs.notes(config) and checks.notices(config)[-1] == next(inputs.notes(config))


@pytest.mark.parametrize("preset", ["qwen2_5_vl_3b_sd3_5_medium", "qwen2_5_vl_3b_sd3_5_large"])
def test_the_page_has_the_bytes_of_the_published_sizes(preset):
    """docs/precompute.md: bytes an example, by the shapes of the configuration."""
    config = frozen(RunConfig, presets.preset(preset, ("pretrain",)).to_dict())
    model = abstract_system(config).model
    kinds = precompute.kinds_of(model, ("latents", "states"))
    latents = sum(kinds[name].byte_size() for name in FIELDS["latents"])
    token = kinds["text_states"].byte_size(1)
    assert (latents, token) == (524_288, 4_096)
    shapes = field_shapes(model, 1, config.data.max_caption)
    assert shapes["text_states"].shape == (1, 531, 2048)
    around = len(model.template.prefix) + len(model.template.suffix)
    page = (pathlib.Path(precompute.__file__).parents[2] / "docs" / "precompute.md").read_text()
    for words in (100, 250, 511):
        states = token * (words + around)
        total = latents + states + 4 * (words + 1)
        sizes = " | ".join(f"{size / 1e6:.2f} MB" for size in (latents, states, total))
        row = f"| {words} | {sizes} | {total * 7e5 / 1e12:.2f} TB |"
        assert row in page, row
