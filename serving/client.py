"""Clients of the endpoints, for threads and for asyncio; no torch here."""

import asyncio
import json
import math
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, cast, get_args, overload
from urllib.parse import quote

import httpx

from backbones.errors import InputError, unknown
from backbones.preprocess import ImageError
from serving.artifact import KEY, Artifact, from_metadata
from serving.schemas import ClassifyAnswer, DetectAnswer

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
RETRIED = (429, 502, 503)  # too fast, a gateway that lost its server, too busy: the next try may find better

Image = bytes | str | Path  # encoded, or the path of its file
Version = str | int | None
OnError = Literal["raise", "return"]
_INDEX = {"method": "POST", "url": "/v2/repository/index"}
T = TypeVar("T")
Pending = TypeVar("Pending", Future[Any], asyncio.Task[Any])


class ServerError(InputError):
    """The server refused, failed or could not be reached; the message is its own.

    Attributes:
        status: of the answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


Failure = ServerError | ImageError  # what an image of many may come to instead of an answer


class _Settings:
    """What both clients are told, and what they make of it."""

    def __init__(self, url: str, timeout_s: float = 60.0, tries: int = 8, api_key: str | None = None):
        if tries < 1:
            raise InputError(f"tries={tries}: give at least 1")
        if not 0 < timeout_s < math.inf:
            raise InputError(f"timeout_s={timeout_s}: give a number of seconds above 0")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise InputError("api_key is no header's value: give printable ASCII, without the end of its line")
        self.url, self.timeout_s, self.tries = url.rstrip("/"), timeout_s, tries
        try:
            address = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise InputError(f"{url!r} is no URL ({error}): give one such as http://127.0.0.1:8000") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise InputError(f"{url!r} is no URL of a server: give one such as http://127.0.0.1:8000")
        self._options: dict[str, Any] = {  # of httpx's clients
            "base_url": address,
            "headers": {} if api_key is None else {"X-API-Key": api_key},
            "timeout": timeout_s,
            "trust_env": False,
            "verify": address.scheme == "https",  # the certificates take a tenth of a second to load
            "limits": httpx.Limits(max_connections=None),  # callers bound them; and all are kept, not httpx's 20
        }

    def _artifact(self, name: str, metadata: dict[str, Any]) -> Artifact:
        try:
            values = metadata["parameters"]["metadata"]
        except (KeyError, TypeError):
            raise ServerError(f"{self.url} does not say what {name!r} is: is it this project's server?") from None
        return from_metadata({KEY: json.dumps(values)}, f"{self.url}/v2/models/{name}")


class Client(_Settings):
    """One server, over connections that are kept; threads may share it.

    A call is tried again after 503, 502 and 429, and when the connection is refused or breaks: an answer depends on
    nothing but the image. Between two tries it waits what the server's Retry-After asks for and, with jitter, twice as
    long each time, up to LONGEST_WAIT_S. Any other refusal is final.

    Args:
        url: such as http://127.0.0.1:8000
        timeout_s: the deadline of one call, all its tries and waits together. A wait that would pass it is not begun:
            the last failure is raised at once. Only a server that answers in drops can hold a call for longer.
        tries: of one call, at most.
        api_key: sent as X-API-Key.

    Raises:
        InputError: no URL, no try, no time, or a key that no header can carry.
    """

    def __init__(self, url: str, timeout_s: float = 60.0, tries: int = 8, api_key: str | None = None):
        super().__init__(url, timeout_s, tries, api_key)
        self._http = httpx.Client(**self._options)

    def ready(self) -> bool:
        """Whether every model answers. Never raises: a server that is not there is not ready."""
        try:
            return self._http.get("/v2/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def models(self) -> list[dict[str, str]]:
        """Name, state and task of each."""
        return cast(list[dict[str, str]], self._call(_INDEX))

    def metadata(self, name: str, version: Version = None) -> dict[str, Any]:
        """What the server says of a model, in the Open Inference Protocol's form."""
        return cast(dict[str, Any], self._call(_about(name, version)))

    def artifact(self, name: str, version: Version = None) -> Artifact:
        """What the artefact behind a model says of itself."""
        return self._artifact(name, self.metadata(name, version))

    def classify(self, name: str, image: Image, top_k: int | None = None, version: Version = None) -> ClassifyAnswer:
        """The best classes of an encoded image, or of the file at a path.

        Args:
            version: of the model; None is the one that the server serves by default.

        Raises:
            ServerError: the server's refusal, or no answer.
            ImageError: the file cannot be read.
        """
        return cast(ClassifyAnswer, self._call(_infer("classify", name, version, _read(image), top_k=top_k)))

    def detect(
        self, name: str, image: Image, score_threshold: float | None = None, version: Version = None
    ) -> DetectAnswer:
        """The detections in an encoded image, or in the file at a path.

        Args:
            version: of the model; None is the one that the server serves by default.

        Raises:
            ServerError: the server's refusal, or no answer.
            ImageError: the file cannot be read.
        """
        return cast(
            DetectAnswer, self._call(_infer("detect", name, version, _read(image), score_threshold=score_threshold))
        )

    @overload
    def classify_many(
        self, name: str, images: Iterable[Image], top_k: int | None = None, concurrency: int = 8,
        on_error: Literal["raise"] = "raise", version: Version = None,
    ) -> Iterator[ClassifyAnswer]: ...  # fmt: skip
    @overload
    def classify_many(
        self, name: str, images: Iterable[Image], top_k: int | None = None, concurrency: int = 8,
        *, on_error: Literal["return"], version: Version = None,
    ) -> Iterator[ClassifyAnswer | Failure]: ...  # fmt: skip
    def classify_many(
        self, name: str, images: Iterable[Image], top_k: int | None = None, concurrency: int = 8,
        on_error: OnError = "raise", version: Version = None,
    ) -> Iterator[Any]:  # fmt: skip
        """`classify` of each image, in their order, `concurrency` at once.

        Images are taken as results are, at most twice `concurrency` ahead, so that there may be any number of them.
        Whoever stops early waits for what is under way.

        Args:
            on_error: "raise" what an image cannot be answered for, naming its file; or "return" it as its result.

        Raises:
            InputError: no concurrency, or another on_error.
        """
        _check(concurrency, on_error)
        one = partial(self.classify, name, top_k=top_k, version=version)
        return _many(one, images, concurrency, on_error)

    @overload
    def detect_many(
        self, name: str, images: Iterable[Image], score_threshold: float | None = None, concurrency: int = 8,
        on_error: Literal["raise"] = "raise", version: Version = None,
    ) -> Iterator[DetectAnswer]: ...  # fmt: skip
    @overload
    def detect_many(
        self, name: str, images: Iterable[Image], score_threshold: float | None = None, concurrency: int = 8,
        *, on_error: Literal["return"], version: Version = None,
    ) -> Iterator[DetectAnswer | Failure]: ...  # fmt: skip
    def detect_many(
        self, name: str, images: Iterable[Image], score_threshold: float | None = None, concurrency: int = 8,
        on_error: OnError = "raise", version: Version = None,
    ) -> Iterator[Any]:  # fmt: skip
        """`detect` of each image, as `classify_many`."""
        _check(concurrency, on_error)
        one = partial(self.detect, name, score_threshold=score_threshold, version=version)
        return _many(one, images, concurrency, on_error)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, request: dict[str, Any]) -> Any:
        call = _Call(self)
        while True:
            outcome = self._send(request, call.left_s())
            wait_s = call.wait_after(outcome)
            if wait_s is None:
                return _parse(outcome)
            time.sleep(wait_s)

    def _send(self, request: dict[str, Any], timeout_s: float) -> Any:
        try:
            return self._http.request(**request, timeout=timeout_s)
        except httpx.RequestError as error:
            return error


class AsyncClient(_Settings):
    """`Client` for asyncio, with its arguments, tries and deadline, which here is exact; for one event loop."""

    def __init__(self, url: str, timeout_s: float = 60.0, tries: int = 8, api_key: str | None = None):
        super().__init__(url, timeout_s, tries, api_key)
        self._http = httpx.AsyncClient(**self._options)

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            return (await self._http.get("/v2/health/ready")).status_code == 200
        except httpx.HTTPError:
            return False

    async def models(self) -> list[dict[str, str]]:
        """As `Client.models`."""
        return cast(list[dict[str, str]], await self._call(_INDEX))

    async def metadata(self, name: str, version: Version = None) -> dict[str, Any]:
        """As `Client.metadata`."""
        return cast(dict[str, Any], await self._call(_about(name, version)))

    async def artifact(self, name: str, version: Version = None) -> Artifact:
        """As `Client.artifact`."""
        return self._artifact(name, await self.metadata(name, version))

    async def classify(
        self, name: str, image: Image, top_k: int | None = None, version: Version = None
    ) -> ClassifyAnswer:
        """As `Client.classify`."""
        request = _infer("classify", name, version, await _read_async(image), top_k=top_k)
        return cast(ClassifyAnswer, await self._call(request))

    async def detect(
        self, name: str, image: Image, score_threshold: float | None = None, version: Version = None
    ) -> DetectAnswer:
        """As `Client.detect`."""
        request = _infer("detect", name, version, await _read_async(image), score_threshold=score_threshold)
        return cast(DetectAnswer, await self._call(request))

    @overload
    def classify_many(
        self, name: str, images: Iterable[Image], top_k: int | None = None, concurrency: int = 8,
        on_error: Literal["raise"] = "raise", version: Version = None,
    ) -> AsyncGenerator[ClassifyAnswer, None]: ...  # fmt: skip
    @overload
    def classify_many(
        self, name: str, images: Iterable[Image], top_k: int | None = None, concurrency: int = 8,
        *, on_error: Literal["return"], version: Version = None,
    ) -> AsyncGenerator[ClassifyAnswer | Failure, None]: ...  # fmt: skip
    def classify_many(
        self, name: str, images: Iterable[Image], top_k: int | None = None, concurrency: int = 8,
        on_error: OnError = "raise", version: Version = None,
    ) -> AsyncGenerator[Any, None]:  # fmt: skip
        """As `Client.classify_many`; whoever stops early, by `aclose`, cancels what is under way."""
        _check(concurrency, on_error)
        one = partial(self.classify, name, top_k=top_k, version=version)
        return _many_async(one, images, concurrency, on_error)

    @overload
    def detect_many(
        self, name: str, images: Iterable[Image], score_threshold: float | None = None, concurrency: int = 8,
        on_error: Literal["raise"] = "raise", version: Version = None,
    ) -> AsyncGenerator[DetectAnswer, None]: ...  # fmt: skip
    @overload
    def detect_many(
        self, name: str, images: Iterable[Image], score_threshold: float | None = None, concurrency: int = 8,
        *, on_error: Literal["return"], version: Version = None,
    ) -> AsyncGenerator[DetectAnswer | Failure, None]: ...  # fmt: skip
    def detect_many(
        self, name: str, images: Iterable[Image], score_threshold: float | None = None, concurrency: int = 8,
        on_error: OnError = "raise", version: Version = None,
    ) -> AsyncGenerator[Any, None]:  # fmt: skip
        """`detect` of each image, as `classify_many`."""
        _check(concurrency, on_error)
        one = partial(self.detect, name, score_threshold=score_threshold, version=version)
        return _many_async(one, images, concurrency, on_error)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, request: dict[str, Any]) -> Any:
        call = _Call(self)
        while True:
            outcome = await self._send(request, call.left_s())
            wait_s = call.wait_after(outcome)
            if wait_s is None:
                return _parse(outcome)
            await asyncio.sleep(wait_s)

    async def _send(self, request: dict[str, Any], timeout_s: float) -> Any:
        try:
            return await asyncio.wait_for(self._http.request(**request, timeout=timeout_s), timeout_s)
        except httpx.RequestError as error:
            return error
        except asyncio.TimeoutError:
            return httpx.ReadTimeout("")


class _Call:
    """The tries of one call and its deadline."""

    def __init__(self, settings: _Settings):
        self.url, self.timeout_s, self.tries = settings.url, settings.timeout_s, settings.tries
        self.ends, self.wait_s = time.monotonic() + settings.timeout_s, FIRST_WAIT_S

    def left_s(self) -> float:
        """Seconds to the deadline, above 0: no timeout is less."""
        return max(self.ends - time.monotonic(), 1e-3)

    def wait_after(self, outcome: httpx.Response | httpx.RequestError) -> float | None:
        """Seconds until the next try; None if `outcome` is the answer.

        Raises:
            ServerError: there is no other try.
        """
        if isinstance(outcome, httpx.TimeoutException):
            raise ServerError(
                f"{self.url} gave no answer within {self.timeout_s:g} s: send less at once, or wait longer"
            )
        if isinstance(outcome, httpx.Response) and outcome.status_code not in RETRIED:
            return None
        self.tries -= 1
        wait_s = _retry_after(outcome) + random.uniform(self.wait_s / 2, self.wait_s)
        self.wait_s = min(LONGEST_WAIT_S, 2 * self.wait_s)
        if self.tries == 0 or wait_s >= self.left_s():
            raise _refusal(outcome) if isinstance(outcome, httpx.Response) else _unreached(self.url, outcome)
        return wait_s


def _about(name: str, version: Version) -> dict[str, Any]:
    """A request, as all below, in the arguments of httpx's `request`."""
    path = f"/v2/models/{quote(name, safe='')}"
    return {"method": "GET", "url": path if version is None else f"{path}/versions/{quote(str(version), safe='')}"}


def _infer(action: str, name: str, version: Version, image: bytes, **query: float | None) -> dict[str, Any]:
    return {
        "method": "POST",
        "url": f"{_about(name, version)['url']}/{action}",
        "params": {key: value for key, value in query.items() if value is not None},
        "content": image,
        "headers": {"content-type": "application/octet-stream"},
    }


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # such as a zero in the path
        raise ImageError(f"cannot read {image}: {getattr(error, 'strerror', None) or error}") from None


async def _read_async(image: Image) -> bytes:
    return image if isinstance(image, bytes) else await asyncio.to_thread(_read, image)


def _parse(answer: httpx.Response) -> Any:
    if not answer.is_success:
        raise _refusal(answer)
    try:
        return answer.json()
    except ValueError:
        raise ServerError(f"{answer.url} answers something else than JSON: is it this project's server?") from None


def _refusal(answer: httpx.Response) -> ServerError:
    try:
        message = str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"{answer.url} answers {answer.status_code} {answer.reason_phrase}"
    return ServerError(message, answer.status_code)


def _unreached(url: str, error: httpx.RequestError) -> ServerError:
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError):
        return ServerError(f"cannot reach {url} ({reason}): start it with `python -m serving run`")
    return ServerError(f"{url} broke the connection ({reason}): its log may say why")


def _retry_after(outcome: httpx.Response | httpx.RequestError) -> float:
    """Seconds; a date is not read."""
    text = outcome.headers.get("retry-after", "") if isinstance(outcome, httpx.Response) else ""
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _check(concurrency: int, on_error: str) -> None:
    if concurrency < 1:
        raise InputError(f"concurrency={concurrency}: give at least 1")
    if on_error not in get_args(OnError):
        raise unknown("on_error", on_error, get_args(OnError))


def _many(
    call: Callable[[Image], T], images: Iterable[Image], concurrency: int, on_error: OnError
) -> Iterator[T | Failure]:
    def one(image: Image) -> T | Failure:
        try:
            return call(image)
        except (ServerError, ImageError) as error:
            return _failed(error, image, on_error)

    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="client")
    try:
        for future in _ahead((pool.submit(one, image) for image in images), deque(), 2 * concurrency):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


async def _many_async(
    call: Callable[[Image], Awaitable[T]], images: Iterable[Image], concurrency: int, on_error: OnError
) -> AsyncGenerator[T | Failure, None]:
    places = asyncio.Semaphore(concurrency)
    waiting: deque[asyncio.Task[T | Failure]] = deque()

    async def one(image: Image) -> T | Failure:
        async with places:
            try:
                return await call(image)
            except (ServerError, ImageError) as error:
                return _failed(error, image, on_error)

    try:
        for task in _ahead((asyncio.create_task(one(image)) for image in images), waiting, 2 * concurrency):
            yield await task
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _ahead(started: Iterable[Pending], waiting: deque[Pending], size: int) -> Iterator[Pending]:
    """What is started, in order; up to `size` of it `waiting`, so that one late answer does not hold up the others."""
    for pending in started:
        waiting.append(pending)
        while waiting and (len(waiting) == size or waiting[0].done()):
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _failed(error: Failure, image: Image, on_error: OnError) -> Failure:
    """`error`, or raise it with the file's name: the server saw the bytes alone."""
    if on_error == "return":
        return error
    if isinstance(error, ServerError) and not isinstance(image, bytes):
        raise ServerError(f"{image}: {error}", error.status) from None
    raise error
