"""The judge of captions: its questions, its endpoint, and the tally of its verdicts."""

import base64
import dataclasses
import hashlib
import io
import pathlib
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from PIL import Image

from uae_jax.evaluation.judge_protocols import Criteria, Verdict, points_of
from uae_jax.evaluation.pairs import read_rgb
from uae_jax.training.summary import interval

ORDERS = ("ab", "ba")  # the models whose captions are A and B
OUTCOMES = ("win", "tie", "loss")  # of model a
TRANSIENT = (408, 409, 425, 429)  # and 5xx
REFUSED = (400, 413, 422)  # of this one question
LONGEST_WAIT = 60.0  # seconds between two attempts


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


def _points(verdict: Verdict, key: str, order: str) -> int:
    """1 for a win of model a, -1 for a win of model b, 0 for a tie."""
    if verdict[key] == "tie":
        return 0
    return 1 if (verdict[key] == "A") == (order == "ab") else -1


def tally(keys: Sequence[str], verdicts: Mapping[str, Mapping[str, Verdict]]) -> dict[str, Any]:
    """Win, tie and loss of model a against model b.

    A win must hold in both orders; two answers that disagree count as a tie (MT-Bench, arXiv 2306.05685, section 3.4).

    Args:
      keys: of the answers.
      verdicts: {image: {order: verdict of `Criteria.parse`}}; only images with both orders count.

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


def mean_points(names: Sequence[str], verdicts: Mapping[str, Mapping[str, Verdict]]) -> dict[str, Any]:
    """Mean points of the captions of both models under `paper_v5`, {criterion: {"a", "b": {value, n, low, high}}}.

    Args:
      names: of the criteria.
      verdicts: as in `tally`; {} without images that have both orders.
    """
    points = points_of(names, verdicts)
    return {
        name: {model: interval(values) for model, values in both.items()} for name, both in points.items() if both["a"]
    }
