"""How many SMs each role of a process takes."""

import pytest
import torch

from step3rt.instance import device_share
from step3rt.instance.device_share import IDLE_LIMIT_NS, DeviceShare

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_share, "num_sms", lambda _device: 132)


def test_roles_that_share_a_gpu_leave_out_the_sms_of_every_other_lane() -> None:
    share = DeviceShare(is_colocated=True)
    assert [share.attention_ctas(GPU, lanes) for lanes in (1, 2, 3)] == [131, 129, 127]
    assert [share.ffn_ctas(GPU, lanes) for lanes in (1, 2, 3)] == [130, 126, 122]
    assert share.idle_limit_ns(GPU) == IDLE_LIMIT_NS


def test_a_role_takes_what_it_is_told_to_take_in_pairs_if_it_must() -> None:
    share = DeviceShare(is_colocated=True)
    assert share.attention_ctas(GPU, 2, 61) == 61
    assert share.ffn_ctas(GPU, 2, 71) == 70
    assert share.attention_ctas(GPU, 2, 256) == 132
    assert DeviceShare().ffn_ctas(GPU, 2, 64) == 64


def test_a_role_on_its_own_and_one_on_a_cpu_have_nothing_to_leave_out() -> None:
    for share, device in ((DeviceShare(), GPU), (DeviceShare(is_colocated=True), CPU)):
        assert share.attention_ctas(device, 2) is None
        assert share.ffn_ctas(device, 2) is None
        assert share.idle_limit_ns(device) == 0
