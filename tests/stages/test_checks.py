"""All mistakes of a run at one go, before any weight is read; and what a dry run says where there are none."""

import functools
import json
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from stage_pieces import changed, exit_of

from configs import presets
from uae_jax import main, trees
from uae_jax.settings import Mistakes, as_dict, frozen
from uae_jax.stages import abstract, checks
from uae_jax.stages import run as run_module
from uae_jax.stages.folders.parts import NEW_PROJECTOR
from uae_jax.stages.run_config import RunConfig
from uae_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("one_device")
STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
LARGE = "qwen2_5_vl_3b_sd3_5_large"


@pytest.fixture
def no_weights(monkeypatch):
    """No weight may be read."""
    monkeypatch.setattr(run_module, "load_system", lambda *_, **__: pytest.fail("the weights were read"))


@pytest.fixture
def images(tmp_path):
    """Four captioned images of 48 pixels."""
    folder, rows = tmp_path / "images", []
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "gray")):
        Image.new("RGB", (48, 48), colour).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "caption": f"{colour} background"})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


command = functools.partial(exit_of, main.main)


WRONG = (
    "--config.gen_for_und.group_sise=4",
    "--config.stages=pretrain,warm_start",
    "--config.data.source=folder",
    "--config.pretrain.steps=5",
)


@pytest.mark.parametrize("dry", [True, False])
def test_every_mistake_and_every_notice_is_a_line(tmp_path, capsys, no_weights, dry):
    (tmp_path / "empty").mkdir()
    folder, workdir = tmp_path / "empty", tmp_path / "run"
    arguments = ["--config=unified_grpo", f"--workdir={workdir}", *WRONG, f"--config.data.folder={folder}"]
    assert command(*arguments, *(["--dry_run"] if dry else [])) == 1
    out, err = capsys.readouterr()
    errors = [
        "error: config.gen_for_und.group_sise does not exist; did you mean config.gen_for_und.group_size?",
        "error: config.stages names 'warm_start'; the stages are align, pretrain, cold_start, gen_for_und, "
        "und_for_gen, unified_ar",
        f"error: {folder} holds no images in any of the formats captions, image_folder, text_files, coco, parquet, "
        "webdataset, array_record, images; docs/data.md shows what each looks like",
    ]
    note = "note: pretrain: the warm-up is shortened from 10 to 2 updates, since the stage has 5"
    assert err.splitlines() == [note, *errors] and out == ""
    assert not workdir.exists()


def test_a_full_size_run_without_folders_is_refused_before_anything_is_read(tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(checks, "abstract_folder", lambda *_: pytest.fail("the model's folder was read"))
    monkeypatch.setattr(abstract, "model_folder", lambda *_: pytest.fail("a folder was looked for"))
    values = presets.preset(LARGE, STAGES).to_dict()
    with pytest.raises(Mistakes) as refused:
        run_module.run(values, tmp_path / "run")
    assert refused.value.lines == [
        f"config.model.folder is empty; give a folder with the weights of {LARGE} "
        "(docs/weights.md says where they are)",
        "config.data.folder is empty; give a folder of images (docs/data.md), or data.source='scenes'",
    ]
    assert not (tmp_path / "run").exists()


def test_mistakes_of_batch_mesh_encoder_and_workdir_are_found_together(config, tmp_path, no_weights):
    values = changed(
        config,
        pretrain=dict(batch_size=6, micro_batches=4),
        gen_for_und=dict(reward=dict(names=("clip", "longclip"), weights=(0.5, 0.5))),
        evaluation=dict(encoders=("dinov3",)),
    )
    with pytest.raises(Mistakes) as refused:
        checks.checked_config(values, tmp_path / "none" / "run", ["config.seed is 'x'; it must be of type int"])
    folder = config["model"]["folder"]
    assert refused.value.lines == [
        "config.seed is 'x'; it must be of type int",
        "config.pretrain.batch_size is 6; it must be a multiple of the 1 devices that share the batch, and its 6 "
        "samples one of updates_per_rollout * micro_batches = 4",
        f"config.evaluation.encoders needs the image encoder 'dinov3'; put it at {folder}/dinov3",
        f"config.gen_for_und.reward.names needs the image encoder 'longclip'; put it at {folder}/longclip",
        f"the folder {tmp_path / 'none'} that --workdir needs does not exist; make it first",
    ]


def test_a_mesh_that_does_not_divide_is_told_with_the_rest(config, tmp_path):
    settings = frozen(RunConfig, changed(config, mesh=dict(data=3), model=dict(folder="/no/model")))
    found = checks.find_mistakes(settings, None)
    assert len(found) == 2 and "does not divide 1 devices; change config.mesh" in found[0]
    assert found[1].startswith("model folder /no/model does not exist")


def test_a_damaged_model_folder_is_told_by_its_parts(config, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "llm").mkdir()
    (folder / "llm" / "config.json").write_text("{}")
    settings = frozen(RunConfig, changed(config, model=dict(folder=str(folder))))
    found = [*checks.find_mistakes(settings, None), *checks.read_model(settings)[1]]
    assert any("SD3" in line or "vae" in line for line in found) and any("'clip'" in line for line in found)
    assert len(found) == len(set(found)) and all("\n" not in line for line in found)


def test_a_run_of_another_configuration_names_its_fields(config, tmp_path, no_weights):
    before = frozen(RunConfig, config)
    meta = {"stage": "gen_for_und", "identity": json.loads(json.dumps(before.identity("gen_for_und")))}
    with Checkpoints(tmp_path / "run" / "checkpoints" / "gen_for_und") as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(1)}, {}, meta)
    assert checks.find_mistakes(before, tmp_path / "run") == []
    later = changed(config, und_for_gen=dict(steps=3), loop=dict(save_every=7), evaluation=dict(images=3))
    assert checks.find_mistakes(frozen(RunConfig, later), tmp_path / "run") == []
    values = changed(config, gen_for_und=dict(kl_weight=0.5), data=dict(rl_detail="full"))
    with pytest.raises(Mistakes) as refused:
        run_module.run(values, tmp_path / "run")
    (line,) = refused.value.lines
    assert "gen_for_und was written with another configuration: " in line and "use the configuration in" in line
    assert "data.rl_detail was 'short' and is 'full'; gen_for_und.kl_weight was 0.02 and is 0.5; " in line
    assert line.count(" was ") == 3


def test_a_dry_run_says_what_would_run(tmp_path, capsys, images, no_weights):
    workdir = tmp_path / "run"
    arguments = ["--config=unified_grpo", f"--workdir={workdir}", "--dry_run", "--config.stages=pretrain,gen_for_und"]
    assert command(*arguments, "--config.data.source=folder", f"--config.data.folder={images}") == 0
    out, err = capsys.readouterr()
    assert err == "" and not workdir.exists()
    assert re.search(r"^device:  \d+ x \S+ \(cpu\)$", out, re.MULTILINE)
    assert "mesh:    data=1 fsdp=1 tensor=1\nmodel:   built in, activations float32\n" in out
    assert f"data:    folder {images}\nworkdir: {workdir} (new)\n" in out
    settings = frozen(RunConfig, presets.preset("tiny", STAGES).to_dict())
    parts = abstract.abstract_folder(settings).parts
    counted = {name: trees.parameter_count(part) for name, part in parts.items()}
    for stage in ("pretrain", "gen_for_und"):
        row = re.search(rf"^{stage} +(\d+) +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)$", out, re.MULTILINE)
        steps, seen, own, rest = (int(number.replace(",", "")) for number in row.groups()[:4])
        section = settings.stage(stage)
        assert (steps, seen) == (section.steps, section.steps * section.batch_size)
        assert 0.01 < float(row[5]) < 10
        if stage == "pretrain":  # beside them the adapter that the next stage trains
            adapter = own + rest - sum(counted.values())
            assert own == counted["projector"] + counted["transformer"] and 0 < adapter < own
        else:
            assert (own, rest) == (adapter, sum(counted.values()))
    rows = out[out.index("data, the first of") :].splitlines()
    assert rows[0] == "data, the first of 3 rows:" and len(rows) == 6  # one of four is held out
    assert all("there are 3 training images, fewer than a batch" in note for note in rows[4:])
    assert rows[1:4] == [
        f"  {index}.png: 32 x 32 pixels, 3 tokens: {colour} background"
        for index, colour in enumerate(("red", "green", "blue"))
    ]


def test_a_dry_run_tells_a_step_that_cannot_be_built(tmp_path, capsys):
    arguments = ["--config=unified_grpo", f"--workdir={tmp_path / 'run'}", "--dry_run", "--config.stages=pretrain"]
    assert command(*arguments, "--config.pretrain.optimizer.multipliers=(('decoder',2.0),)") == 1
    assert capsys.readouterr().err.startswith("error: pretrain: optimizer.multipliers: 'decoder' matches no parameter")


def test_describe_prints_a_section_and_refuses_one_that_is_not_there(capsys):
    assert (
        main.main(["--config=unified_grpo", "--describe=und_for_gen.nft", "--config.und_for_gen.nft.levels=4"]) is None
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "config.und_for_gen.nft.updates_per_rollout: int = 1"
    assert "config.und_for_gen.nft.levels: int = 10; here 4" in lines
    assert all(line.startswith(("config.und_for_gen.nft.", "    ")) for line in lines)
    assert command("--config=unified_grpo", "--describe=und_for_gen.ppo") == 1
    assert "names no section" in capsys.readouterr().err
    assert command("--config=unified_grpo", "--describe", "--config.seed=-1") == 1
    assert capsys.readouterr().err == "error: config.seed is -1; it must be at least 0, at most 4294967295\n"


def test_a_workdir_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command("--config=unified_grpo", f"--workdir={tmp_path / 'file'}") == 1
    assert f"error: {tmp_path / 'file'} is a file; name a folder as --workdir" in capsys.readouterr().err


def test_the_workdir_must_be_named(capsys):
    assert command("--config=unified_grpo") == 1
    assert capsys.readouterr().err.startswith("error: --workdir is not given; ")


def test_settings_are_stored_as_they_are_read(config):
    settings = frozen(RunConfig, config)
    stored = json.loads(json.dumps(as_dict(settings)))
    assert frozen(RunConfig, stored) == settings
    np.testing.assert_equal(stored["und_for_gen"]["flow_grpo"]["clip_range"], 0.5)


def test_a_new_projector_is_aligned_before_pretraining(config, tmp_path, capsys):
    folder = pathlib.Path(config["model"]["folder"])
    copy = shutil.copytree(folder, tmp_path / "model")
    values = changed(config, model=dict(folder=str(copy)), stages=("pretrain", "gen_for_und"))
    assert checks.read_config(values)[0].stages == ("pretrain", "gen_for_und") and capsys.readouterr().err == ""
    (copy / "llm" / NEW_PROJECTOR).write_text("{}")
    settings, mistakes = checks.read_config(values)
    assert settings.stages == ("align", "pretrain", "gen_for_und") and not mistakes
    assert "the stage align trains it first" in capsys.readouterr().err
    assert settings.trains("align") == ("projector",)
    for other in (dict(align=dict(after_import=False)), dict(stages=("gen_for_und",))):
        assert "align" not in checks.read_config(changed(values, **other))[0].stages


def test_no_stage_learns_from_drawings_through_a_random_projector(config, tmp_path):
    copy = shutil.copytree(config["model"]["folder"], tmp_path / "model")
    values = changed(config, model=dict(folder=str(copy)), stages=("gen_for_und",))
    wrong = lambda values: [m for m in checks.find_mistakes(frozen(RunConfig, values), None) if "projector" in m]  # noqa: E731
    assert not wrong(values)
    (copy / "llm" / NEW_PROJECTOR).write_text("{}")
    assert len(wrong(values)) == 1 and "put 'align' in front" in wrong(values)[0]
    for stages in (("align", "gen_for_und"), ("pretrain", "gen_for_und")):
        assert not wrong(changed(values, stages=stages))


@pytest.mark.slow
def test_an_aligned_projector_is_exported_as_a_trained_one(config, tmp_path):
    copy = shutil.copytree(config["model"]["folder"], tmp_path / "model")
    (copy / "llm" / NEW_PROJECTOR).write_text("{}")
    values = changed(config, model=dict(folder=str(copy)))
    run = run_module.run(changed(values, stages=("pretrain",), align=dict(steps=2, batch_size=2)), tmp_path / "run")
    assert [stage["name"] for stage in run["stages"]][:2] == ["align", "pretrain"]
    assert not (tmp_path / "run" / "export" / "llm" / NEW_PROJECTOR).exists()
    assert (tmp_path / "run" / "checkpoints" / "align").is_dir()
