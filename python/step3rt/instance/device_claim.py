"""Which device a process uses, by a name that all processes of a host know it by, and who owns it.

Owns names and claims; never touches what runs on a device.
"""

import contextlib
import errno
import os
import socket

import torch

from step3rt.errors import Unavailable

_MIG = "MIG-"
"""What slices of a GPU are chosen by; a slice's properties have the UUID of the whole."""


def name_of(device: torch.device) -> str:
    """The same for all processes that share the device, whatever index they know it by."""
    if device.type != "cuda":
        return str(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
    return f"cuda {uuid}"


def claim(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Takes a GPU for this process's two roles, for a block or until it ends; a CPU is shared.

    Raises:
        Unavailable: another colocated process of this host has the GPU.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return claim_name(visible if visible.startswith(_MIG) else name_of(device))


def claim_name(name: str) -> socket.socket:
    """The claim on a name, among the processes that share a network namespace.

    A Unix socket without a file: the kernel gives its name back, and there is none to clean up.

    Raises:
        Unavailable: another process has it.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0step3rt colocated {name}")
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise Unavailable(
            f"Another colocated process has {name}. A GPU gives processes turns, and one that "
            "waits for another would wait through its own. Name another --device, or end the other "
            "process"
        ) from error
    return held
