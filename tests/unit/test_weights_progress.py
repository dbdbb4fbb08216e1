import io
import sys
from dataclasses import dataclass, field

import pytest
import torch

from step3rt.instance.node import load_progress
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.weights import load_attention_weights
from tests.fixtures import checkpoint as written


@dataclass
class StatusLine:
    """Where `_core.NodeSession` shows its status."""

    texts: list[str] = field(default_factory=list)

    def set_status(self, text: str) -> None:
        self.texts.append(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_status_follows_loading_in_whole_per_cents(tiny_checkpoint: written.Checkpoint) -> None:
    status = StatusLine()
    checkpoint = Checkpoint.open(tiny_checkpoint.directory)
    load_attention_weights(checkpoint, torch.float32, load_progress(status))  # type: ignore[arg-type]
    percents = [int(text.split()[2]) for text in status.texts]
    assert percents == sorted(set(percents))
    assert status.texts[-1] == "loading weights 100 %, layer 3"


def test_bar_appears_on_a_terminal_only(
    tiny_checkpoint: written.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        checkpoint = Checkpoint.open(tiny_checkpoint.directory)
        load_attention_weights(checkpoint, torch.float32, load_progress(StatusLine()))  # type: ignore[arg-type]
        shown.append(stream.getvalue())
    assert shown[0] == ""
    assert "100%" in shown[1]
