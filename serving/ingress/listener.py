"""The listening socket of a service, which outlives the HAProxy that accepts from it; no Ray, no torch here."""

import array
import contextlib
import json
import os
import select
import shlex
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from backbones.errors import InputError
from serving.api.protocol import RETRY_AFTER_S
from serving.ingress import haproxy

PROGRAM = "haproxy"  # what Ray is to start as HAProxy
POLL_S = 0.02
LONGEST_SCRATCH = 27  # of a socket's 107 bytes: Ray adds the node's id and a name, HAProxy its process id
BACKLOG = 4096  # connections that wait for a HAProxy, or as many as net.core.somaxconn allows
ERRORS = {  # HAProxy's own answers, but for 400 to what is no HTTP at all
    408: f"the request came too slowly: send its headers within {haproxy.HEADERS_S} s",
    500: "internal error",
    502: "a replica ended before it answered: try again",
    503: "no replica is ready: try again",
    504: "no answer within the time limit: try again, send less at once, or raise timeout_s in the config",
}
_PEER = "3i"  # struct ucred: pid, uid, gid


class Ingress:
    """Hands `listener` to each HAProxy that Ray starts by way of `PROGRAM`, and stops them without losing a request.

    Args:
        listener: bound; it belongs to the ingress from now on.
        scratch: a folder of its own, for `PROGRAM`, a socket and small files.
        binary: HAProxy.
        configs: files for it to read after Ray's.

    Raises:
        InputError: the folder's path is too long for sockets in it.
    """

    def __init__(self, listener: socket.socket, scratch: Path, binary: str, configs: Sequence[Path] = ()):
        if len(str(scratch)) > LONGEST_SCRATCH:
            raise InputError(f"{scratch} is too long for HAProxy's sockets: set TMPDIR to a shorter path, such as /tmp")
        self._listener, self._running = listener, list[int]()  # as pidfds
        listener.listen(BACKLOG)
        channel, errors = scratch / "listener.sock", scratch / "errors"
        errors.mkdir()
        for status, message in ERRORS.items():
            (errors / f"{status}.http").write_bytes(_answer(status, message))
        program = scratch / PROGRAM
        command = [sys.executable, "-I", haproxy.__file__, binary, str(channel), str(errors)]
        further = shlex.join(part for config in configs for part in ("-f", str(config)))
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@" {further}\n')
        program.chmod(0o700)
        self._channel = socket.socket(socket.AF_UNIX)
        self._channel.bind(str(channel))
        self._channel.listen()
        self._thread = threading.Thread(target=self._hand_over, name="ingress", daemon=True)
        self._thread.start()

    def drain(self, timeout_s: float) -> None:
        """Accept no more, and return once what was accepted is answered, or after `timeout_s`."""
        self.close()
        deadline = time.monotonic() + timeout_s
        self._forget_ended()
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGUSR1)  # a soft stop
        while self._running and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._forget_ended()

    def close(self) -> None:
        """Hand the listener to nobody any more; harmless when repeated."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._thread.join()
        self._channel.close()
        self._listener.close()

    def _forget_ended(self) -> None:
        """A pidfd can be read from once its process has ended."""
        poll = select.poll()
        for process in self._running:
            poll.register(process, select.POLLIN)
        for process, _ in poll.poll(0):
            self._running.remove(process)
            os.close(process)

    def _hand_over(self) -> None:
        while True:
            try:
                connection, _ = self._channel.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):  # it ended meanwhile
                self._forget_ended()
                peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_PEER))
                self._running.append(os.pidfd_open(struct.unpack(_PEER, peer)[0]))
                descriptors = array.array("i", [self._listener.fileno()])
                connection.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def _answer(status: int, message: str) -> bytes:
    """A whole HTTP response."""
    body = json.dumps({"error": message})
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *([f"Retry-After: {RETRY_AFTER_S}"] if status == 503 else []),
        "Cache-Control: no-cache",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", body]).encode()
