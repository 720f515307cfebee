"""The gRPC ingress of a service on this machine: HAProxy, which reads the model in a call; no Ray, no torch here.

Ray's HAProxy routes a gRPC call by the metadata `application`, which the protocol's clients do not send. A frontend of
ours, in the same process, sets it and passes the call on to Ray's.
"""

import ipaddress
from pathlib import Path

from serving.api.oip_grpc import PACKAGE, SERVICE
from serving.service.grpc_service import APPLICATION, FRONT, NO_MODEL, OF_A_MODEL

# A message begins with a byte that says whether it is compressed, its length in four, and the first field, the name.
_CONFIG = """\
defaults cspnet_grpc
    mode http
    timeout connect 5s
    timeout http-request 10s
    timeout client 3600s
    timeout server 3600s

frontend cspnet_grpc from cspnet_grpc
    bind {public} proto h2
    acl encoded req.hdr(grpc-encoding) -m found
    acl identity req.hdr(grpc-encoding) identity
    acl of_a_model path {paths}
    acl named var(txn.model) -m reg ^[A-Za-z0-9][A-Za-z0-9._-]*$
    http-request return status 200 hdr grpc-status 12 hdr grpc-message "no such method" if !{{ path_beg {service} }}
    http-request return status 200 hdr grpc-status 12 hdr grpc-message "send messages uncompressed" if encoded !identity
    http-request set-header {application} {front}
    http-request wait-for-body time 10s if of_a_model
    http-request set-var(txn.model) req.body,bytes(5),protobuf(1) if of_a_model
    http-request return status 200 hdr grpc-status 5 hdr grpc-message "{no_model}" if of_a_model !named
    http-request set-header {application} %[var(txn.model)] if of_a_model
    http-after-response set-header content-type application/grpc if !{{ res.hdr(content-type) -m found }}
    default_backend cspnet_grpc_to_ray

backend cspnet_grpc_to_ray from cspnet_grpc
    http-reuse always
    acl unknown res.hdr(grpc-message) -m beg "Application "
    http-response set-header grpc-message "{no_model}" if unknown
    server ray {ray} proto h2
"""


def write_frontend(folder: Path, host: str, port: int, ray_port: int) -> Path:
    """A config for HAProxy beside Ray's own, with the frontend that listens on `host` and `port`.

    Args:
        ray_port: where Ray's frontend listens, on the same host.
    """
    config, service = folder / "grpc.cfg", f"/{PACKAGE}.{SERVICE}/"
    config.write_text(
        _CONFIG.format(
            public=f"{host}:{port}",
            ray=f"{_reached(host)}:{ray_port}",
            service=service,
            paths=" ".join(f"{service}{method}" for method in OF_A_MODEL),
            application=APPLICATION,
            front=FRONT,
            no_model=NO_MODEL,
        )
    )
    return config


def _reached(host: str) -> str:
    """An address at which this machine reaches what listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return ("127.0.0.1" if address.version == 4 else "::1") if address.is_unspecified else host
