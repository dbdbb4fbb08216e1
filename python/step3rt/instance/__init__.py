"""The two kinds of instance process: attention and FFN."""

import torch

from step3rt.config import REFERENCE_DEVICE, NodeConfig
from step3rt.errors import ConfigError
from step3rt.instance.attention import AttentionRole
from step3rt.instance.device_attention import DeviceAttentionRole
from step3rt.instance.device_ffn import DeviceFfnRole
from step3rt.instance.device_setup import DeviceModel, device_of
from step3rt.instance.ffn import FfnRole
from step3rt.instance.node import Model, Role, run_node
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.gpu_weights import CheckpointTensors
from step3rt.model.random_weights import RandomTensors


def run_instance(config: NodeConfig) -> int:
    """Runs one instance until the coordinator or a signal ends it; returns the exit code.

    Raises:
        ConfigError: the checkpoint cannot be used, or the coordinator refuses this instance.
        Unavailable: no coordinator answers within `connect_timeout_s`.
    """
    return run_node(config, lambda model: _make_role(config, model))


def _make_role(config: NodeConfig, model: Model) -> Role:
    is_attention = config.role == "attention"
    if config.device != REFERENCE_DEVICE:
        device = device_of(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        device_model = DeviceModel(
            model.config,
            CheckpointTensors(model, device)
            if isinstance(model, Checkpoint)
            else RandomTensors(model.config, device, seed=0),
            device,
        )
        if is_attention:
            return DeviceAttentionRole(config, device_model)
        return DeviceFfnRole(config, device_model)
    if not isinstance(model, Checkpoint):
        raise ConfigError(
            "The setting 'random_weights' is given with device 'reference'. Weights are made up in "
            "the formats of the FP8 kernels. Give --device cpu or cuda:N"
        )
    return AttentionRole(config, model) if is_attention else FfnRole(model)
