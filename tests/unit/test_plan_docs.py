"""docs/planning.md shows what its commands print, and its plots are there."""

import re
from pathlib import Path

import pytest

from step3rt.cli import main
from step3rt.plan.paper import DISAGREEMENTS

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
TEXT = PAGE.read_text(encoding="utf-8")
MAX_PLOT_BYTES = 100_000


@pytest.mark.parametrize(
    "command",
    [
        "search --gpus h800:32 --context 4096",
        "search --gpus h20:8,h800:8 --context 4096",
        "search --gpus h20:8,h800:8 --context 32768",
        "search --gpus h200:4 --context 4096 --profile step3rt-h200",
    ],
)
def test_the_page_has_the_rates_that_the_search_prints(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"step3rt plan {command}" in TEXT
    assert main(["plan", *command.split()]) == 0
    verdict = capsys.readouterr().out.splitlines()[0]
    rates = re.findall(r"([\d,]+) (?:tokens/s/GPU disaggregated|colocated)", verdict)
    assert len(rates) == 2
    for rate in rates:
        assert re.search(rf"\b{rate}\b", TEXT), rate


def test_the_page_has_the_slice_that_simulate_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "simulate --attention-gpus 2 --ffn-gpus 2 --experts 6 --hardware h200 "
        "--profile peers-h200 --lanes 2 --batch 1380 --context 4096"
    )
    assert command in re.sub(r"\\\n\s*", "", TEXT)
    assert main(["plan", *command.split()]) == 0
    for line in capsys.readouterr().out.splitlines()[:3]:
        assert line.strip() in TEXT


def test_the_page_has_what_the_measured_kernels_give(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "h200.toml"
    measured = PAGE.parent / "results" / "kernels-h200-2026-11-22.json"
    assert f"step3rt plan kernels docs/results/{measured.name} --profile peers-h200" in TEXT
    assert main(
        ["plan", "kernels", str(measured), "--profile=peers-h200", "--hardware=h200",
         f"--save={saved}"]
    ) == 0  # fmt: skip
    lines = [line for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert lines
    for line in lines:
        assert line.strip() in TEXT
    command = (
        "simulate --attention-gpus 2 --ffn-gpus 2 --experts 6 --hardware h200 "
        f"--profile {saved} --lanes 2 --batch 1200 --context 4096"
    )
    assert main(["plan", *command.split()]) == 0
    rate = re.search(r"([\d,]+) per GPU", capsys.readouterr().out)
    assert rate
    assert f"{rate[1]} tokens/s/GPU (`--batch 1200`" in TEXT


def test_the_page_lists_every_disagreement() -> None:
    for entry in DISAGREEMENTS:
        assert f"| {entry.where} | {entry.text} |" in TEXT


def test_every_plot_is_on_a_page_and_small() -> None:
    shown = set(re.findall(r"\]\((plots/[^)]+)\)", TEXT))
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    shown |= set(re.findall(r"\]\(docs/(plots/[^)]+)\)", readme))
    files = {f"plots/{file.name}" for file in (PAGE.parent / "plots").iterdir()}
    assert shown == files
    for name in files:
        assert (PAGE.parent / name).stat().st_size <= MAX_PLOT_BYTES
