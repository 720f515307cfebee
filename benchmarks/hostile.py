"""Requests that no honest client sends, and what may be answered to them."""

import base64
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

REFUSALS = frozenset({400, 404, 405, 408, 411, 413, 415, 422, 431, 501, 503})  # 501: a transfer coding nobody has
NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 2**70, "", "images", "\u0000", "💣" * 50, "9" * 400, "UINT8", "FP32",
    [], {}, [[]], [None], {"a": {}}, [2**40, 2**40, 3], [-1],
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A whole request; `kind` is for the report."""

    kind: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What was answered; `wrong` says why it may not be, or is empty."""

    kind: str
    status: int | None
    seconds: float
    wrong: str = ""


def requests(classifier: str, detector: str, count: int, seed: int = 0) -> Iterator[Request]:
    """Truncations at every length, and so many others by turns."""
    draw = random.Random(seed)
    classify, detect = f"/v2/models/{classifier}/classify", f"/v2/models/{detector}/detect"
    pictures = {kind: _picture(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")}
    for kind, body in pictures.items():
        for length in range(len(body)):
            yield Request(f"truncated {kind}", draw.choice((classify, detect)), body[:length])
    for i in range(count):
        path = draw.choice((classify, detect))
        if i % 4 == 0:
            kind = draw.choice(list(pictures))
            yield Request(f"flipped {kind}", path, _flip(pictures[kind], draw))
        elif i % 4 == 1:
            name = classifier if path == classify else detector
            document, tail = draw.choice((_encoded, _numbers, _binary))(pictures["PNG"])
            body = json.dumps(_mutate(document, draw)).encode()
            headers = _lengths(draw, body) if not tail else {"inference-header-content-length": str(len(body))}
            body = (body if draw.random() < 0.7 else _flip(body, draw)) + tail[: draw.choice((len(tail), 7))]
            yield Request("inference request", f"/v2/models/{name}/infer", body, headers)
        elif i % 4 == 2:
            kind = draw.choice(
                ("application/json", "multipart/form-data; boundary=x", "multipart/mixed", "text/html", "\xff")
            )
            body = draw.choice((_flip(pictures["PNG"], draw), _form(draw), b'{"image": 7}', b"[" * 9000, b"<svg/>"))
            yield Request("wrong type", path, body, {"content-type": kind})
        else:
            body = draw.choice((_png(20000, 20000), _png(10_000, 10_000), _png(2**31 - 1, 1), _gif(65535, 65535)))
            yield Request("bomb", path, body)


def send_all(url: str, asked: Iterator[Request], clients: int = 8) -> list[Verdict]:
    """All of them, several at once."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http, ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda request: _send(http, request), asked))


def _send(http: httpx.Client, request: Request) -> Verdict:
    began = time.monotonic()
    headers = {key.encode(): value.encode("latin-1") for key, value in request.headers.items()}
    try:
        answer = http.post(request.path, content=request.body, headers=headers)
    except httpx.HTTPError as error:
        return Verdict(request.kind, None, time.monotonic() - began, repr(error))
    status, wrong = answer.status_code, ""
    if status == 200:
        wrong = "" if "error" not in answer.json() else "an error with status 200"
    elif status not in REFUSALS:
        wrong = f"{status}: {answer.text[:200]} to {request.body[:300]!r}"
    elif not answer.headers["content-type"].startswith("application/json") or list(answer.json()) != ["error"]:
        wrong = f"{status} without an error in JSON: {answer.text[:200]}"
    return Verdict(request.kind, status, time.monotonic() - began, wrong)


def misbehave(url: str, model: str, picture: bytes) -> list[Verdict]:
    """Senders who are slow, lie about lengths, close half a connection or speak no HTTP.

    Each ends with an answer below 500 or without one; which is which is up to the server.
    """
    post = f"POST /v2/models/{model}/classify HTTP/1.1\r\nhost: x\r\n".encode()
    length = b"content-length: %d\r\n\r\n" % len(picture)
    chunk = b"%x\r\n" % 2**20 + b"\0" * 2**20 + b"\r\n"
    cases: dict[str, tuple[list[bytes], float, bool]] = {  # what is sent, seconds between, half closed after
        "100 MB declared": ([post + b"content-length: 100000000\r\n\r\n", *[b"\0" * 2**20] * 100], 0, False),
        "100 MB in chunks": ([post + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 100], 0, False),
        "slow headers": ([bytes([byte]) for byte in post[:40]], 0.02, True),
        "slow body": ([post + length, *[picture[i : i + 16] for i in range(0, len(picture), 16)]], 0.02, False),
        "half closed": ([post + length + picture], 0, True),
        "half a body, half closed": ([post + length + picture[:20]], 0, True),
        "more than declared": ([post + b"content-length: 3\r\n\r\n" + picture], 0, True),
        "two lengths": ([post + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"], 0, True),
        "negative length": ([post + b"content-length: -1\r\n\r\n"], 0, True),
        "broken chunks": ([post + b"transfer-encoding: chunked\r\n\r\nzz\r\n"], 0, True),
        "long header": ([post + b"x: " + b"y" * 40_000 + b"\r\n\r\n"], 0, True),
        "no HTTP": ([b"\x16\x03\x01" + bytes(range(256))], 0, True),
        "nothing": ([], 0, True),
    }
    with ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(lambda case: _raw(url, case[0], *case[1]), cases.items()))


def _raw(url: str, kind: str, parts: list[bytes], pause_s: float, half_close: bool) -> Verdict:
    address, began, answer = urlsplit(url), time.monotonic(), b""
    with socket.create_connection((str(address.hostname), int(address.port or 80)), timeout=30) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before all was sent
        try:
            answer = connection.recv(4096)
        except TimeoutError:
            return Verdict(kind, None, time.monotonic() - began, "neither an answer nor an end within 30 s")
        except OSError:
            pass  # reset
    seconds = time.monotonic() - began
    if not answer:
        return Verdict(kind, None, seconds)
    status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0
    wrong = "" if status == 200 or status in REFUSALS else repr(answer[:300])
    unread = answer.startswith(b"HTTP/1.1 400 Bad request\r\n")  # HAProxy on what is no HTTP; Starlette says "Request"
    if not wrong and not unread and b"application/json" not in answer:
        wrong = f"no JSON: {answer[:300]!r}"
    return Verdict(kind, status, seconds, wrong)


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.radial_gradient("L").resize((20, 15)).convert("RGB")
    image.save(buffer, kind)
    return buffer.getvalue()


def _flip(body: bytes, draw: random.Random) -> bytes:
    """One to eight bits."""
    flipped = bytearray(body)
    for _ in range(draw.randint(1, 8)):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _encoded(picture: bytes) -> tuple[dict[str, Any], bytes]:
    """A right inference request of one image, and the bytes after it: as BYTES."""
    return _infer("BYTES", [1], data=[base64.b64encode(picture).decode()]), b""


def _numbers(_: bytes) -> tuple[dict[str, Any], bytes]:
    """As UINT8, of 4 x 5 pixels."""
    return _infer("UINT8", [1, 4, 5, 3], data=[7] * 60), b""


def _binary(picture: bytes) -> tuple[dict[str, Any], bytes]:
    """As BYTES after the JSON."""
    tail = struct.pack("<I", len(picture)) + picture
    return _infer("BYTES", [1], parameters={"binary_data_size": len(tail)}), tail


def _infer(datatype: str, shape: list[int], **tensor: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "parameters": {"top_k": 1, "binary_data_output": False},
        "inputs": [{"name": "images", "datatype": datatype, "shape": shape, "parameters": {}, **tensor}],
        "outputs": [{"name": "scores", "parameters": {"binary_data": False}}],
    }


def _mutate(value: Any, draw: random.Random) -> Any:
    """The same with one to three of its parts replaced, taken out or added."""
    for _ in range(draw.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return draw.choice(NASTY)
        holder, key = draw.choice(places)
        action = draw.random()
        if action < 0.6:
            holder[key] = draw.choice(NASTY)
        elif action < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw.choice(("x", "raw", "binary_data_size", ""))] = draw.choice(NASTY)
        else:
            holder.append(draw.choice(NASTY))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key below."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _lengths(draw: random.Random, body: bytes) -> dict[str, str]:
    """Mostly none; else one of the binary extension's, which lies."""
    texts = ("", "0", "-1", "nan", str(len(body) - 1), str(len(body) + 1), "9" * 30)
    return {} if draw.random() < 0.7 else {"inference-header-content-length": draw.choice(texts)}


def _form(draw: random.Random) -> bytes:
    whole = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    return draw.choice((whole, whole[: draw.randrange(len(whole))], whole * 200, _flip(whole, draw)))


def _png(width: int, height: int) -> bytes:
    """A PNG of a header and a megabyte of zeros, which are a thousandth of that compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 2**20)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _gif(width: int, height: int) -> bytes:
    """A GIF with many frames on a huge screen."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return screen + frame * 100 + b";"
