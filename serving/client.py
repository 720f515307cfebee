"""Clients of the endpoints, for threads and for asyncio; no torch here."""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Literal, cast, overload

import httpx

from backbones.errors import InputError
from serving import calls
from serving.api.schemas import ClassifyAnswer, DetectAnswer
from serving.artifact import KEY, Artifact, from_metadata
from serving.calls import Failure, Image, OnError, ServerError, Version


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
    long each time, up to `calls.LONGEST_WAIT_S`. Any other refusal is final.

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
        return cast(list[dict[str, str]], self._call(calls.INDEX))

    def metadata(self, name: str, version: Version = None) -> dict[str, Any]:
        """What the server says of a model, in the Open Inference Protocol's form."""
        return cast(dict[str, Any], self._call(calls.about(name, version)))

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
        return cast(ClassifyAnswer, self._call(calls.infer("classify", name, version, calls.read(image), top_k=top_k)))

    def detect(
        self,
        name: str,
        image: Image,
        score_threshold: float | None = None,
        version: Version = None,
        classify: str | None = None,
    ) -> DetectAnswer:
        """The detections in an encoded image, or in the file at a path.

        Args:
            classify: a classifier, whose answer about the same picture is `classification`.
            version: of the model; None is the one that the server serves by default.

        Raises:
            ServerError: the server's refusal, or no answer.
            ImageError: the file cannot be read.
        """
        query = {"score_threshold": score_threshold, "classify": classify}
        request = calls.infer("detect", name, version, calls.read(image), **query)
        return cast(DetectAnswer, self._call(request))

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
        calls.check_many(concurrency, on_error)
        one = partial(self.classify, name, top_k=top_k, version=version)
        return calls.many(one, images, concurrency, on_error)

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
        calls.check_many(concurrency, on_error)
        one = partial(self.detect, name, score_threshold=score_threshold, version=version)
        return calls.many(one, images, concurrency, on_error)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, request: dict[str, Any]) -> Any:
        call = calls.Call(self.url, self.timeout_s, self.tries)
        while True:
            outcome = self._send(request, call.left_s())
            wait_s = call.wait_after(outcome)
            if wait_s is None:
                return calls.parse(outcome)
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
        return cast(list[dict[str, str]], await self._call(calls.INDEX))

    async def metadata(self, name: str, version: Version = None) -> dict[str, Any]:
        """As `Client.metadata`."""
        return cast(dict[str, Any], await self._call(calls.about(name, version)))

    async def artifact(self, name: str, version: Version = None) -> Artifact:
        """As `Client.artifact`."""
        return self._artifact(name, await self.metadata(name, version))

    async def classify(
        self, name: str, image: Image, top_k: int | None = None, version: Version = None
    ) -> ClassifyAnswer:
        """As `Client.classify`."""
        request = calls.infer("classify", name, version, await calls.read_async(image), top_k=top_k)
        return cast(ClassifyAnswer, await self._call(request))

    async def detect(
        self,
        name: str,
        image: Image,
        score_threshold: float | None = None,
        version: Version = None,
        classify: str | None = None,
    ) -> DetectAnswer:
        """As `Client.detect`."""
        query = {"score_threshold": score_threshold, "classify": classify}
        request = calls.infer("detect", name, version, await calls.read_async(image), **query)
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
        calls.check_many(concurrency, on_error)
        one = partial(self.classify, name, top_k=top_k, version=version)
        return calls.many_async(one, images, concurrency, on_error)

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
        calls.check_many(concurrency, on_error)
        one = partial(self.detect, name, score_threshold=score_threshold, version=version)
        return calls.many_async(one, images, concurrency, on_error)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, request: dict[str, Any]) -> Any:
        call = calls.Call(self.url, self.timeout_s, self.tries)
        while True:
            outcome = await self._send(request, call.left_s())
            wait_s = call.wait_after(outcome)
            if wait_s is None:
                return calls.parse(outcome)
            await asyncio.sleep(wait_s)

    async def _send(self, request: dict[str, Any], timeout_s: float) -> Any:
        try:
            return await asyncio.wait_for(self._http.request(**request, timeout=timeout_s), timeout_s)
        except httpx.RequestError as error:
            return error
        except asyncio.TimeoutError:
            return httpx.ReadTimeout("")
