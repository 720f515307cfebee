"""The page: self-contained, and in a real browser what it asks, draws and says; against a scripted server.

All but the first tests need playwright and an installed Chromium, and are skipped without.
"""

import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import SIZE
from PIL import ExifTags, Image
from pycocotools import mask as coco_masks

from backbones.preprocess import ClassifierPreprocess
from detection.masks import encode
from serving.api import schemas
from serving.artifact import ClassifierArtifact, DetectorArtifact, Parity
from serving.predictor import Classification, Detections
from serving.service import front

PAGE = Path(front.__file__).with_name("page.html")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
HOSTILE = "<img src=x onerror=document.title='owned'>"

COMMON: dict[str, Any] = {
    "opset": 18,
    "gmacs": 5.04,
    "weights_sha256": "0123456789abcdef" * 4,
    "config": {},
    "versions": {},
    "parity": Parity(batch_sizes=(1, 2), images=3, largest={"logits": 0.0000031}),
}
CLASSIFIER = ClassifierArtifact(
    model="cspresnet50",
    classes=("tabby cat", "tiger cat, a cat with a name of some length", HOSTILE, "lynx", "fox", "dog"),
    preprocess=ClassifierPreprocess(resize=292, crop=256),
    **COMMON,
)
DETECTOR = DetectorArtifact(
    model="fasterrcnn_cspresnet50_fpn",
    classes=("person", "dog", "dining table"),
    category_ids=(1, 18, 67),
    preprocess=SIZE,
    score_threshold=0.05,
    nms_iou=0.5,
    max_detections=100,
    canvases=((128, 128),),
    masks=True,
    **COMMON,
)
WIDTH, HEIGHT = 600, 800  # of the upright picture
BOXES = ((60.0, 80.0, 300.0, 400.0), (330.5, 20.0, 590.0, 700.0), (0.0, 600.0, 200.0, 800.0))
SCORES = (0.93, 0.61, 0.07)
MASKS = np.zeros((len(BOXES), HEIGHT, WIDTH), np.uint8)
MASKS[0, 90:200, 70:290] = 1
MASKS[0, 150:170, 100:120] = 0
MASKS[1, 20:700, 331:590] = np.tri(680, 259)
MASKS[2, 600:, :200] = 1


def classified() -> schemas.ClassifyAnswer:
    scores = np.array([0.9, 0.05, 0.03, 0.01, 0.006, 0.004], np.float32)
    return schemas.classify_answer(CLASSIFIER, Classification(np.arange(6), scores))


def detected() -> schemas.DetectAnswer:
    boxes, scores = np.array(BOXES, np.float32), np.array(SCORES, np.float32)
    found = Detections(boxes, scores, np.array([1, 0, 2]), (HEIGHT, WIDTH), encode(MASKS))
    return schemas.detect_answer(DETECTOR, found)


def photograph() -> bytes:
    """Upright it is `WIDTH` x `HEIGHT`, stored it lies on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gradient = np.linspace(60, 220, HEIGHT, dtype=np.uint8)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(np.tile(gradient, (WIDTH, 1, 3))).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


class Service(BaseHTTPRequestHandler):
    """The page, two models, and what a test scripts: `answers` by path go first, the last of them for ever."""

    protocol_version = "HTTP/1.1"
    answers: dict[str, list[tuple[int, Any]]]
    seen: list[tuple[str, dict[str, str], bytes]]
    key: str | None
    delay_s: float

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/":
            return self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        self.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if self.key and self.headers.get("x-api-key") != self.key:
            return self._send(401, {"error": "no valid API key: send one as X-API-Key"})
        scripted = self.answers.get(self.path)
        if scripted:
            return self._send(*(scripted.pop(0) if len(scripted) > 1 else scripted[0]))
        time.sleep(self.delay_s)
        return self._send(200, CANNED[self.path]())

    def _send(self, status: int, value: Any, kind: str = "application/json") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        if status == 503:
            self.send_header("retry-after", "2")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _reply

    def log_message(self, *_: object) -> None:
        pass


def index(state: str = "READY", reason: str = "") -> list[dict[str, str]]:
    names = (("cats", "classification"), ("things", "detection"))
    return [{"name": n, "version": "1", "state": state, "reason": reason, "task": task} for n, task in names]


def card(name: str, artifact: ClassifierArtifact | DetectorArtifact) -> dict[str, Any]:
    parameters = {
        "task": artifact.task,
        "model": artifact.model,
        "provider": "cpu",
        "preprocess": str(artifact.preprocess),
        "classes": artifact.classes,
        "score_threshold": getattr(artifact, "score_threshold", None),
        "max_body_bytes": 100_000,
        "metadata": artifact.model_dump(mode="json"),
    }
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [-1, 256, 256, 3]}]
    return {"name": name, "versions": ["1"], "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": [],
            "parameters": parameters}  # fmt: skip


INDEX, CARDS, CLASSIFY, DETECT = (
    "/v2/repository/index",
    "/v2/models/",
    "/v2/models/cats/classify?top_k=5",
    "/v2/models/things/detect",
)
CANNED: dict[str, Callable[[], Any]] = {
    INDEX: index,
    f"{CARDS}cats": lambda: card("cats", CLASSIFIER),
    f"{CARDS}things": lambda: card("things", DETECTOR),
    CLASSIFY: classified,
    DETECT: detected,
}


@pytest.fixture
def service() -> Iterator[Any]:
    handler: Any = type("Scripted", (Service,), {"answers": {}, "seen": [], "key": None, "delay_s": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}/"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: uv sync")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no Chromium, none of {', '.join(BROWSERS)}: apt-get install {BROWSERS[0]}")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, service: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(**context)`: the page in a tab of its own. Scripts' errors and what the CSP stopped fail the test."""
    contexts, complaints = [], []

    def listen(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:  # statuses that a test asked for
            complaints.append(message.text)

    def open_(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(service.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def choose(page: Any, content: bytes | None = None, name: str = "photo.jpg", kind: str = "image/jpeg") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content or photograph()})


def says(page: Any, text: str, where: str = "#status") -> None:
    page.wait_for_function("([where, text]) => document.querySelector(where).textContent.includes(text)",
                           arg=[where, text])  # fmt: skip


def asked(service: Any, path: str) -> list[tuple[str, dict[str, str], bytes]]:
    return [request for request in service.seen if request[0] == path]


def test_is_one_small_file_that_asks_for_nothing_else():
    text = PAGE.read_text()
    assert len(text.encode()) < 25_000
    assert set(re.findall(r"https?://[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert set(re.findall(r"(?:src|href)=[\"']([^\"']*)", text)) == {"data:,", "docs"}
    assert not re.search(r"url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"\son\w+=", text)  # handlers that a CSP without unsafe-inline would stop
    assert not re.search(r"localStorage|document\.cookie", text)


def test_has_a_content_security_policy_before_anything_it_governs():
    text = PAGE.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy.start() < text.index("<link") < text.index("<style>")
    assert set(policy[1].split("; ")) == {
        "default-src 'none'", "style-src 'unsafe-inline'", "script-src 'unsafe-inline'", "img-src blob: data:",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'",
    }  # fmt: skip


def test_a_picture_gets_its_best_classes(open_page, service):
    page = open_page()
    says(page, "Ready for a picture")
    choose(page)
    says(page, "tabby cat, 90.0%")
    assert re.search(r"Answered in \d+\sms", page.inner_text("#status"))
    [(_, headers, body)] = asked(service, CLASSIFY)
    assert body == photograph()
    assert headers["content-type"] == "image/jpeg" and "x-api-key" not in headers
    assert page.locator("#best .name").all_inner_texts() == list(CLASSIFIER.classes[:5])  # the hostile one as text
    widths = [box["width"] for box in map(lambda bar: bar.bounding_box(), page.locator("#best .bar, #best i").all())]
    assert widths[1] / widths[0] == pytest.approx(0.9, abs=0.01)
    assert page.title() == "cspnet"
    text = page.locator("#about").text_content()
    for said in ("cspresnet50", "onnxruntime_onnx", "cpu", "resize 292", "[any, 256, 256, 3]", "logits 0.0000031"):
        assert said in text


def test_detections_are_drawn_in_pixels_of_the_upright_picture(open_page, service):
    page = open_page()
    says(page, "Ready")
    page.select_option("#model", "things")
    says(page, "Ready")
    choose(page)
    says(page, "3 detections of score 0.05 and above")
    assert page.get_attribute("#drawn", "viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    assert page.evaluate("[picture.naturalWidth, picture.naturalHeight]") == [WIDTH, HEIGHT]
    image = page.locator("#picture").bounding_box()
    rects = page.locator("#drawn rect.edge").all()[::-1]  # the best is drawn last
    for rect, (x1, y1, x2, y2) in zip(rects, BOXES, strict=True):
        assert [float(rect.get_attribute(k)) for k in ("x", "y", "width", "height")] == [x1, y1, x2 - x1, y2 - y1]
    scale = image["width"] / WIDTH
    assert image["height"] / HEIGHT == pytest.approx(scale, rel=0.01)
    left, top = page.evaluate(
        "e => [e.getBoundingClientRect().x, e.getBoundingClientRect().y]", rects[0].element_handle()
    )
    assert (left - image["x"], top - image["y"]) == pytest.approx(
        (60 * scale, 80 * scale), abs=6
    )  # half a line's width


def test_masks_are_those_of_the_run_lengths(open_page):
    page = open_page()
    says(page, "Ready")
    page.select_option("#model", "things")
    choose(page)
    says(page, "3 detections")
    painted = page.evaluate("""async ([width, height]) => {
        const masks = [];
        for (const image of [...document.querySelectorAll("#drawn image")].reverse()) {
            const canvas = new OffscreenCanvas(width, height).getContext("2d"), shown = new Image();
            shown.src = image.getAttribute("href");
            await shown.decode();
            canvas.drawImage(shown, ...["x", "y", "width", "height"].map((name) => image.getAttribute(name)));
            const { data } = canvas.getImageData(0, 0, width, height);
            masks.push(Array.from({ length: width * height }, (_, i) => Number(data[4 * i + 3] > 0)).join(""));
        }
        return masks;
    }""", [WIDTH, HEIGHT])  # fmt: skip
    for text, run in zip(painted, encode(MASKS), strict=True):
        pixels = np.frombuffer(text.encode(), np.uint8).reshape(HEIGHT, WIDTH) - ord("0")
        np.testing.assert_array_equal(pixels, coco_masks.decode(run))


def test_the_threshold_filters_without_asking_again(open_page, service):
    page = open_page()
    says(page, "Ready")
    page.select_option("#model", "things")
    choose(page)
    says(page, "0.50: 2 of 3 shown", "#kept")
    assert page.locator("#found .name:visible").all_inner_texts() == ["dog", "person"]
    page.focus("#threshold")
    page.keyboard.press("Home")
    says(page, "0.05: 3 of 3 shown", "#kept")  # no lower than what the artefact gives
    page.keyboard.press("End")
    says(page, "1.00: 0 of 3 shown", "#kept")
    assert page.locator("#drawn g:visible").count() == 0
    assert len(asked(service, DETECT)) == 1
    page.fill("#threshold", "0.62")
    choose(page)
    says(page, "0.62: 1 of 3 shown", "#kept")  # kept for the next picture


def test_by_keyboard_alone(open_page):
    page = open_page()
    files = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photograph()}
    page.on("filechooser", lambda chooser: chooser.set_files(files))
    says(page, "Ready")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "model"
    page.keyboard.press("ArrowDown")
    says(page, "Ready")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "drop"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    says(page, "3 detections")
    page.focus("#drop")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "threshold"
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('#drawn g.lit').textContent") == "dog 0.93"
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_may_be_dropped_or_pasted(open_page, service, event):
    page = open_page()
    says(page, "Ready")
    page.evaluate("""([event, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "note", { type: "application/json" }));
        document.dispatchEvent(event === "paste" ? new ClipboardEvent(event, { clipboardData: data })
            : new DragEvent(event, { dataTransfer: data, cancelable: true }));
    }""", [event, list(b"{}")])  # fmt: skip
    says(page, "tabby")
    [(_, headers, body)] = asked(service, CLASSIFY)
    assert (headers["content-type"], body) == ("application/octet-stream", b"{}")  # whatever it says to be
    page.wait_for_selector("#unseen:visible")


def test_errors_are_said_in_the_servers_words(open_page, service):
    service.answers[CLASSIFY] = [(503, {"error": "overloaded, the queue is full"}), (422, {"error": "no image"}),
                                 (502, b"<h1>Bad gateway</h1>"), (200, classified())]  # fmt: skip
    page = open_page()
    says(page, "Ready")
    choose(page)
    says(page, "overloaded, the queue is full (Retry-After: 2 s)", "#error")
    page.click("#again")
    says(page, "no image", "#error")
    assert not page.is_visible("#again")  # the same picture gets the same answer
    choose(page)
    says(page, "HTTP 502", "#error")
    page.click("#again")
    says(page, "tabby")
    assert not page.is_visible("#alert")
    choose(page, b"x" * 100_001)
    says(page, "101 kB, the server takes 100 kB", "#error")
    assert len(asked(service, CLASSIFY)) == 4  # the large one was not sent


def test_a_key_is_asked_for_and_kept_for_the_tab_only(open_page, service):
    service.key = "s3cret"
    page = open_page()
    page.wait_for_selector("#key:visible")
    says(page, "no valid API key", "#error")
    page.keyboard.type("wrong")  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('key').value === '' && document.activeElement.id === 'key'")
    page.fill("#key", "s3cret")
    page.keyboard.press("Enter")
    says(page, "Ready")
    choose(page)
    says(page, "tabby")
    assert asked(service, CLASSIFY)[0][1]["x-api-key"] == "s3cret"
    page.reload()
    says(page, "Ready")
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


def test_a_picture_waits_for_a_model_to_get_ready(open_page, service):
    service.answers[INDEX] = [(200, index("UNAVAILABLE", "DEPLOYING")), (200, index())]
    page = open_page()
    says(page, "No model is ready yet: cats (DEPLOYING), things (DEPLOYING)")
    assert page.is_disabled("#model")
    choose(page)
    says(page, "tabby")


def test_an_answer_to_an_older_picture_is_not_shown(open_page, service):
    page = open_page()
    says(page, "Ready")
    service.delay_s = 1.0
    choose(page)
    says(page, "Sending")
    service.delay_s = 0
    page.select_option("#model", "things")
    says(page, "3 detections")
    page.wait_for_timeout(1200)
    assert "3 detections" in page.inner_text("#status")
    assert not page.is_visible("#classes")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_narrow_phone_in_both_schemes(open_page, service, scheme):
    page = open_page(viewport={"width": 320, "height": 640}, is_mobile=True, has_touch=True, color_scheme=scheme,
                     reduced_motion="reduce")  # fmt: skip
    fits = "document.documentElement.scrollWidth <= 320"
    says(page, "Ready")
    choose(page)
    says(page, "tabby")
    page.click("summary")
    assert page.evaluate(fits)
    assert page.is_visible("#camera") and page.get_attribute("#photo", "capture") == "environment"
    page.select_option("#model", "things")
    says(page, "3 detections")
    assert page.evaluate(fits)
    service.answers[DETECT] = [(503, {"error": "overloaded: " + "x" * 200})]
    choose(page)
    says(page, "overloaded", "#error")
    assert page.evaluate(fits)
    dark = sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))) < 200
    assert dark == (scheme == "dark")
    assert page.evaluate("getComputedStyle(document.getElementById('busy'), '::after').animationName") == "none"
