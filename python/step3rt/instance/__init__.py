"""The two kinds of instance process: attention and FFN."""

from step3rt.config import NodeConfig
from step3rt.instance.attention import AttentionRole
from step3rt.instance.ffn import FfnRole
from step3rt.instance.node import run_node


def run_instance(config: NodeConfig) -> int:
    """Runs one instance until the coordinator or a signal ends it; returns the exit code.

    Raises:
        ConfigError: the checkpoint cannot be used, or the coordinator refuses this instance.
        Unavailable: no coordinator answers within `connect_timeout_s`.
    """
    if config.role == "attention":
        return run_node(config, lambda checkpoint: AttentionRole(config, checkpoint))
    return run_node(config, FfnRole)
