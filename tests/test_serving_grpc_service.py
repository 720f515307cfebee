"""What stands before Ray's gRPC servers: HAProxy, which names the application, and the handlers that ask for a key."""

import asyncio
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from serving.api.oip_grpc import MESSAGES
from serving.config import ServedModel, ServingConfig
from serving.ingress.grpc import write_frontend
from serving.service.environment import find_haproxy
from serving.service.grpc_service import add_to_server

SERVICE = "/inference.GRPCInferenceService"
KEY = "a-key-of-some-length"


def infer(name: str, size: int = 0) -> bytes:
    return bytes(MESSAGES["ModelInferRequest"](model_name=name, raw_input_contents=[bytes(size)]).SerializeToString())


def ready(name: str) -> bytes:
    return bytes(MESSAGES["ModelReadyRequest"](name=name).SerializeToString())


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Echo(grpc.GenericRpcHandler):
    """Answers with the application and the size of the message; `missing` is told as Ray tells it."""

    def service(self, handler_call_details: Any) -> Any:
        def answer(request: bytes, context: Any) -> bytes:
            application = dict(context.invocation_metadata()).get("application", "")
            if application == "missing":
                context.abort(grpc.StatusCode.NOT_FOUND, "Application 'missing' not found. Ping somebody.")
            return f"{application} {len(request)}".encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture(scope="module")
def through_haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., bytes]]:
    """A call through the frontend, with `Echo` in the place of Ray's."""
    folder, port, behind = tmp_path_factory.mktemp("haproxy"), free_port(), free_port()
    haproxy = find_haproxy()
    if haproxy is None:
        pytest.skip("no HAProxy")
    (folder / "ray.cfg").write_text("defaults\n  mode http\n  timeout client 5s\n")
    frontend = write_frontend(folder, "127.0.0.1", port, behind)
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Echo(),))
    server.add_insecure_port(f"127.0.0.1:{behind}")
    server.start()
    with open(folder / "log", "w+") as log, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        process = subprocess.Popen([haproxy, "-db", "-f", folder / "ray.cfg", "-f", frontend], stdout=log, stderr=log)
        try:
            grpc.channel_ready_future(channel).result(20)

            def call(method: str, message: bytes, **kwargs: Any) -> bytes:
                path = method if method.startswith("/") else f"{SERVICE}/{method}"
                return bytes(channel.unary_unary(path)(message, timeout=20, **kwargs))

            yield call
        finally:
            process.terminate()
            process.wait(10)
            server.stop(None).wait()
    warnings = [line for line in (folder / "log").read_text().splitlines() if "[WARNING]" in line or "[ALERT]" in line]
    assert not [line for line in warnings if "config :" in line]


def test_the_model_is_read_from_the_message(through_haproxy: Callable[..., bytes]) -> None:
    for name in ("classifier", "Det.a_b-1", "9"):
        for size in (0, 100, 20_000, 5_000_000):
            assert through_haproxy("ModelInfer", infer(name, size)) == f"{name} {len(infer(name, size))}".encode()
        assert through_haproxy("ModelReady", ready(name)).startswith(f"{name} ".encode())
        assert through_haproxy("ModelMetadata", ready(name)).startswith(f"{name} ".encode())


def test_the_servers_own_calls_go_to_the_front(through_haproxy: Callable[..., bytes]) -> None:
    for method in ("ServerLive", "ServerReady", "ServerMetadata", "RepositoryIndex", "Other"):
        assert through_haproxy(method, b"") == b"_front 0"
    with pytest.raises(grpc.RpcError) as raised:
        through_haproxy("/ray.serve.RayServeAPIService/ListApplications", b"")
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert through_haproxy("ServerLive", b"", metadata=[("application", "classifier")]) == b"_front 0"


@pytest.mark.parametrize("name", ["", "missing", "_front", "a b", "a\r\nx-api-key: b", "é", "n" * 20_000])
def test_what_is_no_model_is_not_found(through_haproxy: Callable[..., bytes], name: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        through_haproxy("ModelInfer", infer(name))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert raised.value.details() == "no model of this name here: RepositoryIndex lists them"


@pytest.mark.parametrize("message", [b"", b"\xff\xff\xff", b"garbage" * 5000])
def test_no_message_is_not_found(through_haproxy: Callable[..., bytes], message: bytes) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        through_haproxy("ModelInfer", message)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_compressed_messages_are_refused(through_haproxy: Callable[..., bytes]) -> None:
    """HAProxy cannot read the model's name in them."""
    with pytest.raises(grpc.RpcError) as raised:
        through_haproxy("ModelInfer", infer("classifier", 100_000), compression=grpc.Compression.Gzip)
    assert (raised.value.code(), raised.value.details()) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "send messages uncompressed",
    )


def test_ports_differ() -> None:
    models = (ServedModel(name="m", artifact="m.onnx"),)
    assert ServingConfig(models=models).grpc_port is None  # serves none
    with pytest.raises(ValueError, match="port and grpc_port are both 8001: give each its own"):
        ServingConfig(models=models, port=8001, grpc_port=8001)


class Server:
    """In the place of Ray's server: hands calls to `answer`."""

    def __init__(self, server: Any, answer: Any):
        self.server, self.answer = server, answer

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        methods = handlers[0]._method_handlers
        for path in methods:
            methods[path] = grpc.unary_unary_rpc_method_handler(self.answer)
        self.server.add_generic_rpc_handlers(handlers)


async def calls(answer: Any, *messages: tuple[str, bytes, list[tuple[str, str]]]) -> list[tuple[Any, str]]:
    """The codes and, of those that failed, the details of calls in a row; else the answers."""
    server = grpc.aio.server()
    add_to_server(None, Server(server, answer))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    answers: list[tuple[Any, str]] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method, message, metadata in messages:
            try:
                text = await channel.unary_unary(f"{SERVICE}/{method}")(message, metadata=metadata, timeout=20)
                answers.append((grpc.StatusCode.OK, text.decode()))
            except grpc.aio.AioRpcError as error:
                answers.append((error.code(), error.details() or ""))
    await server.stop(None)
    return answers


async def application(_: bytes, context: Any) -> bytes:
    return str(dict(context.invocation_metadata())["application"]).encode()


def test_handlers_name_the_application_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CSPNET_API_KEYS", raising=False)
    said = asyncio.run(
        calls(
            application,
            ("ModelInfer", infer("detector"), []),
            ("ModelReady", ready("detector"), []),
            ("ServerReady", b"", []),
            ("ModelInfer", infer("detector"), [("application", "given")]),
            ("ModelInfer", b"\xff", []),
            ("ModelConfig", b"", []),
        )
    )
    assert [text for _, text in said[:4]] == ["detector", "detector", "_front", "given"]
    assert said[4][0] == grpc.StatusCode.INVALID_ARGUMENT
    assert "is no inference.ModelInferRequest" in said[4][1]
    assert said[5][0] == grpc.StatusCode.UNIMPLEMENTED


def test_keys_and_their_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"ann:{KEY}\n")
    keys.chmod(0o600)
    monkeypatch.setenv("CSPNET_API_KEYS", str(keys))
    monkeypatch.setenv("CSPNET_RATE_LIMIT", "0.01/2")
    asked = ("ModelReady", ready("m"))
    said = asyncio.run(
        calls(
            application,
            ("ServerLive", b"", []),
            ("ServerReady", b"", []),
            ("RepositoryIndex", b"", []),
            (*asked, [("x-api-key", "not-the-right-one")]),
            (*asked, [("x-api-key", KEY)]),
            (*asked, [("authorization", f"Bearer {KEY}")]),
            (*asked, [("x-api-key", KEY)]),
        )
    )
    assert [code.name for code, _ in said] == [
        "OK", "OK", "UNAUTHENTICATED", "UNAUTHENTICATED", "OK", "OK", "RESOURCE_EXHAUSTED",
    ]  # fmt: skip
    assert "an API key is needed" in said[2][1]


def test_rays_own_refusals_are_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CSPNET_API_KEYS", raising=False)

    async def overloaded(_: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        context.set_details("Request dropped due to backpressure (num_queued_requests=1)")
        return b""

    async def unknown(_: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("Application 'm' not found. Ping somebody.")
        return b""

    ((code, text),) = asyncio.run(calls(overloaded, ("ModelReady", ready("m"), [])))
    assert (code, "the queue is full" in text) == (grpc.StatusCode.UNAVAILABLE, True)
    ((code, text),) = asyncio.run(calls(unknown, ("ModelReady", ready("m"), [])))
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "no model of this name here: RepositoryIndex lists them")
