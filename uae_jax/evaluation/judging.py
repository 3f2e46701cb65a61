"""The judge of captions: its questions, its endpoint, its verdicts, and their tally."""

import base64
import dataclasses
import hashlib
import io
import json
import pathlib
import random
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from PIL import Image

from uae_jax.evaluation.pairs import read_rgb
from uae_jax.files.json_files import read_text
from uae_jax.training.summary import interval

ORDERS = ("ab", "ba")  # the models whose captions are A and B
OVERALL = "overall"
OUTCOMES = ("win", "tie", "loss")  # of model a
TRANSIENT = (408, 409, 425, 429)  # and 5xx
REFUSED = (400, 413, 422)  # of this one question
LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclasses.dataclass(frozen=True)
class Criteria:
    """The question to a judge and its criteria, from a JSON file such as `judge_criteria.json`."""

    instruction: str
    with_image: str
    without_image: str
    criteria: tuple[tuple[str, str], ...]

    @classmethod
    def from_file(cls, path: pathlib.Path | None = None) -> "Criteria":
        """Reads the criteria of a file; None for those of the package.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is not JSON, or lacks a field.
        """
        path = path or pathlib.Path(__file__).with_name("judge_criteria.json")
        if not path.is_file():
            raise FileNotFoundError(f"criteria file {path} does not exist")
        try:
            raw = json.loads(read_text(path))
            listed = tuple((item["name"], item["question"]) for item in raw["criteria"])
            found = cls(raw["instruction"], raw["with_image"], raw["without_image"], listed)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold criteria ({type(error).__name__}: {error}); copy the package's "
                "judge_criteria.json"
            ) from error
        names = [name for name, _ in listed]
        if not names or len(set(names)) != len(names) or OVERALL in names:
            raise ValueError(f"{path} needs criteria with different names, none of them {OVERALL!r}; it has {names}")
        return found

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of an answer: every criterion, and `overall`."""
        return (*(name for name, _ in self.criteria), OVERALL)

    def text(self, caption_a: str, caption_b: str, has_image: bool) -> str:
        """The question in words; braces inside of captions stay as they are."""
        listed = "\n".join(f"- {name}: {question}" for name, question in self.criteria)
        keys = ", ".join(f'"{key}"' for key in self.keys)
        parts = {
            "image_note": self.with_image if has_image else self.without_image,
            "criteria": listed,
            "keys": keys,
            "caption_a": caption_a,
            "caption_b": caption_b,
        }
        return re.sub(
            r"\{(image_note|criteria|keys|caption_a|caption_b)\}", lambda match: parts[match[1]], self.instruction
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: the image, the order of its captions, the text, and the image file to attach."""

    image_id: str
    order: str
    text: str
    image: pathlib.Path | None = None

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the text: they differ for other captions or criteria."""
        return hashlib.sha256(f"{self.text}\0{self.image is not None}".encode()).hexdigest()[:16]

    def messages(self, side: int) -> list[dict[str, Any]]:
        """Chat messages; the longest side of the attached image is at most `side` pixels."""
        if self.image is None:
            return [{"role": "user", "content": self.text}]
        image, data = read_rgb(self.image), io.BytesIO()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(data, "JPEG", quality=92)
        url = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        return [
            {
                "role": "user",
                "content": [{"type": "text", "text": self.text}, {"type": "image_url", "image_url": {"url": url}}],
            }
        ]


def make_questions(
    criteria: Criteria,
    captions_a: Mapping[str, str],
    captions_b: Mapping[str, str],
    files: Mapping[str, pathlib.Path],
    seed: int,
) -> list[Question]:
    """Two questions for each image that both models captioned, one in each order, shuffled.

    Args:
      criteria: the question and its criteria.
      captions_a, captions_b: {image: caption}.
      files: {image: file}; empty to show no images.
      seed: of the shuffling.
    """
    questions = []
    for name in sorted(captions_a.keys() & captions_b.keys()):
        for order in ORDERS:
            first, second = (captions_a, captions_b) if order == "ab" else (captions_b, captions_a)
            questions.append(
                Question(name, order, criteria.text(first[name], second[name], name in files), files.get(name))
            )
    random.Random(seed).shuffle(questions)
    return questions


class EndpointError(ConnectionError):
    """The endpoint is down, busy for too long, or refuses the key, model or address."""


class QuestionRefused(ValueError):
    """The endpoint refuses this one question; others may pass."""


@dataclasses.dataclass(frozen=True)
class ChatEndpoint:
    """An OpenAI-compatible chat endpoint with time-outs and retries.

    Attributes:
      url: such as `https://api.openai.com/v1`, or the whole address ending with `/chat/completions`.
      model: its name there.
      key: bearer token; empty for none.
      timeout: seconds without a byte of the answer after which an attempt ends.
      retries: attempts after the first, for a time-out, a lost connection, status 429 or 5xx.
      backoff: seconds before the first retry, doubled each time; a `Retry-After` header takes precedence.
      fields: further fields of the request, such as {"temperature": 0}; None leaves a field out.
      stop: when set, waiting ends and no further attempt is made.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of the first choice; "" if the choice has no text.

        Raises:
          EndpointError: no answer after all attempts, or a status that a retry would not change.
          QuestionRefused: status 400, 413 or 422.
        """
        trouble = "it was stopped"
        for attempt in range(self.retries + 1):
            if self.stop.is_set():
                break
            try:
                response = self._post(messages)
            except (
                requests.exceptions.InvalidURL,
                requests.exceptions.MissingSchema,
                requests.exceptions.InvalidSchema,
            ) as error:
                raise EndpointError(
                    f"endpoint {self.url} is not an address ({error}); give one such as http://localhost:8000/v1"
                ) from error
            except requests.RequestException as error:
                trouble, wait = _reason(error), None
            else:
                if response.status_code == 200:
                    text = _content(response)
                    if text is not None:
                        return text
                    trouble, wait = f"its answer is not a chat completion: {_excerpt(response)}", None
                elif response.status_code in TRANSIENT or response.status_code >= 500:
                    trouble, wait = f"status {response.status_code}: {_excerpt(response)}", _retry_after(response)
                else:
                    self._refuse(response)
            if attempt < self.retries:
                self.stop.wait(min(self.backoff * 2**attempt if wait is None else wait, LONGEST_WAIT))
        raise EndpointError(f"endpoint {self.url} gives no answer after {self.retries + 1} attempts ({trouble})")

    def _post(self, messages: Sequence[Mapping[str, Any]]) -> requests.Response:
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        body = {"model": self.model, "messages": list(messages), **self.fields}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return requests.post(
            url,
            json={name: value for name, value in body.items() if value is not None},
            headers=headers,
            timeout=self.timeout,
        )

    def _refuse(self, response: requests.Response) -> None:
        said = f"status {response.status_code}: {_excerpt(response)}"
        if response.status_code in REFUSED:
            raise QuestionRefused(f"the endpoint refused the question ({said})")
        hint = {401: "is the API key right?", 403: "may this key use the model?", 404: "are address and model right?"}
        raise EndpointError(
            f"endpoint {self.url} cannot be used ({said}); "
            f"{hint.get(response.status_code, 'look at its documentation')}"
        )


def _content(response: requests.Response) -> str | None:
    """The text of the first choice; None if the body is no chat completion."""
    try:
        return str(response.json()["choices"][0]["message"].get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _excerpt(response: requests.Response) -> str:
    return " ".join(response.text.split())[:200] or "no text"


def _retry_after(response: requests.Response) -> float | None:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:  # absent, or a date
        return None


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "time-out"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)


def parse_verdict(keys: Sequence[str], answer: str) -> dict[str, str] | None:
    """Reads an answer: {key: "A", "B" or "tie"} for all keys, or None for a malformed answer.

    The JSON object may be in a code block or between sentences.
    """
    for start in (match.start() for match in re.finditer(r"\{", answer)):
        try:
            raw, _ = json.JSONDecoder().raw_decode(answer[start:])
        except ValueError:
            continue
        said = {key: re.sub(r"^caption\s+", "", str(raw.get(key, "")).strip(), flags=re.I).lower() for key in keys}
        if all(value in ("a", "b", "tie") for value in said.values()):
            return {key: value if value == "tie" else value.upper() for key, value in said.items()}
    return None


def _points(verdict: Mapping[str, str], key: str, order: str) -> int:
    """1 for a win of model a, -1 for a win of model b, 0 for a tie."""
    if verdict[key] == "tie":
        return 0
    return 1 if (verdict[key] == "A") == (order == "ab") else -1


def tally(keys: Sequence[str], verdicts: Mapping[str, Mapping[str, Mapping[str, str]]]) -> dict[str, Any]:
    """Win, tie and loss of model a against model b.

    A win must hold in both orders; two answers that disagree count as a tie (MT-Bench, arXiv 2306.05685, section 3.4).

    Args:
      keys: of the answers.
      verdicts: {image: {order: verdict of `parse_verdict`}}; only images with both orders count.

    Returns:
      {key: {"win", "tie", "loss", "win_rate" (a tie counts half): {value, n, low, high}; "consistency": share of images
      whose two answers agree; "first_rate": share of decided answers for the caption shown first}}; {} without images.
    """
    whole = {name: answers for name, answers in verdicts.items() if set(answers) == set(ORDERS)}
    if not whole:
        return {}
    table = {}
    for key in keys:
        points = [tuple(_points(answers[order], key, order) for order in ORDERS) for answers in whole.values()]
        results = [OUTCOMES[1 - a] if a == b else "tie" for a, b in points]
        decided = [
            answers[order][key] == "A" for answers in whole.values() for order in ORDERS if answers[order][key] != "tie"
        ]
        table[key] = {
            **{outcome: interval([result == outcome for result in results]) for outcome in OUTCOMES},
            "win_rate": interval([1.0 - OUTCOMES.index(result) / 2 for result in results]),
            "consistency": sum(a == b for a, b in points) / len(points),
            "first_rate": sum(decided) / len(decided) if decided else None,
        }
    return table
