"""Unified-Bench, protocol 2: a language model compares the captions of two models for the same images.

    export OPENAI_API_KEY=...
    python -m uae_jax.evaluate judge --captions_a=uae.jsonl --captions_b=other.jsonl --images=originals \\
        --endpoint=https://api.openai.com/v1 --model=gpt-4o --answers=answers.jsonl --output=judged.json

Caption files have lines {"image_id": ..., "caption": ...}. Each pair of captions is judged twice, once in each order,
and a win must hold in both. Every answer is appended to --answers at once. The same command continues an interrupted
run and asks again where an answer is missing or malformed. Without --endpoint, --answers holds saved answers, lines
{"image_id", "order", "answer"}. --questions writes the questions for another tool.

--protocol=pairwise asks for a winner or a tie on seven criteria and overall. --protocol=paper_v5 is the paper's: points
from 1 to 10 on three criteria, then one winner without ties.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from uae_jax.command_line import in_range
from uae_jax.files.json_files import read_objects, read_records, write_json, write_json_lines
from uae_jax.files.paths import to_path
from uae_jax.settings import LAST_SEED

if TYPE_CHECKING:
    from uae_jax.evaluation.judge_protocols import Criteria, Verdict

FIRST_REFUSALS = 5  # refusals before any answer, after which the run ends: the endpoint refuses every question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--captions_a", required=True, metavar="FILE", help="captions of model a, whose wins are counted"
    )
    parser.add_argument("--captions_b", required=True, metavar="FILE", help="captions of model b")
    parser.add_argument("--names", metavar="A,B", help="names of the models (default: names of the files)")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images shown to the judge (default: captions alone)"
    )
    parser.add_argument(
        "--image_side",
        **in_range(int, low=1),
        default=1024,
        metavar="N",
        help="longest side of a shown image in pixels",
    )
    parser.add_argument(
        "--protocol",
        choices=("pairwise", "paper_v5"),
        default="pairwise",
        help="this project's comparison, or the paper's points and one winner",
    )
    parser.add_argument(
        "--criteria",
        type=to_path,
        metavar="FILE",
        help="JSON with the question and its criteria (default: the package's, of the protocol)",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="OpenAI-compatible, such as https://api.openai.com/v1 or http://localhost:8000/v1",
    )
    parser.add_argument("--model", metavar="NAME", help="name of the judge at the endpoint")
    parser.add_argument(
        "--api_key_env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the API key",
    )
    parser.add_argument(
        "--request_fields",
        default='{"temperature": 0}',
        metavar="JSON",
        help="further fields of each request",
    )
    parser.add_argument(
        "--timeout",
        default=120.0,
        metavar="SECONDS",
        help="time-out of one attempt",
        **in_range(float, above=0, high=86_400),
    )
    parser.add_argument(
        "--retries",
        default=5,
        metavar="N",
        help="retries after time-outs, status 429 and 5xx",
        **in_range(int, low=0, high=1000),
    )
    parser.add_argument(
        "--backoff",
        **in_range(float, low=0, high=86_400),
        default=1.0,
        metavar="SECONDS",
        help="wait before the first retry, doubled each time",
    )
    parser.add_argument(
        "--malformed_retries",
        **in_range(int, low=0, high=1000),
        default=1,
        metavar="N",
        help="how often a question with a malformed answer is asked again",
    )
    parser.add_argument(
        "--workers", default=4, metavar="N", help="parallel requests", **in_range(int, low=1, high=1024)
    )
    parser.add_argument(
        "--seed", default=0, help="random seed of the order of questions", **in_range(int, low=0, high=LAST_SEED)
    )
    parser.add_argument("--answers", type=to_path, metavar="FILE", help="JSON lines of answers, appended or read")
    parser.add_argument("--questions", type=to_path, metavar="FILE", help="write the questions as JSON lines and stop")
    parser.add_argument("--output", type=to_path, metavar="FILE", help="the result, JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Asks the questions without a valid answer, and writes the result.

    Raises:
      ValueError: bad flags, captions or criteria; or, after the result is written, pairs without a judgement.
      FileNotFoundError: a file is missing.
      OSError: the endpoint cannot be used; earlier answers are kept and counted in the result.
    """
    from uae_jax.evaluation.judge_protocols import PROTOCOLS
    from uae_jax.evaluation.judging import make_questions
    from uae_jax.evaluation.pairs import image_files, read_captions, renamed_alike

    if not options.questions and not (options.answers and options.output):
        raise ValueError("give --answers and --output, or --questions to write the questions alone")
    if options.endpoint and not options.model:
        raise ValueError("--endpoint needs --model, the judge's name there")
    criteria = PROTOCOLS[options.protocol].from_file(options.criteria)
    captions_a = read_captions(options.captions_a)
    captions_b = renamed_alike(read_captions(options.captions_b), captions_a)
    shared = sorted(captions_a.keys() & captions_b.keys())
    if not shared:
        raise ValueError(
            f"{options.captions_a} and {options.captions_b} have no image in common; their image_id must agree"
        )
    # either file may tell the image's path
    told = {name: captions_a[name] if captions_a[name].image else captions_b[name] for name in shared}
    files = image_files(options.images, told) if options.images else {}
    texts_a, texts_b = ({name: captions[name].caption for name in shared} for captions in (captions_a, captions_b))
    questions = make_questions(criteria, texts_a, texts_b, files, options.seed)
    if options.questions:
        _write_questions(options.questions, questions, options.image_side)
        return
    trouble = None
    try:
        _answer(options, criteria, questions)
    except (OSError, KeyboardInterrupt) as error:
        trouble = error
    single = sorted(captions_a.keys() ^ captions_b.keys())
    result = _result(options, criteria, questions, single)
    _print(result, options)
    if trouble is not None:
        answered = sum(result["answers"][name] for name in ("valid", "malformed"))
        kept = f"{answered} of {len(questions)} answers are kept in {options.answers}; the same command continues"
        raise trouble if isinstance(trouble, KeyboardInterrupt) else ConnectionError(f"{trouble}; {kept}")
    if result["n_valid"] < result["n_images"] or single:
        raise ValueError(
            f"{result['n_images'] - result['n_valid']} of {result['n_images']} pairs have no judgement "
            f"({result['answers']['malformed']} malformed, "
            f"{result['answers']['refused']} refused and {result['answers']['missing']} missing answers), and "
            f"{len(single)} images have a caption of "
            f"one model alone; the rest is in {options.output}"
        )


def _write_questions(path: pathlib.Path, questions: Sequence, side: int) -> None:
    lines, problems = [], []
    for asked in questions:
        try:
            messages = asked.messages(side)
        except ValueError as error:  # an unreadable image; the other questions are still written
            problems.append(str(error))
            continue
        place = {"image_id": asked.image_id, "order": asked.order, "question": asked.fingerprint}
        lines.append(place | {"messages": messages})
    write_json_lines(path, lines)
    print(f"{len(lines)} questions: {path}")
    if problems:
        raise ValueError(f"{len(problems)} questions are not written: {'; '.join(sorted(set(problems))[:3])}")


def _answer(options: argparse.Namespace, criteria: "Criteria", questions: Sequence) -> None:
    """Asks the questions without a valid answer in parallel; every answer is written at once."""
    from uae_jax.evaluation.judging import ChatEndpoint
    from uae_jax.evaluation.records import RecordLog

    if not options.endpoint:
        return
    endpoint = ChatEndpoint(
        options.endpoint,
        options.model,
        _key(options),
        options.timeout,
        options.retries,
        options.backoff,
        _fields(options.request_fields),
    )
    verdicts = _verdicts(options, criteria, questions)[0]
    missing = [question for question in questions if question.order not in verdicts.get(question.image_id, {})]
    with RecordLog(options.answers) as log, concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        asker = _Asker(options, criteria, endpoint, log)
        futures = [pool.submit(asker.ask, question) for question in missing]
        try:
            for future in tqdm(
                concurrent.futures.as_completed(futures), total=len(futures), desc=options.model, disable=None
            ):
                future.result()
                if asker.trouble:
                    raise asker.trouble
        finally:
            endpoint.stop.set()
            pool.shutdown(cancel_futures=True)


class _Asker:
    """Asks questions from threads and writes the answers; `trouble` is the error of an unusable endpoint, or None."""

    def __init__(self, options: argparse.Namespace, criteria: "Criteria", endpoint: Any, log: Any):
        self.options, self.criteria, self.endpoint, self.log = options, criteria, endpoint, log
        self.lock = threading.Lock()
        self.answered, self.refused = 0, 0
        self.trouble: Exception | None = None

    def ask(self, question: Any) -> None:
        """Writes the first well-formed answer, or the last malformed answer, or the reason of a refusal."""
        from uae_jax.evaluation.judging import EndpointError, QuestionRefused

        if self.endpoint.stop.is_set():
            return
        record = {
            "image_id": question.image_id,
            "order": question.order,
            "judge": self.options.model,
            "question": question.fingerprint,
        }
        try:
            messages = question.messages(self.options.image_side)
            for attempt in range(self.options.malformed_retries + 1):
                record |= {"answer": self.endpoint.ask(messages), "attempts": attempt + 1}
                if self.criteria.parse(record["answer"]):
                    break
        except QuestionRefused as error:
            record["error"] = str(error)
        except EndpointError as error:
            self._stop(error)
            if "answer" not in record:  # else an earlier attempt gave a malformed answer
                return
        except ValueError as error:  # an unreadable image
            record["error"] = str(error)
        self._write(record)
        if self.refused >= FIRST_REFUSALS and not self.answered:
            self._stop(
                EndpointError(
                    f"endpoint {self.endpoint.url} refused the first {self.refused} questions: {record.get('error')}"
                )
            )

    def _stop(self, error: Exception) -> None:
        """Ends all further attempts; keeps the first error."""
        with self.lock:
            self.trouble = self.trouble or error
        self.endpoint.stop.set()

    def _write(self, record: Mapping[str, Any]) -> None:
        with self.lock:
            self.log.append(record)
            self.refused, self.answered = self.refused + ("error" in record), self.answered + ("error" not in record)


def _key(options: argparse.Namespace) -> str:
    key = os.environ.get(options.api_key_env, "")
    if not key and options.api_key_env != "OPENAI_API_KEY":
        raise ValueError(
            f"the environment variable {options.api_key_env} of --api_key_env is not set; set it to the key"
        )
    return key


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--request_fields={text} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--request_fields={text} is not a JSON object")
    return fields


def _verdicts(
    options: argparse.Namespace, criteria: "Criteria", questions: Sequence
) -> tuple[dict[str, dict[str, "Verdict"]], Counter]:
    """{image: {order: verdict}} of the last valid answers, and the counts of valid, malformed, refused and missing.

    Raises:
      FileNotFoundError: the saved answers do not exist.
      ValueError: an answer to an unknown question, of another judge, or to other captions or criteria.
    """
    known = {(question.image_id, question.order): question for question in questions}
    verdicts: dict[str, dict[str, Verdict]] = {}
    kinds = dict.fromkeys(known, "missing")
    if not options.endpoint:  # a person's file, of which no line is passed over
        records = read_objects(options.answers, {}, "give the file of the answers")
    else:
        records = read_records(options.answers) if options.answers.is_file() else []
    for number, record in enumerate(records, 1):
        place = (str(record.get("image_id")), str(record.get("order")))
        if place not in known:
            raise ValueError(
                f"{options.answers} record {number} answers image {place[0]!r} in order {place[1]!r}, which was not "
                "asked; give another --answers"
            )
        if record.get("question", known[place].fingerprint) != known[place].fingerprint:
            raise ValueError(
                f"{options.answers} record {number} answers other captions, criteria or images; give another --answers"
            )
        if options.model and record.get("judge", options.model) != options.model:
            raise ValueError(
                f"{options.answers} record {number} is of judge {record['judge']!r}, not {options.model!r}; give "
                "another --answers"
            )
        verdict = criteria.parse(str(record.get("answer", "")))
        if verdict:
            verdicts.setdefault(place[0], {})[place[1]] = verdict
        if kinds[place] != "valid":
            kinds[place] = "valid" if verdict else "refused" if "error" in record else "malformed"
    return verdicts, Counter(kinds.values())


def _result(
    options: argparse.Namespace, criteria: "Criteria", questions: Sequence, single: Sequence[str]
) -> dict[str, Any]:
    """The result of the answers so far, written to --output."""
    from uae_jax.evaluation.judging import mean_points, tally

    verdicts, counts = _verdicts(options, criteria, questions)
    names = (
        options.names.split(",")
        if options.names
        else [pathlib.Path(path).stem for path in (options.captions_a, options.captions_b)]
    )
    result = {
        "judge": options.model or "saved answers",
        "protocol": options.protocol,
        "a": names[0],
        "b": names[-1],
        "n_images": len(questions) // 2,
        "n_valid": sum(len(orders) == 2 for orders in verdicts.values()),
        "answers": {name: counts[name] for name in ("valid", "malformed", "refused", "missing")},
        "scores": tally(criteria.keys, verdicts),
        **({"points": mean_points(criteria.names, verdicts)} if options.protocol == "paper_v5" else {}),
        "captioned_by_one_model": list(single),
        "verdicts": verdicts,
    }
    write_json(options.output, result)
    return result


def _print(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    print(
        f"{result['a']} against {result['b']}, judged by {result['judge']}: {result['n_valid']} of "
        f"{result['n_images']} images"
    )
    for key, entry in result["scores"].items():
        shares = "  ".join(
            f"{name} {entry[name]['value']:.3f} [{entry[name]['low']:.3f}, {entry[name]['high']:.3f}]"
            for name in ("win", "tie", "loss")
        )
        print(f"{key:16} {shares}  agrees with itself {entry['consistency']:.3f}")
    for key, both in result.get("points", {}).items():
        points = "  ".join(f"{result[model]} {entry['value']:.2f}" for model, entry in both.items())
        print(f"{key:18} points from 1 to 10: {points}")
    print(f"result: {options.output}")
