"""Ray Serve as its guide shows it: a deployment, dynamic batching, every setting at its default."""

import os
import time
from typing import Any

import ray
from picture import CORES, Model, prepare
from ray import serve
from starlette.requests import Request


@serve.deployment
class Classifier:
    def __init__(self) -> None:
        self.model = Model(CORES)

    @serve.batch
    async def predict(self, pictures: list[Any]) -> list[dict[str, Any]]:
        return self.model.top5(pictures)

    async def __call__(self, request: Request) -> dict[str, Any]:
        picture = prepare(await request.body())
        return await self.predict(picture)


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False)
    serve.start(http_options={"port": int(os.environ["PORT"])})
    serve.run(Classifier.bind())  # type: ignore[attr-defined]
    while True:
        time.sleep(3600)
