"""Questions about images: rows of VLMEvalKit's tables, images in their places, and the questions about scenes."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from uae_jax.data import questions, scene_captions, scene_questions
from uae_jax.data.qwen_inputs import ImageProcessor
from uae_jax.data.scene_checker import caption_score, read_pictures
from uae_jax.data.sources import SceneSource
from uae_jax.data.tokenizer import IMAGE_PAD, load_tokenizer, token_id, turn_ids, write_scene_tokenizer
from uae_jax.files.tables import write_tsv

SOURCE = SceneSource("test", 0, 32)


def encoded(colour, side=12):
    data = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def row(index, **more):
    options = {"A": "red", "B": "blue", "C": "", "D": ""}
    known = {"index": str(index), "image": encoded("red"), "question": "Which?", "answer": "A", "category": "colour"}
    return known | options | more


def table(tmp_path, rows):
    write_tsv(tmp_path / "some.tsv", rows)
    return tmp_path / "some.tsv"


def test_a_table_becomes_questions_in_turn_from_each_category(tmp_path):
    rows = [row(number, category="a" if number < 6 else "b") for number in range(8)]
    rows += [row(8, category="c", A="", B="", answer="yes", question="Is it red?"), row(9, A="", B="", answer="sky")]
    found = questions.read_questions(table(tmp_path, rows), 5)
    assert [(question.index, question.category) for question in found] == [
        ("0", "a"),
        ("6", "b"),
        ("8", "c"),
        ("9", "colour"),
    ][:3] + [("1", "a"), ("7", "b")]
    assert found[0].options == {"A": "red", "B": "blue"} and found[0].answer == "A"
    assert found[2].options == {"Yes": "Yes", "No": "No"} and found[2].answer == "Yes"
    assert found[2].text == "Is it red? Please answer yes or no."
    assert [image.getpixel((0, 0)) for image in found[0].images()] == [(255, 0, 0)]
    everything = questions.read_questions(tmp_path / "some.tsv", 99)
    assert len(everything) == 9 and "9" not in {question.index for question in everything}  # open


def test_the_upper_category_is_taken_and_an_image_of_another_row_is_found(tmp_path):
    rows = [row(0, image=encoded("blue")), row(1, image="0")]
    rows = [one | {"l2-category": "perception"} for one in rows]
    found = questions.read_questions(table(tmp_path, rows), 9)
    assert [question.category for question in found] == ["perception"] * 2
    assert found[1].images()[0].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row(3, answer="C")], "row 3 has the answer 'C'; its options are A, B"),
        ([row(3, A="", B="", answer="sky")], "has no question with options"),
        ([{name: value for name, value in row(3).items() if name != "answer"}], "has no column answer"),
        ([row(3), row(3)], "the index 3 twice"),
        ([row(3, image="")], "has no item with an image"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        questions.read_questions(table(tmp_path, rows), 9)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_scene_tokenizer(folder, scene_captions.WORDS)
    return load_tokenizer(folder)


def test_images_stand_where_the_text_names_them(tokenizer):
    first, second = (Image.new("RGB", (16, side), "red") for side in (16, 32))
    place = questions.placed_images
    assert place("red", [first, second]) == [first, second, "red"]
    assert place("left <image 2> of <image 1><image 2>", [first, second]) == [
        "left ",
        second,
        " of ",
        first,
        second,
    ]
    for text, images, message in (
        ("see <image 3>", [first], "names <image 3>, but it has 1 images"),
        ("see <image 0>", [first], "names <image 0>"),
        ("see", [], "at least one image"),
    ):
        with pytest.raises(ValueError, match=message):
            place(text, images)
    processor = ImageProcessor(patch_size=4, min_pixels=64, max_pixels=1024, window_size=16)
    ids, seen = questions.question_inputs(tokenizer, processor, place("left <image 2> of <image 1>", [first, second]))
    assert [grid for _, grid in seen] == [(8, 4), (4, 4)]
    assert ids == turn_ids(tokenizer, ["left ", 8, " of ", 4])
    pads = np.array(ids) == token_id(tokenizer, IMAGE_PAD)
    left, of = (ids.index(token_id(tokenizer, word)) for word in ("left", "of"))
    assert pads[left:of].sum() == 8 and pads[of:].sum() == 4 and not pads[:left].any()
    named = turn_ids(tokenizer, [f"a {IMAGE_PAD}", 4])  # the name in a text is text, not an image
    assert (np.array(named) == token_id(tokenizer, IMAGE_PAD)).sum() == 4 and len(named) > len(
        turn_ids(tokenizer, ["a ", 4])
    )


def scene_of(question):
    """The scene of a question, read from its image."""
    return read_pictures(question.images()[0][None])[0]


@pytest.mark.parametrize("spoken", [True, False])
def test_scene_questions_have_one_true_option_and_statements_that_parse(spoken):
    asked = scene_questions.scene_questions(SOURCE, 96, spoken=spoken)
    names = tuple(scene_questions.SPOKEN) + (() if spoken else tuple(scene_questions.UNSPOKEN))
    assert [question.category for question in asked] == [names[number % len(names)] for number in range(96)]
    again = scene_questions.scene_questions(SOURCE, 96, spoken=spoken)
    assert [(q.text, q.answer, q.statements) for q in asked] == [(q.text, q.answer, q.statements) for q in again]
    for question in asked:
        assert bool(question.statements) == (question.category in scene_questions.SPOKEN)
        scene = scene_of(question)
        for key, captions in question.statements.items():
            scores = [caption_score(scene, caption.text) for caption in captions]
            assert not any(score.unparsed for score in scores)
            # what states the answer is true, and what states another option is not
            true = [score.correct == score.claimed for score in scores]
            assert any(true) if key == question.answer else not any(true), question


def test_answers_are_spread_over_the_options():
    asked = scene_questions.scene_questions(SOURCE, 600)
    letters = [question.answer for question in asked if "A" in question.options and len(question.options) == 4]
    assert {letter: letters.count(letter) / len(letters) for letter in "ABCD"} == pytest.approx(
        dict.fromkeys("ABCD", 0.25), abs=0.07
    )
    closed = [question.answer for question in asked if "Yes" in question.options]
    assert closed.count("Yes") / len(closed) == pytest.approx(0.5, abs=0.1)


def test_counts_and_relations_are_those_of_the_scene():
    numbers = {value: name for value, name in scene_captions.NUMBERS.items()}
    for question in scene_questions.scene_questions(SOURCE, 160):
        scene = scene_of(question)
        shapes = [item.shape for item in scene.objects]
        if question.category == "count":
            word = question.text.partition("\n")[0].rstrip("?").split()[-1]
            assert numbers[question.options[question.answer]] == shapes.count(word)
        if question.category == "relation":
            words = question.text.partition("?")[0].split()
            first, second = (next(item for item in scene.objects if item.shape == words[at]) for at in (2, -1))
            relation = " ".join(words[3:-2])
            assert (question.answer == "Yes") == scene_captions.holds(relation, first, second)


def test_a_question_needs_its_answer_among_its_options():
    with pytest.raises(ValueError, match="question 5 has the answer 'C'"):
        questions.Question("5", "", {"A": "red"}, "C", "colour", list)
