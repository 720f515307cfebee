"""The Open Inference Protocol's gRPC service as Ray's servers take it: who may call which application, and errors as
status codes; no torch here.

Ray's own gRPC servers, in its proxy and in each replica, hand a call to the method of its name, of the application that
the metadata `application` names. The protocol's clients do not send that: it is set here, or by `serving.ingress.grpc`.
"""

from collections.abc import Awaitable
from typing import Any, TypeAlias

import grpc

from serving.api.oip_grpc import MESSAGES, METHODS, PACKAGE, SERVICE, read
from serving.api.protocol import OVERLOADED, Refusal, attempt, refused
from serving.ingress import keys

FRONT = "_front"  # the application that is no model; no model's name, which starts with a letter or digit
APPLICATION = "application"  # of the metadata
NO_MODEL = "no model of this name here: RepositoryIndex lists them"
OF_A_MODEL = tuple(method for method in METHODS if method.startswith("Model"))
_OPEN = ("ServerLive", "ServerReady")  # without a key, as over HTTP
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
Context: TypeAlias = Any  # Ray's, or gRPC's


def grpc_options(port: int, timeout_s: float) -> dict[str, Any]:
    """What Ray takes as such, to serve this on `port`."""
    return {
        "port": port,
        "grpc_servicer_functions": [f"{__name__}:add_to_server"],
        "request_timeout_s": timeout_s,
        "enable_reflection": False,  # it knows generated messages only
    }


async def answer(method: str, work: Awaitable[Any], context: Context, timeout_s: float) -> tuple[Any, int]:
    """The method's message, and the status that HTTP would have; of a refusal the message is empty and its status is in
    `context`.

    Args:
        work: its message, or the fields of one among others; or it raises as an HTTP handler does.
    """
    kind = MESSAGES[f"{method}Response"]
    answered = await attempt(work, timeout_s, method)
    if isinstance(answered, Refusal):
        context.set_code(_CODES.get(answered.status, grpc.StatusCode.INTERNAL))
        context.set_details(answered.message)
        return kind(), answered.status
    if isinstance(answered, dict):
        return kind(**{name: answered[name] for name in kind.DESCRIPTOR.fields_by_name}), 200
    return answered, 200


def add_to_server(_: object, server: Any) -> None:
    """Register the service with a server of Ray's, which has the calls handled by replicas."""
    settings = keys.settings_of_environment()
    server.add_generic_rpc_handlers((_Handlers(keys.Gate(**settings) if settings else None),))


class _Handlers(grpc.GenericRpcHandler):
    """Requests are passed on as bytes, which the replica reads."""

    def __init__(self, gate: keys.Gate | None):
        self._gate = gate
        # Ray replaces what is in here by its own handlers.
        self._method_handlers = {
            f"/{PACKAGE}.{SERVICE}/{method}": grpc.unary_unary_rpc_method_handler(None) for method in METHODS
        }

    def service(self, handler_call_details: Any) -> Any:
        path = handler_call_details.method
        handler = self._method_handlers.get(path)
        if handler is None:
            return None  # UNIMPLEMENTED
        method, serve = path.rpartition("/")[2], handler.unary_unary

        async def call(request: bytes, context: Context) -> bytes:
            try:
                if self._gate is not None and method not in _OPEN:
                    self._gate.count(self._gate.who(_headers(context)))
                addressed = _Addressed(context, method, request)
            except Refusal as refusal:
                await context.abort(_CODES[refusal.status], refusal.message)
            answered = await serve(request, addressed)
            _translate(context)
            return bytes(answered)

        return grpc.unary_unary_rpc_method_handler(call)


class _Addressed:
    """gRPC's context of a call, with the application that Ray is to look for."""

    def __init__(self, context: Context, method: str, request: bytes):
        self._context = context
        self._metadata = tuple(context.invocation_metadata() or ())
        if APPLICATION not in dict(self._metadata):
            self._metadata += ((APPLICATION, _application(method, request)),)

    def invocation_metadata(self) -> Any:
        return self._metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _application(method: str, request: bytes) -> str:
    if method not in OF_A_MODEL:
        return FRONT
    with refused():
        message = read(f"{method}Request", request)
    return message.model_name if method == "ModelInfer" else message.name


def _headers(context: Context) -> dict[bytes, bytes]:
    return {
        name.encode(): value if isinstance(value, bytes) else value.encode()
        for name, value in context.invocation_metadata() or ()
    }


def _translate(context: Context) -> None:
    """Ray's own refusals, as this service has them."""
    details = context.details() or ""
    if details.startswith("Request dropped due to backpressure"):
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(OVERLOADED)
    elif details.startswith("Application "):
        context.set_details(NO_MODEL)
