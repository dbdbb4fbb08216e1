"""What both roles of the device pipeline need before their loops: model, settings, shape of links.

Owns which settings the pipeline can serve; loads nothing by itself.
"""

import importlib.util
from dataclasses import dataclass

import torch

from step3rt import _core
from step3rt.errors import ConfigError, InvalidArgument
from step3rt.instance.loading_status import LoadingStatus
from step3rt.model.config import Step3Config
from step3rt.model.gpu_weights import Fp8Matrix, ModelTensors
from step3rt.ops.afd_link import DEFAULT_WAIT_LIMIT_NS, AfdShape
from step3rt.ops.compile import COMPUTE_CAPABILITY
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS

SLOT_BYTES = 1
"""Of the frames beside device memory: they carry no payload."""

_SETTINGS = {
    "compute_dtype": ("bfloat16",),
    "a2f_dtype": ("fp8",),
    "f2a_dtype": ("bfloat16",),
    "kv_dtype": ("fp8", "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A model whose tensors can be read onto `device`: a checkpoint's, or made up."""

    config: Step3Config
    tensors: ModelTensors
    device: torch.device


def check_settings(settings: _core.Settings) -> None:
    """Checks that the device pipeline can serve a cluster's settings.

    Raises:
        ConfigError: one is of another pipeline.
    """
    for name, allowed in _SETTINGS.items():
        found = getattr(settings, name)
        if found not in allowed:
            raise ConfigError(
                f"The cluster's {name} is {found}. Instances with --device compute with FP8 "
                f"kernels, which take {' or '.join(allowed)}. Start the coordinator with "
                "--dtype bfloat16 --precision production"
            )
    if settings.fabric not in ("auto", "cuda_ipc"):
        raise ConfigError(
            f"The cluster's fabric is {settings.fabric}. Instances with --device are linked in "
            "device memory. Start the coordinator with --fabric auto or cuda_ipc"
        )
    if settings.block_size_tokens != BLOCK_SIZE_TOKENS:
        raise ConfigError(
            f"The cluster's KV blocks have {settings.block_size_tokens} tokens. The kernels take "
            f"{BLOCK_SIZE_TOKENS}. Start the coordinator with those"
        )


def link_shape(settings: _core.Settings, config: Step3Config) -> AfdShape:
    """The shape of the cluster's links.

    Raises:
        ConfigError: links of that shape cannot be made.
    """
    try:
        return AfdShape(
            num_lanes=settings.num_lanes,
            num_sources=settings.num_attention,
            num_ranks=settings.ep_size,
            max_tokens=settings.max_tokens_per_micro_batch,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
        )
    except InvalidArgument as error:
        raise ConfigError(f"{error} (max_tokens_per_micro_batch, attention, ffn)") from error


def wait_limit_ns(device: torch.device) -> int:
    """How long a lane waits for a peer that neither answers nor ends.

    A peer that ends is known by its link. A GPU's layer takes less than a millisecond; on a CPU,
    which computes references beside other processes, seconds may pass.
    """
    return DEFAULT_WAIT_LIMIT_NS if device.type == "cuda" else 10 * DEFAULT_WAIT_LIMIT_NS


def device_of(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ConfigError: there is none of that name here, the kernels do not run on it, or what loads
            them is not installed.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"The setting 'device' is {name!r}. Known are reference, cpu, cuda and cuda:N. "
            "Take one of them"
        ) from error
    if device.type == "cpu":
        return torch.device("cpu")
    num_devices = torch.cuda.device_count() if device.type == "cuda" else 0
    index = device.index or 0
    if index >= num_devices:
        raise ConfigError(
            f"The setting 'device' is {name!r}. This host has {num_devices} CUDA devices that "
            "torch can use. Take cuda:N of one of them, or cpu"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability != COMPUTE_CAPABILITY:
        raise ConfigError(
            f"The setting 'device' is {name!r}, a {torch.cuda.get_device_name(index)} of compute "
            f"capability {capability[0]}.{capability[1]}. The kernels are built for Hopper GPUs, "
            "9.0, and run on no others. Take one of those, or cpu"
        )
    if importlib.util.find_spec("cupy") is None:
        extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
        raise ConfigError(
            f"The setting 'device' is {name!r}, and CuPy is not installed. It loads the kernels. "
            f"Install it: pip install 'step3rt[{extra}]'"
        )
    return torch.device("cuda", index)


def report_loading(tensors: ModelTensors, session: _core.NodeSession) -> ModelTensors:
    """The same tensors; the session's status says which layer is being read."""
    return _ReportingTensors(tensors, session)


class _ReportingTensors:
    def __init__(self, tensors: ModelTensors, session: _core.NodeSession) -> None:
        self.config = tensors.config
        self._tensors = tensors
        self._status = LoadingStatus(session)

    def plain(self, name: str) -> torch.Tensor:
        self._say(name)
        return self._tensors.plain(name)

    def matrix(self, name: str, expert: int | None = None) -> Fp8Matrix:
        self._say(name)
        return self._tensors.matrix(name, expert)

    def _say(self, name: str) -> None:
        parts = name.split(".")
        phase = f"layer {parts[2]}" if parts[1] == "layers" else "embedding and head"
        self._status.say(f"loading weights, {phase} of {self.config.num_layers} layers")
