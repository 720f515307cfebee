"""A classifier asked beside a detector, about the one picture that the detector's replica decodes; no torch here.

The detector's replica also makes the classifier's pixels, [crop, crop, 3], and hands these over, not the encoded image:
decoding is most of what a request costs besides its models.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from PIL import Image
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from backbones.preprocess import ClassifierPreprocess, Pixels, classifier_pixels, decode
from serving.api.protocol import RETRY_AFTER_S, Refusal
from serving.api.schemas import ClassifyAnswer
from serving.artifact import Artifact, ClassifierArtifact
from serving.service.grpc_service import FRONT

PATIENCE_S = 1.0  # between two looks whether there is a replica at all
_GONE = (BackPressureError, DeploymentUnavailableError, RayActorError)
T = TypeVar("T")


@dataclass(frozen=True)
class Classifier:
    """A classifier of the service, as another replica sees it."""

    name: str
    preprocess: ClassifierPreprocess
    handle: DeploymentHandle[Any]

    def prepare(self, image: bytes, prepare: Callable[[Image.Image], T]) -> tuple[T, Pixels]:
        """What `prepare` makes of an encoded image, and the classifier's pixels of it.

        Raises:
            ImageError: it cannot be decoded.
        """
        picture = decode(image)
        return prepare(picture), classifier_pixels(picture, self.preprocess)


class Classifiers:
    """The classifiers that a replica has asked, by name."""

    def __init__(self) -> None:
        self._known: dict[str, Classifier] = {}

    async def find(self, name: str) -> Classifier:
        """The classifier of that name.

        Raises:
            Refusal: 404 or 400, there is no such model or it is none; 503, it has no replica.
        """
        if name not in self._known:
            missing = Refusal(404, f"no model {name!r} here, which classify names")
            if name == FRONT:  # an application, and no model
                raise missing
            try:
                handle = await asyncio.to_thread(serve.get_app_handle, name)
            except RayServeException:
                raise missing from None
            artifact: Artifact = await _call(name, handle.artifact)
            if not isinstance(artifact, ClassifierArtifact):
                raise Refusal(400, f"{name!r} is a model for {artifact.task}: classify names a classifier")
            self._known[name] = Classifier(name, artifact.preprocess, handle)
        return self._known[name]

    async def classify(self, classifier: Classifier, pixels: Pixels, top_k: int) -> ClassifyAnswer:
        """What the classifier's own endpoint answers about the image.

        Raises:
            Refusal: 503, where it has no replica, is overloaded, or was replaced by one that prepares otherwise.
        """
        try:
            answer = await _call(
                classifier.name, classifier.handle.classify_pixels, pixels, classifier.preprocess, top_k
            )
            if answer is None:
                raise _unavailable(classifier.name, "was replaced meanwhile")
        except Refusal:
            self._known.pop(classifier.name, None)  # look it up anew
            raise
        return cast(ClassifyAnswer, answer)


async def _call(name: str, method: Any, *args: object) -> Any:
    response = method.remote(*args)
    answered = asyncio.ensure_future(_result(response))
    try:
        while not (await asyncio.wait({answered}, timeout=PATIENCE_S))[0]:
            if not await asyncio.to_thread(_has_replica, name):
                raise _unavailable(name, "has no replica ready")
        return answered.result()
    except _GONE:
        raise _unavailable(name, "is overloaded or has no replica ready") from None
    finally:
        answered.cancel()


async def _result(response: Any) -> Any:
    return await response


def _has_replica(name: str) -> bool:
    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application else ()
    states = [state for deployment in deployments for state, count in deployment.replica_states.items() if count]
    return "RUNNING" in states


def _unavailable(name: str, reason: str) -> Refusal:
    return Refusal(503, f"{name!r} {reason}: try again", {"Retry-After": str(RETRY_AFTER_S)})
