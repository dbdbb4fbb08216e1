"""Where the instances of a cluster run on this host, and on what.

Owns the settings of whoever starts instances; the coordinator's and the instances' own are in
`config`. One TOML file, a cluster file, may hold these beside the coordinator's.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from step3rt.config import (
    COLOCATED,
    DISAGGREGATED,
    PLACEMENTS,
    REFERENCE_DEVICE,
    ServeConfig,
)
from step3rt.errors import ConfigError
from step3rt.setting import setting, sms_setting


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How the instances of a cluster are started on this host."""

    placement: str = setting(
        "disaggregated: every instance is a process; colocated: every process is an attention and "
        "an FFN instance on one device, a process for each of --devices",
        DISAGGREGATED,
        choices=PLACEMENTS,
    )
    devices: tuple[str, ...] = setting(
        "what the processes compute on, attention instances first: reference, cpu or cuda:N; the "
        "list begins anew where it ends; default: reference for all",
        (),
    )
    random_weights: bool = setting(
        "make weights up, of the sizes in the model's config.json; needs --devices", False
    )
    threads: int = setting("threads for one instance's computation", 1, minimum=1, maximum=1024)
    kv_blocks: int | None = setting(
        "KV blocks of 64 tokens per attention instance", None, minimum=1
    )
    attention_sms: int | None = sms_setting("the attention kernel fills", minimum=1)
    ffn_sms: int | None = sms_setting("the experts' kernels fill", minimum=2)

    def counts(self) -> dict[str, int]:
        """How many instances there are of each role if nobody says so."""
        if self.placement != COLOCATED or not self.devices:
            return {}
        return {"attention": len(self.devices), "ffn": len(self.devices)}

    def options(self) -> dict[str, Any]:
        """The arguments of `LocalCluster` besides the coordinator's settings."""
        return {**asdict(self), "devices": self.devices or (REFERENCE_DEVICE,)}

    def check_unused(self) -> None:
        """Checks that nothing is said about instances when none are started.

        Raises:
            ConfigError: something is, besides the placement, which a cluster file may tell others.
        """
        for name, value in asdict(self).items():
            if name not in ("placement", "devices") and value != getattr(_NOTHING_SAID, name):
                raise ConfigError(
                    f"The setting '{name}' is {value} and 'devices' is not set. It is about "
                    "instances that are started here, and there are none. Set devices as well"
                )

    def used_devices(self, serve: ServeConfig) -> list[str]:
        """See `devices_of`."""
        return devices_of(serve, self.placement, self.devices or (REFERENCE_DEVICE,))


_NOTHING_SAID = HostConfig()


def devices_of(serve: ServeConfig, placement: str, devices: Sequence[str]) -> list[str]:
    """What each instance computes on, attention instances first; colocated, each process.

    Raises:
        ConfigError: the placement does not fit the instances or the devices.
    """
    if placement not in PLACEMENTS or not devices:
        raise ConfigError(
            f"The placement is {placement!r} on {len(devices)} devices. Known are "
            f"{' and '.join(PLACEMENTS)}, on one device or more. Correct the placement or devices"
        )
    count = serve.attention + serve.ffn
    if placement == COLOCATED:
        count = serve.attention
        if serve.attention != serve.ffn:
            raise ConfigError(
                f"The placement is colocated, with {serve.attention} attention and {serve.ffn} FFN "
                "instances. Every process has one of each. Set attention and ffn to the same number"
            )
        if REFERENCE_DEVICE in devices:
            raise ConfigError(
                "The placement is colocated and a device is 'reference'. Both roles share a device "
                "of the device pipeline. Set devices to cpu or cuda:N"
            )
    used = [devices[place % len(devices)] for place in range(count)]
    _check_known(used)
    _check_one_kind(used)
    if placement == COLOCATED:
        _check_one_process_each(used)
    return used


def _check_known(used: Sequence[str]) -> None:
    """An instance would say it, too, but only when it has loaded torch."""
    for device in used:
        if re.fullmatch("reference|cpu|cuda(:[0-9]+)?", device) is None:
            raise ConfigError(
                f"The device {device!r} is unknown. Known are reference, cpu, cuda and cuda:N. "
                "Correct devices"
            )


def _check_one_kind(used: Sequence[str]) -> None:
    """No links lead from one kind of device to another: such a cluster would never serve."""
    kinds = list(dict.fromkeys(device.partition(":")[0] for device in used))
    if len(kinds) > 1:
        raise ConfigError(
            f"The devices are {', '.join(used)}: of {len(kinds)} kinds. Instances are linked to "
            f"others of their own kind alone. Set devices to {' or '.join(kinds)} for all"
        )


def _check_one_process_each(used: Sequence[str]) -> None:
    names = [_gpu_name(device) for device in used]
    for device in dict.fromkeys(names):
        if device.startswith("cuda") and names.count(device) > 1:
            raise ConfigError(
                f"The placement is colocated, with {names.count(device)} processes on {device}. A "
                "GPU gives processes turns, and one that waits for another would wait through its "
                "own. Name as many GPUs in devices as there are attention instances"
            )


def num_gpus(devices: Sequence[str]) -> int:
    """Different GPUs among devices."""
    names = {_gpu_name(device) for device in devices}
    return sum(name.startswith("cuda") for name in names)


def _gpu_name(device: str) -> str:
    """The same for all names of a GPU."""
    return "cuda:0" if device == "cuda" else device
