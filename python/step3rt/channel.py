"""Channels to a coordinator: in clear text, or by TLS once a CA is known.

Owns where the CA comes from; it never sends anything.
"""

import os
from pathlib import Path

import grpc

from step3rt.errors import ConfigError

CA_VARIABLE = "STEP3RT_CA"
"""Environment variable with the path of the CA, for clients that are given none."""

MAX_REQUEST_BYTES = 32 << 20
"""Largest message that a server takes."""

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
)


def check_address(address: str) -> str:
    """Returns an address that can be one: "host:port" or "unix:/path".

    Raises:
        ConfigError: it has no port, or is a web address.
    """
    is_text = isinstance(address, str)
    if is_text and ":" in address and not address.startswith(("http:", "https:")):
        return address
    raise ConfigError(
        f"The coordinator's address is {address!r}. It is a host and a port, and no default is "
        "taken for either. Write host:port, like 127.0.0.1:50051, or unix:/path"
    )


def credentials(ca: str | Path | None) -> grpc.ChannelCredentials | None:
    """What a channel needs to speak TLS; `None` for one in clear text.

    Args:
        ca: PEM file of the CA that issued the coordinator's certificate; `None` takes the one that
            `STEP3RT_CA` names, if it names any; empty is clear text whatever that says.

    Raises:
        ConfigError: the file cannot be read, or holds no certificate.
    """
    if ca is None:
        ca = os.environ.get(CA_VARIABLE, "")
    if not str(ca):
        return None
    try:
        pem = Path(ca).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The CA {str(ca)!r} cannot be read: {error.strerror}. Without it nobody could say "
            f"whether the server is the right one. Correct `ca`, --ca or {CA_VARIABLE}"
        ) from error
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError(
            f"The CA {str(ca)!r} holds no certificate in PEM form. Without it nobody could say "
            "whether the server is the right one. Give the file that was given to the coordinator "
            "as tls_ca"
        )
    return grpc.ssl_channel_credentials(root_certificates=pem)
