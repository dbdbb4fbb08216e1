"""The table and the plot of decode runs, from files that exist only while a test runs."""

from pathlib import Path
from typing import Any

import pytest

from step3rt.cli import main
from step3rt.errors import ConfigError
from step3rt.plan.decode_table import BEGIN, END, load_points, put_into, table
from tests.unit.test_plan_result_files import SWEEP, Run, write

READINGS = {
    "tokens_per_s_per_gpu": 4321.4,
    "tpot_ms": {"p50": 29.64, "p99": 31.26, "max": 33.0},
    "jitter_ms": 0.204,
    "stages": {
        "attention": {"us": 171.4, "roofline_share": 0.753},
        "ffn": {"us": 201.6, "roofline_share": 0.412},
    },
    "bubble_share": {"mean": 0.127},
}


def files(directory: Path) -> list[Path]:
    directory.mkdir(exist_ok=True)
    paths = []
    for index, run in enumerate(SWEEP):
        rate = 2000.0 + 3 * run.batch - run.context / 40
        readings: dict[str, Any] = {
            **READINGS,
            "tokens_per_s_per_gpu": rate,
            "tpot_ms": {"p50": 20 + run.batch / 20, "p99": 21 + run.batch / 19, "max": 60.0},
        }
        paths.append(write(directory / f"decode-{index:02}.json", run, **readings))
    return paths


def test_a_line_says_what_ran_and_what_it_gave(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", SWEEP[0], **READINGS)
    text = table(load_points([path]), tmp_path)
    head, rule, line = text.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == (
        "| [1a1f-step3-3e](a.json) | 2 | 4,096 | 64 | 2 | fp8 | 4,321 | 29.6, 31.3 | 0.20 "
        "| 171 (75%), 202 (41%) | 13% |"
    )


def test_what_a_file_does_not_have_is_left_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", SWEEP[0], context_spread=0.5)
    line = table(load_points([path]), tmp_path).splitlines()[-1]
    assert line == (
        "| [1a1f-step3-3e](a.json) | 2 | 4,096 ±50% | 64 | 2 | fp8 | 1,000 | 30.0, 31.0 |  |  |  |"
    )
    with pytest.raises(ConfigError, match="tokens_per_s_per_gpu"):
        load_points([write(path, SWEEP[0], tokens_per_s_per_gpu=None)])


def test_what_is_no_number_is_left_empty(tmp_path: Path) -> None:
    values = {"bubble_share": {"mean": float("nan")}, "jitter_ms": True, "context_spread": 10**400}
    path = write(tmp_path / "a.json", SWEEP[0], **values)
    line = table(load_points([path]), tmp_path).splitlines()[-1]
    assert line.endswith("| fp8 | 1,000 | 30.0, 31.0 |  |  |  |")
    assert "±" not in line


def test_runs_of_one_curve_follow_each_other(tmp_path: Path) -> None:
    points = load_points(files(tmp_path)[::-1])
    order = [(point.series, point.context, point.batch) for point in points]
    assert order == sorted(order)
    assert len({point.series for point in points}) == 5


def test_a_page_that_is_no_text_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        put_into(page, "table")


def test_the_command_fills_the_page_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "docs" / "results"
    results.parent.mkdir()
    files(results)
    page, plot = tmp_path / "PAGE.md", tmp_path / "docs" / "decode.svg"
    page.write_text(f"before\n{BEGIN}\nold table\n{END}\nafter\n")
    command = ["plan", "plot", str(results), f"--plot={plot}", f"--into={page}"]
    for _ in range(2):
        assert main(command) == 0
        drawn = plot.read_bytes()
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}\n| run |")
        assert text.endswith(f"(docs/decode.svg)\n{END}\nafter\n")
        assert text.count("](docs/results/decode-") == len(SWEEP)
        assert "old table" not in text
    assert plot.read_bytes() == drawn
    assert len(drawn) < 200_000
    assert b"tokens/s/GPU" in drawn or b"<path" in drawn


def test_one_run_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a.json", Run(1, 1, 2, 64, 500), **READINGS)
    assert main(["plan", "plot", str(path), f"--plot={tmp_path / 'a.png'}"]) == 0


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    for text in ("nothing", f"{END}\n{BEGIN}", BEGIN):
        page.write_text(text)
        with pytest.raises(ConfigError, match="no place for the table"):
            put_into(page, "| table |")
        assert page.read_text() == text
    with pytest.raises(ConfigError, match="cannot be read"):
        put_into(tmp_path / "absent.md", "| table |")


def test_a_table_is_printed_without_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.json", SWEEP[0], **READINGS)
    assert main(["plan", "plot", str(path)]) == 0
    assert "| 29.6, 31.3 |" in capsys.readouterr().out
