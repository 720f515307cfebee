"""A client of the endpoints; no torch here."""

import json
import random
import time
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from urllib.parse import quote

import httpx

from backbones.errors import InputError
from backbones.preprocess import ImageError
from serving.artifact import KEY, Artifact, from_metadata
from serving.schemas import ClassifyAnswer, DetectAnswer

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0


class ServerError(InputError):
    """The server refused, failed or could not be reached; the message is its own.

    Attributes:
        status: of the answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Client:
    """One server, over connections that are kept; threads may share it.

    A 503 and a broken connection are tried again: an answer depends on nothing but the image.

    Args:
        url: such as http://127.0.0.1:8000
        timeout_s: of one try.
        tries: of one call; between two of them it waits twice as long each time, with jitter, and what the server
            asks for, but never over LONGEST_WAIT_S.

    Raises:
        InputError: no URL, or no try.
    """

    def __init__(self, url: str, timeout_s: float = 60.0, tries: int = 6):
        if tries < 1:
            raise InputError(f"tries={tries}: give at least 1")
        self.url, self.tries = url.rstrip("/"), tries
        try:
            self._http = httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)
        except httpx.InvalidURL as error:
            raise InputError(f"{url!r} is no URL ({error}): give one such as http://127.0.0.1:8000") from None
        if self._http.base_url.scheme not in ("http", "https"):
            raise InputError(f"{url!r} is no URL of a server: give one such as http://127.0.0.1:8000")

    def ready(self) -> bool:
        """Whether every model answers. Never raises: a server that is not there is not ready."""
        try:
            return self._http.get("/v2/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def models(self) -> list[dict[str, str]]:
        """Name, state and task of each."""
        return cast(list[dict[str, str]], self._call("POST", "/v2/repository/index"))

    def metadata(self, name: str) -> dict[str, Any]:
        """What the server says of a model, in the Open Inference Protocol's form."""
        return cast(dict[str, Any], self._call("GET", _path(name)))

    def artifact(self, name: str) -> Artifact:
        """What the artefact behind a model says of itself."""
        try:
            values = self.metadata(name)["parameters"]["metadata"]
        except (KeyError, TypeError):
            raise ServerError(f"{self.url} does not say what {name!r} is: is it this project's server?") from None
        return from_metadata({KEY: json.dumps(values)}, f"{self.url}/v2/models/{name}")

    def classify(self, name: str, image: bytes | str | Path, top_k: int | None = None) -> ClassifyAnswer:
        """The best classes of an encoded image, or of the file at a path.

        Raises:
            ServerError: the server's refusal.
        """
        query = {} if top_k is None else {"top_k": top_k}
        return cast(ClassifyAnswer, self._call("POST", f"{_path(name)}/classify", query, _read(image)))

    def detect(self, name: str, image: bytes | str | Path, score_threshold: float | None = None) -> DetectAnswer:
        """The detections in an encoded image, or in the file at a path.

        Raises:
            ServerError: the server's refusal.
        """
        query = {} if score_threshold is None else {"score_threshold": score_threshold}
        return cast(DetectAnswer, self._call("POST", f"{_path(name)}/detect", query, _read(image)))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, path: str, query: dict[str, Any] | None = None, body: bytes | None = None) -> Any:
        headers = {} if body is None else {"content-type": "application/octet-stream"}
        wait = FIRST_WAIT_S
        for attempt in range(self.tries):
            asked = 0.0
            try:
                answer = self._http.request(method, path, params=query, content=body, headers=headers)
                if answer.status_code != 503:
                    return _parse(answer)
                failure = _error(answer)
                after = answer.headers.get("retry-after", "")
                asked = float(after) if after.isdigit() else 0.0
            except httpx.TimeoutException as error:
                raise ServerError(f"{self.url}{path} gave no answer in time ({type(error).__name__})") from None
            except httpx.TransportError as error:
                failure = ServerError(f"cannot reach {self.url} ({error}): start it with `python -m serving run`")
            if attempt + 1 < self.tries:
                time.sleep(min(LONGEST_WAIT_S, asked + random.uniform(0, wait)))
                wait *= 2
        raise failure


def _path(name: str) -> str:
    return f"/v2/models/{quote(name, safe='')}"


def _read(image: bytes | str | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # such as a zero in the path
        raise ImageError(f"cannot read {image}: {getattr(error, 'strerror', None) or error}") from None


def _parse(answer: httpx.Response) -> Any:
    if not answer.is_success:
        raise _error(answer)
    try:
        return answer.json()
    except ValueError:
        raise ServerError(f"{answer.url} answers something else than JSON: is it this project's server?") from None


def _error(answer: httpx.Response) -> ServerError:
    try:
        message = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"{answer.url} answers {answer.status_code} {answer.reason_phrase}"
    return ServerError(message, answer.status_code)
