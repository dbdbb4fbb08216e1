import logging
from typing import Any

import pytest
import torch

from step3rt.instance import device_setup
from step3rt.instance.loading_status import LOG_EVERY_S, LoadingStatus


class Session:
    """Where `_core.NodeSession` shows its status."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def set_status(self, text: str) -> None:
        self.texts.append(text)


def test_a_slow_layer_gives_a_sign_of_life_every_second_and_a_fast_one_does_not() -> None:
    session: Any = Session()
    now_s = 0.0
    status = LoadingStatus(session, lambda: now_s)
    for tick in range(50):
        now_s = tick / 10
        status.say("loading weights, layer 4 of 61 layers")
    assert len(session.texts) == 5
    status.say("loading weights, layer 5 of 61 layers")
    assert len(session.texts) == 6


def test_the_log_says_how_far_a_long_load_is(caplog: pytest.LogCaptureFixture) -> None:
    session: Any = Session()
    now_s = 0.0
    status = LoadingStatus(session, lambda: now_s)
    with caplog.at_level(logging.INFO, "step3rt"):
        for second in range(int(2.5 * LOG_EVERY_S)):
            now_s = float(second)
            status.say(f"loading weights {second} %, layer 4")
    assert [record.getMessage() for record in caplog.records] == [
        "Loading weights 30 %, layer 4, for 30 s now",
        "Loading weights 60 %, layer 4, for 60 s now",
    ]


def test_device_roles_say_which_layer_is_being_read_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tensors:
        """Of one layer, each of which takes longer than signs of life may be apart."""

        class config:  # noqa: N801
            num_layers = 61

        def plain(self, name: str) -> torch.Tensor:
            return torch.empty(0)

        matrix = plain

    now_s = iter(range(100))
    monkeypatch.setattr(
        device_setup, "LoadingStatus", lambda session: LoadingStatus(session, lambda: next(now_s))
    )
    session: Any = Session()
    tensors = device_setup.report_loading(Tensors(), session)  # type: ignore[arg-type]
    for _ in range(3):
        tensors.plain("model.layers.4.moe.gate.weight")
    assert session.texts == 3 * ["loading weights, layer 4 of 61 layers"]
