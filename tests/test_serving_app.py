"""The endpoints on a real Ray Serve, started once: every answer that README promises, good input and bad."""

import base64
import io
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http
from artifacts import BOXES, COLOURS, RGB, picture, write_classifier, write_detector
from PIL import Image
from services import Started, slow_model, started_of

from benchmarks.processes import tree
from serving.client import Client
from serving.config import ServedModel, ServingConfig
from serving.predictor import create_predictor
from serving.runtime import OnnxModel

MAX_BODY = 300_000
SLOW_TIMEOUT_S = 0.4


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier") / "m.onnx")


@pytest.fixture(scope="module")
def started(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("artifacts")
    models = (
        ServedModel(name="classifier", artifact=str(classifier)),
        ServedModel(name="detector", artifact=str(write_detector(folder / "detector.onnx"))),
        slow_model(folder, 4 * SLOW_TIMEOUT_S, SLOW_TIMEOUT_S),
    )
    with started_of(ServingConfig(port=0, max_body_bytes=MAX_BODY, models=models)) as service:
        yield service


def huge_png() -> bytes:
    """A PNG whose header says 20000 x 20000, in 60 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise_jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def check_error(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    for word in words:
        assert word in body["error"]


def test_says_what_it_serves(started: Started) -> None:
    text = "\n".join(started.lines)
    assert "classifier: colours, classification on CPUExecutionProvider" in text
    assert f"curl --data-binary @image.jpg {started.service.url}/v2/models/" in text


def test_classify_equals_the_predictor(started: Started, classifier: Path) -> None:
    predictor = create_predictor(OnnxModel(classifier, "cpu"))
    for colour in COLOURS:
        image = picture(colour)
        result = predictor.predict([predictor.prepare(image)])[0]  # type: ignore[list-item]
        response = started.post("classifier/classify", image)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["model"] == "colours"
        assert answer["predictions"][0]["label"] == colour
        scores = [np.float32(row["score"]) for row in answer["predictions"]]
        assert scores == list(result.probabilities)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("content_type", [None, "image/jpeg", "application/x-www-form-urlencoded", "text/html"])
def test_any_format_under_any_content_type(started: Started, kind: str, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = started.post("classifier/classify?top_k=1", picture("blue", kind=kind), headers=headers)
    assert response.status_code == 200, response.text
    assert [row["label"] for row in response.json()["predictions"]] == ["blue"]


def test_detect_in_pixels_of_the_original(started: Started) -> None:
    answer = started.post("detector/detect", picture("red", (300, 200))).json()
    assert (answer["width"], answer["height"]) == (300, 200)
    assert [row["label"] for row in answer["detections"]] == ["dog", "cat"]
    assert [row["category_id"] for row in answer["detections"]] == [18, 17]
    for row, relative in zip(answer["detections"], BOXES, strict=True):
        assert row["box"] == pytest.approx(np.array(relative) * (300, 200, 300, 200))
    fewer = started.post("detector/detect?score_threshold=0.7", picture("red")).json()
    assert [row["label"] for row in fewer["detections"]] == ["dog"]


def test_server_and_model_metadata(started: Started, classifier: Path) -> None:
    assert started.http.get("/v2").json()["name"] == "cspnet"
    about = started.http.get("/v2/models/detector").json()
    assert about["name"] == "detector" and about["versions"] == ["1"] and about["platform"] == "onnxruntime_onnx"
    assert about["inputs"] == [{"name": "images", "datatype": "BYTES", "shape": [-1]}]
    assert {"name": "scores", "datatype": "FP32", "shape": [-1, -1]} in about["outputs"]
    parameters = about["parameters"]
    assert parameters["task"] == "detection" and parameters["score_threshold"] == 0.5
    assert parameters["classes"] == ["cat", "dog"]
    with Client(started.service.url) as client:
        artifact = client.artifact("classifier")
    assert artifact == OnnxModel(classifier, "cpu").metadata


def test_health_and_index(started: Started) -> None:
    assert started.http.get("/v2/health/live").status_code == 200
    assert started.http.get("/v2/health/ready").status_code == 200
    index = started.http.post("/v2/repository/index").json()
    assert started.http.post("/v2/repository/index", json={"ready": True}).json() == index
    check_error(started.http.post("/v2/repository/index", json={"ready": "yes"}), 400, '{"ready": true}')
    assert {row["name"]: (row["task"], row["state"]) for row in index} == {
        "classifier": ("classification", "READY"),
        "detector": ("detection", "READY"),
        "slow": ("classification", "READY"),
    }


BAD_BODIES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "empty": (lambda: b"", 400, "empty"),
    "truncated": (lambda: noise_jpeg()[:2000], 422, "cannot be decoded"),
    "garbage": (lambda: bytes(range(256)) * 20, 422, "cannot be decoded"),
    "html": (lambda: b"<!doctype html><title>no image</title>", 422, "cannot be decoded"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "cannot be decoded"),
    "huge": (huge_png, 422, "pixels than the limit"),
}


@pytest.mark.parametrize("path", ["classifier/classify", "detector/detect"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(started: Started, name: str, path: str) -> None:
    body, status, words = BAD_BODIES[name]
    check_error(started.post(path, body()), status, words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("classifier/detect", "/v2/models/classifier/classify"),
        ("detector/classify", "/v2/models/detector/detect"),
        ("classifier/classify?top_k=0", "top_k='0' is not an integer from 1"),
        ("classifier/classify?top_k=many", "top_k='many'"),
        ("classifier/classify?topk=3", "did you mean 'top_k'"),
        ("detector/detect?score_threshold=0.1", "from 0.5 to 1"),
        ("detector/detect?score_threshold=nan", "score_threshold='nan'"),
    ],
)
def test_400_names_the_remedy(started: Started, path: str, words: str) -> None:
    check_error(started.post(path, picture("red")), 400, words)


def test_the_page(started: Started) -> None:
    page = started.http.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<!doctype html>" in page.text[:100].lower()
    check_error(started.http.post("/"), 405, "use GET, HEAD")


def test_openapi_is_of_what_is_there(started: Started) -> None:
    document = started.http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            name = "detector" if path.endswith("/detect") else "classifier"
            answer = started.http.request(method, path.format(model=name, version="1"))
            assert answer.status_code in (200, 400), (method, path, answer.text)  # POST has an empty body
            assert str(answer.status_code) in methods[method]["responses"], (method, path)
    assert "openapi.json" in started.http.get("/docs").text


def test_prometheus_reads_what_the_replicas_did(started: Started) -> None:
    assert started.post("detector/detect", picture("red")).status_code == 200
    assert started.post("detector/detect", b"nothing").status_code == 422
    wait_for_metrics(
        started,
        r'ray_cspnet_requests_total{.*action="detect".*code="200".*} [1-9]',
        r'ray_cspnet_requests_total{.*action="detect".*code="422".*} [1-9]',
        *(
            rf'ray_cspnet_stage_seconds_count{{.*stage="{stage}".*}} [1-9]'
            for stage in ("decode", "queue", "run", "encode")
        ),
        r"ray_cspnet_batch_images_count{.*} [1-9]",
        r"ray_cspnet_waiting_images{.*} 0",
        r'ray_cspnet_replica{.*provider="CPUExecutionProvider".*} 1',
    )


def wait_for_metrics(started: Started, *patterns: str) -> None:
    wanted, deadline = [*patterns], time.monotonic() + 60
    while wanted:
        said = started.prometheus()
        wanted = [pattern for pattern in wanted if not re.search(pattern, said)]
        assert time.monotonic() < deadline, wanted
        time.sleep(1)


def test_404_and_405(started: Started) -> None:
    check_error(started.post("nothing/classify", b"x"), 404, "'nothing'", "classifier, detector, slow")
    check_error(started.post("classifier/segment", b"x"), 404, "'segment'", "classify")
    check_error(started.http.get("/v2/nothing"), 404)
    wrong = started.http.get("/v2/models/classifier/classify")
    check_error(wrong, 405, "use POST")
    assert wrong.headers["allow"] == "POST"
    check_error(started.http.delete("/v2/models/classifier"), 405)
    check_error(started.http.get("/v2/repository/index"), 405)


def test_413_by_length_and_by_counting(started: Started) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 20_000

    check_error(started.post("classifier/classify", b"x" * (MAX_BODY + 1)), 413, str(MAX_BODY))
    check_error(started.http.post("/v2/models/classifier/classify", content=chunks()), 413, str(MAX_BODY))
    declared = _raw(started.service.url, b"content-length: 100000000\r\n\r\nabc")
    assert declared.startswith(b"HTTP/1.1 413"), declared  # answered before the rest was sent


def _raw(url: str, rest: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v2/models/classifier/classify HTTP/1.1\r\nhost: x\r\n" + rest)
        return connection.recv(4096)


def test_a_form_and_base64(started: Started) -> None:
    alone = started.post("classifier/classify", picture("red")).json()
    form = started.http.post("/v2/models/classifier/classify", files={"image": picture("red")})
    assert form.json() == alone
    several = {"images": [base64.b64encode(body).decode() for body in (picture("red"), b"nothing", picture("blue"))]}
    results = started.http.post("/v2/models/classifier/classify?top_k=1", json=several).json()["results"]
    assert [entry["name"] for entry in results] == ["images[0]", "images[1]", "images[2]"]
    assert [entry.get("predictions", [{}])[0].get("label") for entry in results] == ["red", None, "blue"]
    assert "cannot be decoded" in results[1]["error"]
    wrong = started.http.post("/v2/models/classifier/classify", json={"img": ""})
    check_error(wrong, 400, "something else than images")


def test_class_filter(started: Started) -> None:
    found = started.post("detector/detect?classes=cat", picture("red")).json()
    assert [row["label"] for row in found["detections"]] == ["cat"]
    ranked = started.post("classifier/classify?classes=blue,0", picture("red")).json()
    assert [row["label"] for row in ranked["predictions"]] == ["red", "blue"]
    check_error(started.post("detector/detect?classes=cow", picture("red")), 400, "unknown class 'cow'")


def test_an_annotated_picture(started: Started) -> None:
    response = started.post("detector/detect?annotate=png", picture("green", (60, 40)))
    assert response.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as drawn:
        assert drawn.size == (60, 40)
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(4000) or ()}
    assert RGB["green"] in colours and len(colours) > 2
    check_error(started.post("detector/detect?annotate=gif", picture("red")), 400, "'gif'", "jpeg, png")
    check_error(started.post("classifier/classify?annotate=png", picture("red")), 400, "'annotate'")


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient(started: Started, binary: bool) -> None:
    """The Open Inference Protocol's own client, all of what it can ask."""
    triton = tritonclient.http.InferenceServerClient(started.service.url.removeprefix("http://"))
    assert triton.is_server_live() and triton.is_server_ready()
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert {model["name"] for model in triton.get_model_repository_index()} == {"classifier", "detector", "slow"}
    for version in ("", "1"):
        assert triton.is_model_ready("detector", version)
        about = triton.get_model_metadata("detector", version)
        images = tritonclient.http.InferInput("images", [2], "BYTES")
        images.set_data_from_numpy(np.array([picture("red", (60, 40)), picture("blue", (30, 90))], object))
        outputs = [tritonclient.http.InferRequestedOutput(o["name"], binary_data=binary) for o in about["outputs"]]
        found = triton.infer(
            "detector", [images], version, outputs, request_id="7", parameters={"score_threshold": 0.8}
        )
        assert found.get_response()["id"] == "7"
        np.testing.assert_array_equal(found.as_numpy("num_detections"), [1, 1])
        for row, body in enumerate((picture("red", (60, 40)), picture("blue", (30, 90)))):
            (alone,) = started.post("detector/detect?score_threshold=0.8", body).json()["detections"]
            np.testing.assert_array_equal(found.as_numpy("boxes")[row, 0], np.float32(alone["box"]))
            assert found.as_numpy("scores")[row, 0] == np.float32(alone["score"])
    assert not triton.is_model_ready("detector", "2")
    assert not triton.is_model_ready("nothing")
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture("blue", (60, 40)))))])
    raw = tritonclient.http.InferInput("images", list(pixels.shape), "UINT8")
    raw.set_data_from_numpy(pixels, binary_data=binary)
    best = triton.infer("classifier", [raw], parameters={"top_k": 1})
    assert best.as_numpy("labels").tolist() == [[b"blue"]]
    with pytest.raises(tritonclient.utils.InferenceServerException, match="element 1 of 2: image cannot be decoded"):
        broken = tritonclient.http.InferInput("images", [2], "BYTES")
        broken.set_data_from_numpy(np.array([picture("red"), b"nothing"], object))
        triton.infer("classifier", [broken])
    with pytest.raises(tritonclient.utils.InferenceServerException, match="unknown output 'boxs'"):
        triton.infer("detector", [images], outputs=[tritonclient.http.InferRequestedOutput("boxs")])
    triton.close()


def test_one_bad_image_among_sixteen(started: Started) -> None:
    colours = [COLOURS[i % 3] for i in range(48)]
    bad = {5, 21, 40}

    def ask(i: int) -> httpx.Response:
        return started.post("classifier/classify", b"no image" if i in bad else picture(colours[i], (40 + i, 50)))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(48)))
    for i, answer in enumerate(answers):
        if i in bad:
            check_error(answer, 422)
        else:
            assert answer.json()["predictions"][0]["label"] == colours[i]


def test_408_when_the_model_is_slow(started: Started) -> None:
    began = time.monotonic()
    check_error(started.post("slow/classify", picture("red")), 408, "0.4 s")
    assert time.monotonic() - began < 4 * SLOW_TIMEOUT_S
    header = {"x-request-timeout-seconds": "0.05"}  # Ray's own answer, said as ours
    check_error(started.post("slow/classify", picture("red"), headers=header), 408, "time limit")


def test_503_at_once_when_overloaded(started: Started) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: started.post("slow/classify", picture("red")), range(8)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and {answer.status_code for answer in answers} == {408, 503}
    for answer in refused:
        check_error(answer, 503, "try again")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.elapsed.total_seconds() < SLOW_TIMEOUT_S
    # The others are not held up, and the slow one is itself again.
    assert started.post("classifier/classify", picture("red")).status_code == 200
    wait_for_metrics(started, r'ray_cspnet_refused_total{.*application="slow".*code="503".*} [1-9]')


def test_a_client_that_goes_away_harms_nobody(started: Started) -> None:
    host, port = started.service.url.removeprefix("http://").split(":")
    for _ in range(8):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v2/models/classifier/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n"
            )
            connection.sendall(picture("red")[:40])
    assert started.post("classifier/classify", picture("red")).status_code == 200


def test_stop_leaves_nothing_behind(started: Started) -> None:
    """The last test of this file: it ends the service."""
    below = [process for process in tree(os.getpid()) if process.pid != os.getpid()]
    # Python's own, of another file's process pool in this worker, ends with the worker.
    before = [process for process in below if "multiprocessing.resource_tracker" not in process.command()]
    assert len(before) > 5
    began = time.monotonic()
    started.service.stop()
    assert time.monotonic() - began < 15
    deadline = time.monotonic() + 5
    while left := [process for process in before if process.alive()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
    port = int(started.service.url.rsplit(":", 1)[1])
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
    started.service.stop()  # again, harmless
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ray_listen")]
