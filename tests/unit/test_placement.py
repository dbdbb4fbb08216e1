"""Where instances run: from flags, a cluster file, or the SDK's arguments."""

import argparse
from pathlib import Path

import pytest

from step3rt.cli import flags
from step3rt.config import ServeConfig, build
from step3rt.errors import ConfigError
from step3rt.placement import HostConfig, devices_of, num_gpus

CLUSTER = """
model = "nano"
lanes = 2
dtype = "bfloat16"
precision = "production"
placement = "colocated"
devices = ["cuda:0", "cuda:1"]
ffn-sms = 64
"""


def serve(attention: int, ffn: int) -> ServeConfig:
    return ServeConfig(model=Path("nano"), attention=attention, ffn=ffn)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_config_file_flag(parser)
    flags.add_config_flags(parser, HostConfig)
    flags.add_config_flags(parser, ServeConfig)
    return parser.parse_args(arguments)


def test_devices_are_dealt_to_instances_or_to_processes() -> None:
    devices = ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of(serve(1, 1), "disaggregated", devices) == ["cuda:0", "cuda:1"]
    assert devices_of(serve(2, 2), "disaggregated", devices) == [*devices, "cuda:0"]
    assert devices_of(serve(2, 2), "colocated", devices) == ["cuda:0", "cuda:1"]
    assert devices_of(serve(4, 4), "colocated", ["cpu"]) == ["cpu"] * 4
    with pytest.raises(ConfigError, match="2 processes on cuda:0"):
        devices_of(serve(4, 4), "colocated", devices)


def test_two_names_of_a_gpu_are_one_gpu() -> None:
    with pytest.raises(ConfigError, match="2 processes on cuda:0"):
        devices_of(serve(2, 2), "colocated", ["cuda", "cuda:0"])
    # Disaggregated ones may share it, to try things out.
    assert devices_of(serve(1, 1), "disaggregated", ["cuda:0"]) == ["cuda:0"] * 2


@pytest.mark.parametrize(
    ("placement", "devices"),
    [
        ("disaggregated", ["cpu", "reference"]),
        ("disaggregated", ["cuda:0", "cpu"]),
        ("colocated", ["cpu", "cuda:0"]),
    ],
)
def test_devices_of_several_kinds_cannot_be_linked(placement: str, devices: list[str]) -> None:
    count = (2, 2) if placement == "colocated" else (1, 1)
    with pytest.raises(ConfigError, match="of 2 kinds"):
        devices_of(serve(*count), placement, devices)
    # What is not used does not matter.
    assert devices_of(serve(1, 1), "colocated", ["cpu", "cuda:0"]) == ["cpu"]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "Reference"])
def test_a_device_of_no_known_kind_is_refused_before_anything_starts(device: str) -> None:
    with pytest.raises(ConfigError, match="Known are reference, cpu, cuda and cuda:N"):
        devices_of(serve(1, 1), "disaggregated", [device])


def test_only_different_gpus_count() -> None:
    assert num_gpus(["cuda:0", "cuda", "cuda:1", "cuda:1", "cpu", "reference"]) == 2
    assert num_gpus(["cpu"]) == 0


def test_a_cluster_file_says_how_many_instances_run_where(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER)
    settings, host = flags.cluster_from(parsed(f"--config={file}"))
    assert (settings.attention, settings.ffn, settings.lanes) == (2, 2, 2)
    assert (host.placement, host.devices, host.ffn_sms) == ("colocated", ("cuda:0", "cuda:1"), 64)
    assert host.used_devices(settings) == ["cuda:0", "cuda:1"]


def test_flags_win_over_a_cluster_file_and_that_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER.replace('model = "nano"\n', ""))
    arguments = parsed(f"--config={file}", "--devices=cpu, cpu,cpu", "--lanes=3")
    settings, host = flags.cluster_from(arguments, {"model": Path("other")})
    assert (settings.model, settings.lanes, settings.attention) == (Path("other"), 3, 3)
    assert host.devices == ("cpu", "cpu", "cpu")


def test_counts_that_are_given_are_kept() -> None:
    arguments = parsed("--model=nano", "--placement=colocated", "--devices=cpu", "--attention=2")
    settings, host = flags.cluster_from(arguments)
    with pytest.raises(ConfigError, match="2 attention and 1 FFN instances"):
        host.used_devices(settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('devices = "cuda:0"', r"'devices' is 'cuda:0' .*list of texts"),
        ("devices = [0]", r"'devices' is \[0\]"),
        ('placement = "collocated"', "Did you mean 'colocated'"),
        ('device = ["cpu"]', "'device' does not exist"),
    ],
)
def test_mistakes_in_a_cluster_file_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(f'model = "nano"\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        flags.cluster_from(parsed(f"--config={file}"))


def test_a_placement_of_the_sdk_is_checked_as_that_of_a_file() -> None:
    host = build(HostConfig, {"placement": "colocated", "devices": ["cpu", "cpu"]}, "LLM")
    assert host.counts() == {"attention": 2, "ffn": 2}
    assert host.options()["devices"] == ("cpu", "cpu")
    assert HostConfig().counts() == {}
    assert HostConfig().options()["devices"] == ("reference",)
