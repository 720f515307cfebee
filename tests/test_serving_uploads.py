"""Bodies of every form to images, over a bare ASGI application."""

import base64
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from serving.api.protocol import respond
from serving.api.uploads import read_upload

LIMIT = 10_000


async def _endpoint(request: Request) -> Response:
    async def answer(request: Request) -> Any:
        upload = await read_upload(request, LIMIT)
        return [list(upload.names), [image.hex() for image in upload.images], upload.several]

    return await respond(answer, request, timeout_s=10)


client = TestClient(Starlette(routes=[Route("/", _endpoint, methods=["POST"])]))


def good(response: httpx.Response) -> tuple[list[str], list[bytes], bool]:
    assert response.status_code == 200, response.text
    names, images, several = response.json()
    return names, [bytes.fromhex(image) for image in images], several


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.mark.parametrize("kind", [None, "image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_a_picture_itself(kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert good(client.post("/", content=b"\x00picture", headers=headers)) == (["image"], [b"\x00picture"], False)


def test_a_form_with_one_file_and_with_several() -> None:
    one = client.post("/", files={"image": ("a.jpg", b"\r\n--picture")}, data={"note": "left alone"})
    assert good(one) == (["a.jpg"], [b"\r\n--picture"], False)
    several = client.post("/", files=[("image", ("a.jpg", b"1")), ("image", ("b.jpg", b"2" * 5000))])
    assert good(several) == (["a.jpg", "b.jpg"], [b"1", b"2" * 5000], True)


def test_json() -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    one = client.post("/", content=json.dumps({"image": b64(b"1")}), headers=headers)
    assert good(one) == (["image"], [b"1"], False)
    for n in (1, 3):
        several = client.post("/", json={"images": [b64(bytes([i])) for i in range(n)]})
        assert good(several) == ([f"images[{i}]" for i in range(n)], [bytes([i]) for i in range(n)], True)


def refused(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert words in response.json()["error"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "something else than images"),
        ("abc", "something else than images"),
        ({"image": "", "images": []}, "something else than images"),
        ({"images": {}}, "something else than images"),
        ({"images": []}, "0 images in a request: send 1 to 64"),
        ({"images": [""] * 65}, "65 images in a request: send 1 to 64"),
        ({"image": 7}, "image is int, not a string of base64"),
        ({"images": ["", None]}, "images[1] is NoneType"),
        ({"image": "a"}, "image is no base64"),
        ({"image": "é"}, "image is no base64"),
    ],
)
def test_json_of_another_form(value: Any, words: str) -> None:
    refused(client.post("/", json=value), 400, words)


@pytest.mark.parametrize("body", [b"{", b"\xff\xd8\xff", b"[" * 9_000])
def test_no_json(body: bytes) -> None:
    refused(client.post("/", content=body, headers={"content-type": "application/json"}), 400, "the body is no JSON")


FIELD = b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\nx\r\n--b--'
WHOLE = b'--b\r\ncontent-disposition: form-data; name="a"; filename="a.jpg"\r\n\r\na picture\r\n--b--'


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("multipart/form-data", b"x", 400, "the form cannot be read"),
        ("multipart/form-data; boundary=b", b"x", 400, "the form cannot be read"),
        ("multipart/form-data; boundary=b", FIELD, 400, "the form has 0 files"),
        ("multipart/mixed; boundary=b", b"x", 415, "multipart/mixed is not read here"),
        ("image/png", b"", 400, "the body is empty"),
        ("image/png", b"x" * (LIMIT + 1), 413, "over 10000 bytes"),
        ("multipart/form-data; boundary=b", b"x" * (LIMIT + 1), 413, "over 10000 bytes"),
    ],
)
def test_what_cannot_be_read(kind: str, body: bytes, status: int, words: str) -> None:
    refused(client.post("/", content=body, headers={"content-type": kind}), status, words)


def test_more_files_than_a_request_may_have() -> None:
    refused(
        client.post("/", files=[("image", ("a", b"")) for _ in range(65)]), 400, "the form has 65 files: send 1 to 64"
    )


def test_a_form_that_ends_early_at_any_byte() -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert good(client.post("/", content=WHOLE, headers=headers)) == (["a.jpg"], [b"a picture"], False)
    for end in range(1, len(WHOLE) - 1):
        refused(client.post("/", content=WHOLE[:end], headers=headers), 400, "the form ")
