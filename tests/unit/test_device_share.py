"""How many SMs each role of a process takes, and which of them loads first."""

import concurrent.futures
import threading

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


class Session:
    """Counts signs of life."""

    def __init__(self) -> None:
        self.num_signs = 0

    def set_status(self, text: str) -> None:
        self.num_signs += 1


class Turns:
    """Both roles of a share, each in a thread of its own, and the order in which they load."""

    def __init__(self) -> None:
        self.share = DeviceShare(is_colocated=True)
        self.sessions = {"attention": Session(), "ffn": Session()}
        self.order: list[str] = []
        self.go_on = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(2)

    def begin(self, role: str) -> "concurrent.futures.Future[None]":
        return self._pool.submit(self._load, role)

    def _load(self, role: str) -> None:
        with self.share.turn(self.sessions[role], role):
            self.order.append(role)
            assert self.go_on.wait(20)
            assert self.share.is_loading


def test_the_ffn_role_loads_first_though_the_attention_role_came_before() -> None:
    turns = Turns()
    attention = turns.begin("attention")
    ffn = turns.begin("ffn")
    # The attention role, which waits, says so; and nothing of the FFN role is to run beside it.
    while not turns.sessions["attention"].num_signs:
        assert turns.share.is_loading or not turns.order
    assert turns.order == ["ffn"]
    turns.go_on.set()
    for role in (ffn, attention):
        role.result(20)
    assert turns.order == ["ffn", "attention"]
    assert not turns.share.is_loading


def test_the_attention_role_loads_alone_if_no_ffn_role_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_share, "FFN_HEAD_START_S", 0.1)
    turns = Turns()
    turns.go_on.set()
    turns.begin("attention").result(20)
    assert turns.order == ["attention"]


def test_a_role_that_fails_to_load_lets_the_other_one_go_on() -> None:
    share = DeviceShare(is_colocated=True)
    with pytest.raises(RuntimeError), share.turn(Session(), "ffn"):
        raise RuntimeError
    assert not share.is_loading
    with share.turn(Session(), "ffn"):
        pass
    with share.turn(Session(), "attention"):
        assert share.is_loading
    with share.turn(Session(), "attention"):  # of its next session: lanes of the other one serve
        assert not share.is_loading
