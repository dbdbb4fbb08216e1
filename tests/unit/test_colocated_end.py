"""Two roles of one process end together."""

import threading

import pytest

from step3rt.errors import Unavailable
from step3rt.instance import colocated


class Ended:
    """In place of the end of the process."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.has_ended = threading.Event()

    def __call__(self, error: BaseException) -> None:
        self.error = error
        self.has_ended.set()


def test_a_role_whose_other_half_was_drained_is_not_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(colocated, "GRACE_S", 0.05)
    ended = Ended()
    end = colocated._CommonEnd(ended)
    assert not end.has_begun()
    end.reached("ffn")
    assert end.has_begun()
    assert ended.has_ended.wait(30)
    assert isinstance(ended.error, Unavailable)
    assert "The ffn role of this process was drained" in str(ended.error)


def test_two_roles_that_are_drained_are_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colocated, "GRACE_S", 0.05)
    ended = Ended()
    end = colocated._CommonEnd(ended)
    end.reached("ffn")
    end.reached("attention")
    assert not ended.has_ended.wait(0.2)
