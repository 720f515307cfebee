"""What people send: a picture itself, a form with files, or JSON with base64; no Ray, no torch here."""

import asyncio
import base64
import json
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header
from starlette.requests import Request

from serving.api.oip import MAX_IMAGES
from serving.api.protocol import Refusal, read_body

FORM = "multipart/form-data"
_EXAMPLE = '{"image": "<base64>"}, or {"images": ["<base64>", …]}'


@dataclass(frozen=True)
class Upload:
    """Encoded images and what their sender calls them; `several` if an answer for each was asked for."""

    images: tuple[bytes, ...]
    names: tuple[str, ...] = ("image",)
    several: bool = False


async def read_upload(request: Request, limit: int) -> Upload:
    """The images in a body of at most `limit` bytes.

    Raises:
        Refusal: it is larger, or not of the form that its Content-Type says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/") and kind != FORM:
        raise Refusal(415, f"{kind} is not read here: send multipart/form-data, or the image itself as the body")
    body = await read_body(request, limit)
    if kind == FORM:
        return await asyncio.to_thread(_read_form, request.headers["content-type"], body)
    if kind == "application/json":
        return await asyncio.to_thread(_read_json, body)
    return Upload((body,))


def _read_form(content_type: str, body: bytes) -> Upload:
    files: list[File] = []
    ended: list[bool] = []
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = FormParser(
            FORM, None, files.append, on_end=lambda: ended.append(True), boundary=boundary, config=in_memory
        )
        parser.write(body)
    except FormParserError as error:
        raise Refusal(400, f"the form cannot be read ({error}): send it as curl -F image=@FILE does") from None
    if not ended:
        raise Refusal(400, "the form ends early: send it as curl -F image=@FILE does")
    if not 1 <= len(files) <= MAX_IMAGES:
        raise Refusal(400, f"the form has {len(files)} files: send 1 to {MAX_IMAGES}, as curl -F image=@FILE does")
    images, names = [], []
    for file in files:
        file.file_object.seek(0)
        images.append(file.file_object.read())
        names.append((file.file_name or b"image").decode(errors="replace"))
    return Upload(tuple(images), tuple(names), several=len(files) > 1)


def _read_json(body: bytes) -> Upload:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON ({error}): send {_EXAMPLE}") from None
    if isinstance(value, dict) and list(value) == ["image"]:
        return Upload((_decode(value["image"], "image"),))
    if not isinstance(value, dict) or list(value) != ["images"] or not isinstance(value["images"], list):
        raise Refusal(400, f"the body holds something else than images: send {_EXAMPLE}")
    if not 1 <= len(value["images"]) <= MAX_IMAGES:
        raise Refusal(400, f"{len(value['images'])} images in a request: send 1 to {MAX_IMAGES}")
    names = tuple(f"images[{i}]" for i in range(len(value["images"])))
    return Upload(tuple(map(_decode, value["images"], names)), names, several=True)


def _decode(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        raise Refusal(400, f"{name} is {type(value).__name__}, not a string of base64: send {_EXAMPLE}")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise Refusal(400, f"{name} is no base64 ({error}): send {_EXAMPLE}") from None
