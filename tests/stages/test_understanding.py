"""Questions in a run: one program, the same answers in any batch, refusals, and a harmful reward that trips."""

import dataclasses
import json

import numpy as np
import pytest
from stage_pieces import changed, nudged

from configs import presets
from uae_jax.data.questions import Question, Statement
from uae_jax.data.sources import SceneSource
from uae_jax.files.tables import write_tsv
from uae_jax.stages import run as run_module
from uae_jax.stages.checks import find_mistakes, read_config
from uae_jax.stages.evaluation import EvaluationConfig
from uae_jax.stages.run_config import DataConfig
from uae_jax.stages.understanding import Understanding, open_questions
from uae_jax.stages.weights import ModelConfig, load_system
from uae_jax.training.metrics import read_lines

BUILTIN = EvaluationConfig(questions="builtin", questions_by="text", questions_during=30)


def asked(whole, by="text", size=4, **settings):
    config = dataclasses.replace(BUILTIN, questions_by=by, **settings)
    data = dataclasses.replace(DataConfig(), image_size=16)
    return Understanding(whole.system, open_questions(config, data), by, "describe", size)


def test_answers_do_not_depend_on_the_batch_and_one_program_serves_all(whole):
    parts = {**whole.parts, "language_lora": nudged(whole.parts["language_lora"])}
    small, large = asked(whole, size=4), asked(whole, size=30)
    chosen, scores = small.answers(parts)
    again, others = large.answers(parts)
    np.testing.assert_array_equal(chosen, again)
    np.testing.assert_allclose(scores, others, atol=1e-5)
    small(whole.parts)
    assert small._answer._cache_size() == large._answer._cache_size() == 1
    options = np.isfinite(scores)
    assert np.abs(small.answers(whole.parts)[1][options] - scores[options]).max() > 1e-3


def test_scores_are_shares_of_right_answers_by_category(whole):
    understanding = asked(whole)
    chosen, scores = understanding.answers(whole.parts)
    found = understanding(whole.parts)
    right = [list(question.options).index(question.answer) for question in understanding.questions]
    np.testing.assert_array_equal(found["understanding"], chosen == right)
    names = ("colour", "shape", "size", "position", "background", "presence")
    assert list(found) == ["understanding", *(f"understanding_{name}" for name in names)]
    assert all(len(found[f"understanding_{name}"]) == 5 for name in names)
    counts = [len(question.options) for question in understanding.questions]
    assert np.isfinite(scores).sum(1).tolist() == counts and (chosen < counts).all()


def test_a_question_alone_has_the_scores_that_it_has_among_longer_ones(whole):
    understanding = asked(whole)
    _, scores = understanding.answers(whole.parts)
    for place in (0, 4, 5):
        alone = Understanding(whole.system, [understanding.questions[place]], "text", "describe", 1)
        assert alone.rows <= understanding.rows
        _, found = alone.answers(whole.parts)
        np.testing.assert_allclose(found[0], scores[place][: found.shape[1]], atol=1e-5)


def test_texts_of_options_are_whole_answers_to_the_question(whole):
    image = SceneSource("test", 0, 16)[0].image
    question = Question("7", "left", {"A": "red", "B": "red circle"}, "A", "side", lambda: [image])
    answers = Understanding(whole.system, [question], "text", "describe", 1)
    end = whole.system.stops[0]
    assert [ids[-1] for _, ids, _ in answers.texts[0]] == [end, end]
    assert [len(ids) for _, ids, _ in answers.texts[0]] == [2, 3]
    _, scores = answers.answers(whole.parts)
    # with the ends, two texts of which one begins the other share no probability
    assert np.logaddexp(*scores[0]) < 0


def test_words_of_the_vocabulary_may_be_letters_and_others_are_refused(whole):
    with pytest.raises(ValueError, match="question colour 0: the options A, B, C, D are the same tokens"):
        asked(whole, by="letter")
    image = SceneSource("test", 0, 16)[0].image
    question = Question("7", "left or right", {"left": "left", "right": "right"}, "left", "side", lambda: [image])
    answers = Understanding(whole.system, [question], "letter", "describe", 4)(whole.parts)
    assert list(answers) == ["understanding", "understanding_side"]
    same = dataclasses.replace(question, statements=dict.fromkeys(("left", "right"), (Statement("red"),)))
    with pytest.raises(ValueError, match="question 7: the texts of its options are the same tokens"):
        Understanding(whole.system, [same], "text", "describe", 4)
    broken = dataclasses.replace(question, text="see <image 2>")
    with pytest.raises(ValueError, match="question 7: its text names <image 2>"):
        Understanding(whole.system, [broken], "letter", "describe", 4)


def test_the_built_in_captioner_knows_the_answers():
    """Far above chance, which is a quarter to a half."""
    system = load_system(ModelConfig(), image_size=32)
    config, data = dataclasses.replace(BUILTIN, questions_during=120), dataclasses.replace(DataConfig(), image_size=32)
    found = Understanding(system, open_questions(config, data), "text", "describe", 60)(system.parts)
    assert all(values.mean() >= 0.9 for values in found.values()), {name: v.mean() for name, v in found.items()}


def test_a_table_is_checked_before_any_weight_is_read(config, tmp_path):
    row = {"index": "1", "question": "Which?", "A": "red", "B": "blue", "answer": "C", "image": "x" * 99}
    write_tsv(tmp_path / "bad.tsv", [row])
    for name, told in (("bad.tsv", "row 1 has the answer 'C'; its options are A, B"), ("none.tsv", "does not exist")):
        settings, _ = read_config(changed(config, evaluation=dict(questions=str(tmp_path / name))))
        assert any(told in mistake for mistake in find_mistakes(settings, None))


def test_questions_belong_to_the_identity_where_they_may_end_a_stage(config):
    def identity(**sections):
        return read_config(changed(config, **sections))[0].identity("gen_for_und")

    assert "questions" not in identity()
    builtin = dict(questions="builtin")
    assert identity(evaluation=builtin)["questions"]["questions"] == "builtin"
    assert "questions" not in identity(evaluation=builtin, guard=dict(understanding_fall=0.0))


@pytest.mark.slow
def test_a_run_logs_its_answers_and_reports_them(config, tmp_path, one_device):
    answered = dict(questions="builtin", questions_during=12, geneval_per_tag=0)
    short = changed(config, stages=("gen_for_und",), evaluation=answered, guard=dict(understanding_fall=1.0))
    summary = run_module.run(short, tmp_path / "run")
    (stage,) = summary["stages"]
    assert stage["guard"] is None
    for side in ("before", "after"):
        score = stage[side]["understanding_colour"]
        assert score["n"] == 2 and score["low"] <= score["value"] <= score["high"]
        assert stage[side]["understanding"]["n"] == 12
    during = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval/understanding_colour" in line]
    assert [line["step"] for line in during] == [1, 2] and "eval/reward" in during[0] and "eval/reward" not in during[1]
    assert during[1]["eval/understanding"] == pytest.approx(stage["after"]["understanding"]["value"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "understanding_colour" in page and "understanding_fall 1" in page and "Questions: does the encoder" in page


# no other bound stops it, and it may go as far from the reference as it likes
FREE = dict(
    gen_for_und=dict(
        steps=15, batch_size=8, group_size=8, sampler_steps=2, kl_weight=0.0, optimizer=dict(learning_rate=3e-3)
    ),
    evaluation=dict(
        images=4, images_during=1, batch_size=60, sampler_steps=1, samples=1, geneval_per_tag=0, questions_during=120
    ),
    loop=dict(eval_every=5, save_every=5),
    guard=dict(kl=0.0, reward_fall=0.0, truncated=0.0, gradient_ratio=0.0, gradient_outliers=0),
)


def free_run(workdir, weight):
    config = changed(presets.preset("tiny", ("gen_for_und",)).to_dict(), **FREE)
    config["gen_for_und"]["reward"]["weights"] = (weight,)
    (stage,) = run_module.run(config, workdir)["stages"]
    return stage


@pytest.mark.slow
def test_a_harmful_reward_trips_and_the_answers_come_back(tmp_path, one_device, capsys):
    """It pays a reconstruction for being unlike the image. The true reward with the same settings does no harm."""
    stage = free_run(tmp_path / "harmful", -1.0)
    trip = stage["guard"]
    assert trip["what"] == "understanding_fall" and trip["bound"] == 0.25 and trip["value"] > 0.25
    assert trip["before"] - trip["now"] == pytest.approx(trip["value"])
    assert stage["steps"] == trip["restored_step"] < trip["step"]
    name = f"understanding_{trip['category']}"
    assert stage["after"][name]["value"] >= stage["before"][name]["value"] - 0.125
    assert f"the questions about {trip['category']} ({trip['before']:.3g} before" in capsys.readouterr().err
    assert json.loads((tmp_path / "harmful" / "summary.json").read_text())["stages"][0]["guard"] == trip

    stage = free_run(tmp_path / "useful", 1.0)
    assert stage["guard"] is None and stage["steps"] == 15
    assert stage["after"]["understanding"]["value"] > 0.9
