"""Started by Ray Serve in place of HAProxy: mends the config that Ray wrote and becomes HAProxy; standard library only.

    python -I serving/ingress/haproxy.py BINARY LISTENER ERRORS [HAProxy's own arguments, with -f CONFIG among them]

`listener.py` writes the script that calls it. What Ray has no setting for:

- HAProxy listens on the socket that the service holds, so that connections wait while a HAProxy is replaced;
- its pages of metrics and statistics are on the loopback address, not on every interface;
- nobody is told the routes, which are the models' names: HAProxy answers before anyone is asked for a key;
- its own answers are JSON under their true status, where Ray has 502, 503 and 504 said as 500 in plain text;
- it finishes its requests and ends when the process that started it ends, even by SIGKILL.
"""

import array
import ctypes
import os
import re
import signal
import socket
import sys
from pathlib import Path

HEADERS_S = 30  # for a request's headers, which could come in drops for ever
NO_ROUTES = """status 404 content-type application/json string '{"error": "nothing at /-/routes: see GET /v2"}'"""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def receive_listener(path: str) -> int:
    """The descriptor of the listening socket, from the service."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(path)
        size = array.array("i").itemsize
        _, ancillary, *_ = channel.recvmsg(1, socket.CMSG_SPACE(size))
    if not ancillary:
        raise SystemExit("the service is stopping")
    (listener,) = array.array("i", ancillary[0][2][:size])
    os.set_inheritable(listener, True)
    return listener


def mend(config: str, listener: int, errors: Path) -> str:
    """Ray's config with the binds and error pages of this service.

    Raises:
        SystemExit: Ray writes something else by now.
    """
    # Before Ray has told it the routes, a new one would answer 404: it is to wait, on a socket that nobody knows.
    bind = f"fd@{listener}" if re.search(r"(?m)^ +use_backend ", config) else f"unix@{errors.parent}/no-routes.sock"
    own = f"    timeout http-request {HEADERS_S}s\n"
    own += "".join(f"    errorfile {path.stem} {path}\n" for path in sorted(errors.glob("*.http")))
    for pattern, wanted in (
        (r"(?m)(?<=^frontend prometheus\n    bind ):(?=\d+$)", "127.0.0.1:"),
        (r"(?m)(?<=^listen stats\n  bind )\*:(?=\d+$)", "127.0.0.1:"),
        (r"(?m)(?<=^frontend http_frontend\n    bind ).*$", bind),
        (r"(?m)(?<=^    http-request return ).*(?= if routes$)", NO_ROUTES),
        (r"(?m)(^ *errorfile \d+ .*\n)+", own),
    ):
        config, found = re.subn(pattern, wanted.replace("\\", r"\\"), config)
        if found != 1:
            raise SystemExit(f"Ray's HAProxy config has {found} matches of {pattern!r}, not 1")
    return config


def main() -> None:
    binary, channel, errors, *arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(mend(path.read_text(), receive_listener(channel), Path(errors)))  # Ray writes it anew each time
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)  # HAProxy's signal for a soft stop
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
