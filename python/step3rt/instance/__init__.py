"""The kinds of instance process: attention, FFN, and both in one."""

import os

import torch

from step3rt.config import COLOCATED, REFERENCE_DEVICE, NodeConfig
from step3rt.errors import ConfigError
from step3rt.instance.attention import AttentionRole
from step3rt.instance.colocated import OnFailure, run_colocated
from step3rt.instance.device_attention import DeviceAttentionRole
from step3rt.instance.device_claim import claim
from step3rt.instance.device_ffn import DeviceFfnRole
from step3rt.instance.device_setup import DeviceModel, device_of
from step3rt.instance.device_share import DeviceShare
from step3rt.instance.ffn import FfnRole
from step3rt.instance.node import Model, Role, run_node
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.gpu_weights import CheckpointTensors
from step3rt.model.random_weights import RandomTensors

_MAX_CONNECTIONS = "32"
"""Queues between the host and a GPU. Of two streams that share one, as happens with the driver's
default of 8, one would stand behind a wait that the other is parked in."""


def run_instance(config: NodeConfig, on_failure: OnFailure) -> int:
    """Runs one instance, or one of each role, until the coordinator or a signal ends it.

    Args:
        config: says which.
        on_failure: ends the process with an error; of a role that is not in this thread.

    Returns:
        The exit code.

    Raises:
        ConfigError: the checkpoint cannot be used, or the coordinator refuses this instance.
        Unavailable: no coordinator answers within `connect_timeout_s`, or another colocated process
            has the GPU.
    """
    # The driver reads it when it is first used.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", _MAX_CONNECTIONS)
    if config.role == COLOCATED:
        if config.device == REFERENCE_DEVICE:
            raise ConfigError(
                "The setting 'device' is 'reference' and 'role' is 'colocated'. Both roles share "
                "one device of the device pipeline. Give --device cpu or cuda:N"
            )
        device = device_of(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        with claim(device):
            return run_colocated(config, make_role, on_failure)
    return run_node(config, lambda model: make_role(config, model, DeviceShare()))


def make_role(config: NodeConfig, model: Model, share: DeviceShare) -> Role:
    """Makes the one of the two roles that `config` names; loads nothing.

    Raises:
        ConfigError: the device is not there, or does not go with the other settings.
    """
    is_attention = config.role == "attention"
    if config.device != REFERENCE_DEVICE:
        device = device_of(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        device_model = DeviceModel(
            model.config,
            CheckpointTensors(model, device)
            if isinstance(model, Checkpoint)
            else RandomTensors(model.config, device, seed=0),
            device,
        )
        if is_attention:
            return DeviceAttentionRole(config, device_model, share)
        return DeviceFfnRole(config, device_model, share)
    if not isinstance(model, Checkpoint):
        raise ConfigError(
            "The setting 'random_weights' is given with device 'reference'. Weights are made up in "
            "the formats of the FP8 kernels. Give --device cpu or cuda:N"
        )
    return AttentionRole(config, model) if is_attention else FfnRole(model)
