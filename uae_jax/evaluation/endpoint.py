"""One chat question to an OpenAI-compatible endpoint, with time-outs and retries."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import requests

TRANSIENT = (408, 409, 425, 429)  # and 5xx
REFUSED = (400, 413, 422)  # of this one question
LONGEST_WAIT = 60.0  # seconds between two attempts


class EndpointError(ConnectionError):
    """The endpoint cannot be used: it is down, busy for too long, or does not accept the key, model or address."""


class QuestionRefused(ValueError):
    """The endpoint does not take this one question; others may pass."""


@dataclasses.dataclass(frozen=True)
class ChatEndpoint:
    """Where to ask, and how patiently.

    Attributes:
      url: such as `https://api.openai.com/v1`, or the whole address ending with `/chat/completions`.
      model: its name there.
      key: sent as bearer token; empty for none.
      timeout: seconds without a byte of the answer before an attempt is given up.
      retries: further attempts after a time-out, a lost connection, status 429 or 5xx.
      backoff: seconds before the first further attempt, doubled each time; a `Retry-After` header wins.
      fields: more fields of the request, such as {"temperature": 0}; those that are None are left out.
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
        """The text of the first choice; "" where the answer has no text.

        Raises:
          EndpointError: no answer after all attempts, or a status that no further attempt would change.
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
    """The text of the first choice; None when the body is something else."""
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
