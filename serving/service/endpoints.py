"""What a model's paths do with a request's images, on one event loop: a plain class, which `serving.app` puts on Ray;
no torch here.
"""

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar, cast

from starlette.requests import Request
from starlette.responses import Response

from backbones.errors import unknown
from backbones.preprocess import ClassifierPreprocess, ImageError, Pixels, decode
from detection.drawing import COLORS, LONGEST_JPEG, draw_boxes
from serving.api import oip
from serving.api.protocol import Refusal, number, read_query, refused
from serving.api.schemas import (
    DEFAULT_TOP_K,
    MAX_TOP_K,
    PICTURES,
    ClassifyAnswer,
    DetectAnswer,
    class_indices,
    classify_answer,
    detect_answer,
)
from serving.api.uploads import read_upload
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact
from serving.predictor import Predictor
from serving.runtime import usable_cores
from serving.service.batching import BatchQueue
from serving.service.beside import Classifiers
from serving.service.metrics import ReplicaMetrics

MOST_PREPARED = 64  # images of a replica that are decoded and wait, for one request may bring so many itself
T = TypeVar("T")


class Endpoints:
    """Images to answers through one predictor: decoded in threads, run in batches.

    Args:
        name: of the model.
        predictor: whose `predict` runs in threads of its own, as many as there are `workers`.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        metrics: ReplicaMetrics,
        max_batch_size: int,
        max_body_bytes: int,
        workers: int = 1,
    ):
        self.name, self.metrics, self.max_body_bytes = name, metrics, max_body_bytes
        self.predictor: Any = predictor  # what one prepares, the other does not take
        self.metadata: Artifact = predictor.metadata
        self.batches: BatchQueue[Any, Any] = BatchQueue(predictor.predict, max_batch_size, metrics.batch, workers)
        self._room = asyncio.Semaphore(max(MOST_PREPARED, 2 * max_batch_size))
        self._decoders = ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")
        self._classifiers = Classifiers()

    async def infer(self, parse: Callable[[Artifact], oip.InferRequest], render: Callable[..., T], version: str) -> T:
        """Tensors to tensors, several images at once.

        Args:
            parse, render: of the protocol's JSON or of its gRPC.
            version: of the model, that the answer names.
        """
        with refused():
            asked = await self._in_thread(parse, self.metadata)
        results = await _all(*(self._infer(asked, i) for i in range(len(asked.images))))

        def answer() -> T:
            return render(asked, self.name, version, oip.to_tensors(asked, self.metadata, results))

        return await self._in_thread(self.metrics.call, "encode", answer)

    async def _infer(self, asked: oip.InferRequest, i: int) -> Any:
        async with self._room:
            return await self.batches.submit(await self._in_thread(self._prepare, asked, i))

    def _prepare(self, asked: oip.InferRequest, i: int) -> Any:
        try:
            return self.metrics.call("decode", self.predictor.prepare, asked.images[i])
        except ImageError as error:
            raise ImageError(f"element {i} of {len(asked.images)}: {error}") from None

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Off the event loop, which has no time for it."""
        run = copy_context().run  # the thread notes stages of this request
        return await asyncio.get_running_loop().run_in_executor(self._decoders, run, work, *args)

    async def find(self, request: Request) -> Any:
        """An image or several to what people read; of several, a bad one is an error in its place."""
        answer, picture = self._read_query(request)
        one = await self._beside(request, answer) or partial(self._one, answer=answer)
        upload = await read_upload(request, self.max_body_bytes)
        if not upload.several:
            found = await one(upload.images[0])
            if not picture:
                return found
            return await self._in_thread(draw, upload.images[0], found, picture, self.metadata)
        if picture:
            raise Refusal(400, f"annotate={picture} answers one picture: send one image at a time")

        async def entry(name: str, image: bytes) -> dict[str, Any]:
            try:
                return {"name": name, **await one(image)}
            except ImageError as error:
                return {"name": name, "error": str(error)}

        return {"results": await _all(*map(entry, upload.names, upload.images))}

    async def _one(self, image: bytes, answer: Callable[[Any], Any]) -> Any:
        async with self._room:
            prepared = await self._in_thread(self.metrics.call, "decode", self.predictor.prepare, image)
            return await self._run(prepared, answer)

    async def _run(self, prepared: Any, answer: Callable[[Any], Any]) -> Any:
        found = await self.batches.submit(prepared)
        if getattr(found, "masks", None) is None:
            return self.metrics.call("encode", answer, found)
        return await self._in_thread(self.metrics.call, "encode", answer, found)  # masks are pasted as they are read

    async def _beside(self, request: Request, answer: Callable[[Any], Any]) -> Callable[[bytes], Awaitable[Any]] | None:
        """`_one` with a classifier's answer in it, of the picture that was decoded once; None if none was asked for."""
        name = request.query_params.get("classify")
        if name is None:
            return None
        top_k = number(request.query_params, "top_k", int, 1, MAX_TOP_K) or DEFAULT_TOP_K
        if name == self.name:
            raise Refusal(400, f"{name!r} is this model, for detection: classify names a classifier")
        classifier = await self._classifiers.find(name)

        async def both(image: bytes) -> dict[str, Any]:
            prepare = partial(classifier.prepare, image, self.predictor.prepare)
            async with self._room:
                prepared, pixels = await self._in_thread(self.metrics.call, "decode", prepare)
                classified = self._classifiers.classify(classifier, pixels, top_k)
                found, classification = await _all(self._run(prepared, answer), classified)
            return {**found, "classification": classification}

        return both

    async def classify_pixels(
        self, pixels: Pixels, preprocess: ClassifierPreprocess, top_k: int
    ) -> ClassifyAnswer | None:
        """Of pixels [crop, crop, 3] that a detector's replica made; None if this model prepares otherwise."""
        metadata = self.metadata
        if not isinstance(metadata, ClassifierArtifact) or metadata.preprocess != preprocess:
            return None
        return cast(ClassifyAnswer, await self._run(pixels, partial(classify_answer, metadata, top_k=top_k)))

    def _read_query(self, request: Request) -> tuple[Callable[[Any], Any], str | None]:
        """What makes an answer of a result, and the format of a picture, if one is to be the answer."""
        metadata = self.metadata
        if isinstance(metadata, ClassifierArtifact):
            query = read_query(request, "top_k", "classes")
            top_k = number(query, "top_k", int, 1, MAX_TOP_K) or DEFAULT_TOP_K
            return partial(classify_answer, metadata, top_k=top_k, classes=_classes(query, metadata)), None
        query = read_query(request, "score_threshold", "classes", "annotate", "classify", "top_k")
        if "top_k" in query and "classify" not in query:
            raise Refusal(400, "top_k is of the classes that classify=NAME, a classifier, finds: give it too")
        # Below the artefact's own threshold there is nothing to return.
        threshold = number(query, "score_threshold", float, metadata.score_threshold, 1)
        picture = query.get("annotate")
        if picture not in (None, *PICTURES):
            raise Refusal(400, str(unknown("value of annotate", picture, PICTURES)))
        if picture and "classify" in query:
            raise Refusal(400, "annotate answers a picture, which holds no classes: leave out annotate or classify")
        classes = _classes(query, metadata)
        return partial(detect_answer, metadata, score_threshold=threshold, classes=classes), picture


async def _all(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """What each makes, side by side; when one fails the others end, since nobody will see what they make."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except Exception:
        for task in tasks:
            task.cancel()
        raise


def _classes(query: Mapping[str, str], metadata: Artifact) -> tuple[int, ...] | None:
    with refused():
        return class_indices(query["classes"], metadata) if "classes" in query else None


def draw(image: bytes, answer: DetectAnswer, kind: str, artifact: Artifact) -> Response:
    """The upright image with its detections, the best on top, each in its class's colour.

    Raises:
        ImageError: JPEG holds no picture that long.
    """
    assert isinstance(artifact, DetectorArtifact)
    picture, found = decode(image), answer["detections"][::-1]
    if kind == "jpeg" and max(picture.size) > LONGEST_JPEG:
        raise ImageError(f"a side of {max(picture.size)} pixels is more than JPEG holds: ask for annotate=png")
    texts = [f"{box['label']} {box['score']:.2f}" for box in found]
    colors = [COLORS[artifact.category_ids.index(box["category_id"]) % len(COLORS)] for box in found]
    draw_boxes(picture, [box["box"] for box in found], texts, colors)
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return Response(buffer.getvalue(), media_type=f"image/{kind}")
