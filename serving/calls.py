"""A call to the endpoints: its request, its tries and deadline, its answer; and many at once; no torch here."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import quote

import httpx

from backbones.errors import InputError, unknown
from backbones.preprocess import ImageError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
RETRIED = (429, 502, 503)  # too fast, a gateway that lost its server, too busy: the next try may find better

Image = bytes | str | Path  # encoded, or the path of its file
Version = str | int | None
OnError = Literal["raise", "return"]
INDEX = {"method": "POST", "url": "/v2/repository/index"}
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


class Call:
    """The tries of one call and its deadline."""

    def __init__(self, url: str, timeout_s: float, tries: int):
        self.url, self.timeout_s, self.tries = url, timeout_s, tries
        self.ends, self.wait_s = time.monotonic() + timeout_s, FIRST_WAIT_S

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


def about(name: str, version: Version) -> dict[str, Any]:
    """A request, as all below, in the arguments of httpx's `request`."""
    path = f"/v2/models/{quote(name, safe='')}"
    return {"method": "GET", "url": path if version is None else f"{path}/versions/{quote(str(version), safe='')}"}


def infer(action: str, name: str, version: Version, image: bytes, **query: float | str | None) -> dict[str, Any]:
    return {
        "method": "POST",
        "url": f"{about(name, version)['url']}/{action}",
        "params": {key: value for key, value in query.items() if value is not None},
        "content": image,
        "headers": {"content-type": "application/octet-stream"},
    }


def read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # such as a zero in the path
        raise ImageError(f"cannot read {image}: {getattr(error, 'strerror', None) or error}") from None


async def read_async(image: Image) -> bytes:
    return image if isinstance(image, bytes) else await asyncio.to_thread(read, image)


def parse(answer: httpx.Response) -> Any:
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


def check_many(concurrency: int, on_error: str) -> None:
    if concurrency < 1:
        raise InputError(f"concurrency={concurrency}: give at least 1")
    if on_error not in get_args(OnError):
        raise unknown("on_error", on_error, get_args(OnError))


def many(
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


async def many_async(
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
