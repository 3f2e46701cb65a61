"""Unified-Bench, protocol 2, against a stub of an endpoint that answers, fails, stalls and talks nonsense as it is
told.
"""

import http.server
import json
import re
import threading
import time
from collections import Counter

import pytest
from PIL import Image

from uae_jax import evaluate
from uae_jax.evaluation.judge_protocols import Criteria, ScoredCriteria
from uae_jax.evaluation.judging import make_questions, tally
from uae_jax.files.json_files import read_records

KEYS = Criteria.from_file().keys
GOOD = {f"{index}": f"caption {index} of a" for index in range(6)}
OTHER = {f"{index}": f"caption {index} of b" for index in range(6)}


def verdict(value):
    return json.dumps(dict.fromkeys(KEYS, value))


def prefers_a(body):
    """The model whose captions end with "of a" wins, wherever it stands."""
    text = body["messages"][0]["content"]
    text = text if isinstance(text, str) else text[0]["text"]
    return verdict("A" if re.search(r"Caption A:\ncaption \d of a", text) else "B")


class Stub:
    """An endpoint on this machine; `reply(number, body)` gives (status, headers, text) or the text of an answer."""

    def __init__(self, reply):
        self.bodies, self.keys = [], []
        stub, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.bodies.append(body)
                    stub.keys.append(self.headers.get("Authorization"))
                    number = len(stub.bodies)
                said = reply(number, body)
                status, headers, text = (
                    said
                    if isinstance(said, tuple)
                    else (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}))
                )
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:  # the client gave up
                    pass

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown(), self.server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def judge(folder, url=None, a=GOOD, b=OTHER, **flags):
    for name, captions in (("a", a), ("b", b)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"image_id": key, "caption": text}) + "\n" for key, text in captions.items())
        )
    values = (
        dict(
            captions_a=folder / "a.jsonl",
            captions_b=folder / "b.jsonl",
            answers=folder / "answers.jsonl",
            output=folder / "out.json",
            backoff=0.01,
            workers=2,
            model="stub",
            endpoint=url,
            retries=3,
        )
        | flags
    )
    evaluate.main(["judge", *(f"--{name}={value}" for name, value in values.items() if value is not None)])
    return json.loads((folder / "out.json").read_text())


def result(folder):
    return json.loads((folder / "out.json").read_text())


def test_both_orders_are_asked_and_the_better_model_wins(tmp_path, capsys):
    with Stub(lambda number, body: prefers_a(body)) as stub:
        found = judge(tmp_path, stub.url, names="UAE,other")
    assert len(stub.bodies) == 12 and set(stub.keys) == {"Bearer secret"}
    assert all(body["model"] == "stub" and body["temperature"] == 0 for body in stub.bodies)
    assert {(record["image_id"], record["order"]) for record in read_records(tmp_path / "answers.jsonl")} == {
        (name, order) for name in GOOD for order in ("ab", "ba")
    }
    assert (found["a"], found["b"], found["n_valid"], found["answers"]["valid"]) == ("UAE", "other", 6, 12)
    for key in KEYS:
        entry = found["scores"][key]
        assert (entry["win"]["value"], entry["loss"]["value"], entry["consistency"], entry["first_rate"]) == (
            1,
            0,
            1,
            0.5,
        )
    assert "overall" in capsys.readouterr().out and "secret" not in (tmp_path / "answers.jsonl").read_text()


def test_a_judge_that_likes_what_comes_first_decides_nothing(tmp_path):
    with Stub(lambda number, body: verdict("A")) as stub:
        entry = judge(tmp_path, stub.url)["scores"]["overall"]
    assert (entry["tie"]["value"], entry["win_rate"]["value"], entry["consistency"], entry["first_rate"]) == (
        1,
        0.5,
        0,
        1,
    )


def test_images_are_shown_small(tmp_path):
    (tmp_path / "images").mkdir()
    for name in GOOD:
        Image.new("RGB", (300, 200), "red").save(tmp_path / "images" / f"{name}.png")
    with Stub(lambda number, body: prefers_a(body)) as stub:
        judge(tmp_path, stub.url, images=tmp_path / "images", image_side=64)
    content = stub.bodies[0]["messages"][0]["content"]
    assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,") and "attached" in content[0]["text"]
    with pytest.raises(SystemExit, match="^error: .*has no image 0"):
        (tmp_path / "images" / "0.png").unlink()
        judge(tmp_path, "http://127.0.0.1:1/v1", images=tmp_path / "images")


@pytest.mark.parametrize(
    "trouble",
    [(429, {"Retry-After": "0"}, "slow down"), (503, {}, "busy"), (500, {}, ""), (200, {}, "<html>proxy</html>")],
)
def test_passing_trouble_is_retried(trouble, tmp_path):
    asked = Counter()

    def reply(number, body):
        asked[body["messages"][0]["content"]] += 1
        return prefers_a(body) if asked[body["messages"][0]["content"]] > 1 else trouble

    with Stub(reply) as stub:
        found = judge(tmp_path, stub.url)
    assert found["n_valid"] == 6 and len(stub.bodies) == 24


def test_a_stalled_answer_is_timed_out_and_asked_again(tmp_path):
    def reply(number, body):
        if number == 1:
            time.sleep(60)
        return prefers_a(body)

    with Stub(reply) as stub:
        found = judge(tmp_path, stub.url, timeout=1, workers=1)
    assert found["n_valid"] == 6 and len(stub.bodies) >= 13 and stub.bodies[0] in stub.bodies[1:]


def test_malformed_answers_are_asked_again_counted_and_mended_by_the_next_run(tmp_path):
    asked = Counter()

    def reply(number, body):
        text = body["messages"][0]["content"]
        asked[text] += 1
        if "caption 2 of a" in text:
            return "I would rather not say."
        return (
            "Sure:\n```json\n" + prefers_a(body) + "\n```"
            if asked[text] > 1 or "caption 3" not in text
            else '{"overall": "A"}'
        )

    with Stub(reply) as stub:
        with pytest.raises(
            SystemExit, match=r"^error: 1 of 6 pairs have no judgement \(2 malformed, 0 refused and 0 missing"
        ):
            judge(tmp_path, stub.url)
        assert len(stub.bodies) == 12 + 4  # those of images 2 and 3 twice
    found = result(tmp_path)
    assert found["answers"] == dict(valid=10, malformed=2, refused=0, missing=0) and found["n_valid"] == 5
    with Stub(lambda number, body: prefers_a(body)) as stub:
        assert judge(tmp_path, stub.url)["n_valid"] == 6
        assert len(stub.bodies) == 2


def test_an_endpoint_that_is_down_is_told_and_the_answers_so_far_are_kept(tmp_path):
    with Stub(lambda number, body: prefers_a(body) if number <= 5 else (503, {}, "going down")) as stub:
        with pytest.raises(
            SystemExit,
            match=r"^error: endpoint .* gives no answer after 2 attempts \(status 503: going down\); 5 of 12 answers "
            r"are kept",
        ):
            judge(tmp_path, stub.url, retries=1)
    assert result(tmp_path)["answers"]["valid"] == len(read_records(tmp_path / "answers.jsonl")) == 5
    with pytest.raises(SystemExit, match="no connection.*5 of 12 answers are kept in .*the same command continues"):
        judge(tmp_path, stub.url, retries=1)  # nothing listens there any more
    with Stub(lambda number, body: prefers_a(body)) as stub:
        assert judge(tmp_path, stub.url)["n_valid"] == 6 and len(stub.bodies) == 7


def test_a_wrong_key_ends_at_once_and_a_refused_question_does_not(tmp_path):
    with Stub(lambda number, body: (401, {}, "bad key")) as stub:
        with pytest.raises(SystemExit, match="status 401: bad key.*is the API key right"):
            judge(tmp_path, stub.url, workers=1)
        assert len(stub.bodies) == 1
    with Stub(
        lambda number, body: (
            (400, {}, "policy") if "caption 1 of a" in body["messages"][0]["content"] else prefers_a(body)
        )
    ) as stub:
        with pytest.raises(SystemExit, match="1 of 6 pairs have no judgement .0 malformed, 2 refused"):
            judge(tmp_path, stub.url)
    (tmp_path / "answers.jsonl").unlink()
    with Stub(lambda number, body: (400, {}, "no such field")) as stub:
        with pytest.raises(SystemExit, match="refused the first 5 questions.*no such field"):
            judge(tmp_path, stub.url, workers=1)
        assert len(stub.bodies) == 5


def test_questions_and_saved_answers_without_an_endpoint(tmp_path):
    judge_only = dict(model=None, names="a,b")
    (tmp_path / "out.json").write_text("{}")
    judge(tmp_path, questions=tmp_path / "questions.jsonl", **judge_only)
    questions = read_records(tmp_path / "questions.jsonl")
    assert len(questions) == 12
    answers = [{"image_id": q["image_id"], "order": q["order"], "answer": prefers_a(q)} for q in questions]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert judge(tmp_path, **judge_only)["scores"]["overall"]["win"]["value"] == 1
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers[1:]))
    with pytest.raises(SystemExit, match="1 of 6 pairs have no judgement .0 malformed, 0 refused and 1 missing"):
        judge(tmp_path, **judge_only)
    assert result(tmp_path)["scores"]["overall"]["win"]["n"] == 5


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(b={"9": "other picture"}), "have no image in common"),
        (dict(model=None), "--endpoint needs --model"),
        (dict(answers=None), "give --answers and --output"),
        (dict(request_fields="{"), "--request_fields={ is not JSON"),
        (dict(api_key_env="NO_SUCH_KEY"), "NO_SUCH_KEY .* is not set"),
        (dict(workers=0), "--workers is 0; it must be at least 1"),
        (dict(criteria="nothing.json"), "nothing.json does not exist"),
        (dict(b={"0": " "}), "record 1 needs"),
        (dict(url="localhost"), "is not an address"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        judge(tmp_path, **{"url": "http://127.0.0.1:1/v1", "retries": 0} | flags)


def test_answers_to_other_captions_are_not_mixed_in(tmp_path):
    with Stub(lambda number, body: prefers_a(body)) as stub:
        judge(tmp_path, stub.url)
        with pytest.raises(SystemExit, match="answers other captions, criteria or images; give another --answers"):
            judge(tmp_path, stub.url, a=GOOD | {"0": "a changed caption"})
        with pytest.raises(SystemExit, match="is of judge 'stub', not 'another'"):
            judge(tmp_path, stub.url, model="another")
        with pytest.raises(SystemExit, match="1 images have a caption of one model alone"):
            judge(tmp_path, stub.url, a=GOOD | {"7": "more"})


@pytest.mark.parametrize(
    "answer, valid",
    [
        (verdict("A"), True),
        ("<think>{maybe}</think> " + verdict("tie") + " Done.", True),
        (verdict("Caption b"), True),
        (verdict("C"), False),
        ("", False),
        ('{"overall": "A"}', False),
        ("[" + verdict("A"), True),
        (verdict("A")[:-5], False),
    ],
)
def test_answers_are_read_strictly(answer, valid):
    assert (Criteria.from_file().parse(answer) is not None) == valid


def test_tally_counts_a_win_only_when_both_orders_agree():
    def said(first, second):
        return {"ab": {"overall": first}, "ba": {"overall": second}}

    verdicts = {
        "win": said("A", "B"),
        "loss": said("B", "A"),
        "swayed": said("A", "A"),
        "half": said("A", "tie"),
        "even": said("tie", "tie"),
        "one answer": {"ab": {"overall": "A"}},
    }
    entry = tally(["overall"], verdicts)["overall"]
    assert [entry[name]["value"] for name in ("win", "tie", "loss", "win_rate")] == pytest.approx([0.2, 0.6, 0.2, 0.5])
    assert (
        entry["win"]["n"] == 5
        and entry["consistency"] == pytest.approx(0.6)
        and entry["first_rate"] == pytest.approx(5 / 7)
    )
    assert tally(["overall"], {}) == {}


def test_questions_are_shuffled_by_the_seed_and_hold_the_captions_as_they_are():
    criteria = Criteria.from_file()
    make = lambda seed: make_questions(
        criteria, {"x": "a {keys} b", "y": "1"}, {"x": "{caption_a}", "y": "2"}, {}, seed
    )  # noqa: E731
    assert make(0) == make(0) and len({tuple((q.image_id, q.order) for q in make(seed)) for seed in range(9)}) > 1
    text = next(q.text for q in make(0) if (q.image_id, q.order) == ("x", "ab"))
    assert "Caption A:\na {keys} b\n\nCaption B:\n{caption_a}\n" in text and "not shown" in text


# ---- the paper's protocol ----

NAMES = ScoredCriteria.from_file().names
POINTS = {"A": dict.fromkeys(NAMES, 8), "B": dict(zip(NAMES, (9, 8, 3)))}
SCORED = {**POINTS, "comparison": "A says 'red', B nothing", "winner": "A"}


def test_the_papers_question_has_its_criteria_its_scale_and_no_tie():
    criteria = ScoredCriteria.from_file()
    assert NAMES == ("comprehensiveness", "fluency", "insight")
    text = criteria.text("{keys} of a", "caption of b", has_image=True)
    assert "{keys} of a" in text and "{scores}" not in text and "1 (poor) to 10 (excellent)" in text
    assert "a tie is not allowed" in text and all(f"- {name}: " in text for name in NAMES)
    shown = text[text.index('{"A": ') :].replace('"A" or "B"}', '"A"}')
    assert criteria.parse(shown) is not None  # the form that is asked for is one that is read


@pytest.mark.parametrize(
    "changes, valid",
    [
        ({}, True),
        ({"winner": "tie"}, False),
        ({"winner": None}, False),
        ({"winner": "A or B"}, False),
        ({"winner": "a"}, False),
        ({"comparison": " "}, False),
        ({"A": POINTS["A"] | {"fluency": 11}}, False),
        ({"A": POINTS["A"] | {"fluency": 0}}, False),
        ({"A": POINTS["A"] | {"fluency": 7.5}}, False),
        ({"A": POINTS["A"] | {"fluency": True}}, False),
        ({"A": POINTS["A"] | {"text": 5}}, False),
        ({"B": {"fluency": 5}}, False),
        ({"B": "8/10"}, False),
    ],
)
def test_the_papers_answers_are_read_strictly(changes, valid):
    found = ScoredCriteria.from_file().parse("Here it is: " + json.dumps(SCORED | changes))
    assert (found is not None) == valid
    if found:
        assert found == {
            "comprehensiveness": "B",
            "fluency": "tie",
            "insight": "A",
            "overall": "A",
            "scores": POINTS,
        }


def test_two_winners_in_one_answer_are_no_winner():
    criteria = ScoredCriteria.from_file()
    assert criteria.parse(json.dumps(SCORED) * 2) == criteria.parse(json.dumps(SCORED))
    assert criteria.parse(json.dumps(SCORED) + json.dumps(SCORED | {"winner": "B"})) is None


def test_the_papers_protocol_counts_winners_and_points_and_asks_again_after_a_tie(tmp_path, capsys):
    def reply(number, body):
        text = body["messages"][0]["content"]
        first = bool(re.search(r"Caption A:\ncaption \d of a", text))
        good, poor = dict.fromkeys(NAMES, 9), dict.fromkeys(NAMES, 4)
        points = {"A": good if first else poor, "B": poor if first else good}
        winner = "tie" if number == 1 else "A" if first else "B"
        return json.dumps({**points, "comparison": "the one says more", "winner": winner})

    with Stub(reply) as stub:
        found = judge(tmp_path, stub.url, protocol="paper_v5", workers=1)
    assert len(stub.bodies) == 13 and found["answers"]["valid"] == 12 and found["protocol"] == "paper_v5"
    assert found["scores"]["overall"]["win_rate"]["value"] == 1 and found["scores"]["overall"]["tie"]["value"] == 0
    assert found["points"].keys() == set(NAMES)
    assert all((both["a"]["value"], both["b"]["value"]) == (9, 4) for both in found["points"].values())
    assert "points from 1 to 10: a 9.00  b 4.00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="answers other captions, criteria or images"):
        judge(tmp_path, stub.url)  # the other protocol asked other questions
