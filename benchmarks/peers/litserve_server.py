"""LitServe: a batched API on as many workers as there are cores."""

import os
from typing import Any

import litserve as ls
from fastapi import Request
from picture import CORES, Model, prepare


class Classifier(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model(1)

    def decode_request(self, request: Request) -> Any:
        return prepare(request["image"].file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, pictures: list[Any]) -> list[dict[str, Any]]:
        return self.model.top5(pictures)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = ls.LitServer(Classifier(max_batch_size=8), accelerator="cpu", workers_per_device=CORES)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
