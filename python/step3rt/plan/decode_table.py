"""Decode runs that were measured, as a Markdown table inside a page.

Owns the columns and the place in the page; says nothing that is not in the files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from step3rt.errors import ConfigError
from step3rt.plan.emit import write_text
from step3rt.plan.measurement import ResultValues, is_finite

BEGIN = "<!-- decode results, by: step3rt plan plot -->"
END = "<!-- end of decode results -->"

_HEAD = (
    "| run | GPUs | context | batch | lanes | KV | tokens/s/GPU | TPOT p50, p99 ms "
    "| jitter (about trend) ms | attention, FFN µs (roofline) | idle |"
)


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """One run, as the table and the plot show it.

    `spread`: of the contexts around `context`. `stages`: microseconds of attention and FFN in one
    layer and micro-batch, with their shares of the roofline. `jitter_ms`: of steps, and of steps
    about their trend. What the file does not have is None.
    `idle`: mean share of the time in which a GPU has no lane at work.
    """

    path: Path
    run: str
    machine: str
    gpus: int
    context: int
    spread: float
    batch: int
    lanes: int
    kv_dtype: str
    tokens_per_s_per_gpu: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    jitter_ms: tuple[float | None, float | None]
    stages: tuple[tuple[float | None, float | None], ...]
    idle: float | None

    @property
    def series(self) -> str:
        """Which points are of one curve: all but context and batch are the same."""
        spread = f", ±{self.spread:.0%}" if self.spread else ""
        return f"{self.run}, {self.gpus} GPUs, {self.lanes} lanes, {self.kv_dtype} KV{spread}"


def load_points(paths: Sequence[Path]) -> list[DecodePoint]:
    """The runs of result files, in the table's order.

    Raises:
        ConfigError: a file is not a decode result of GPUs.
    """
    points = [_point(path) for path in paths]
    return sorted(points, key=lambda each: (each.series, each.context, each.batch, each.path))


def table(points: Sequence[DecodePoint], directory: Path) -> str:
    """A Markdown table, a line per run; `directory` is that of the page, for links to the files."""
    lines = [_HEAD, "| --- " * _HEAD.count(" | ") + "| --- |"]
    return "\n".join(lines + [_line(point, directory) for point in points])


def put_into(page: Path, text: str) -> None:
    """Replaces what the page has between BEGIN and END.

    Raises:
        ConfigError: the page cannot be read or written, or has no such place.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"The page {str(page)!r} cannot be read: {reason}. The table belongs into it. "
            "Give another one"
        ) from error
    begin, end = old.find(BEGIN), old.find(END)
    if not 0 <= begin < end:
        raise ConfigError(
            f"The page {str(page)!r} has no place for the table. It goes between the lines "
            f"{BEGIN!r} and {END!r}. Write them where it should be"
        )
    write_text(page, f"{old[: begin + len(BEGIN)]}\n{text}\n{old[end:]}")


def _point(path: Path) -> DecodePoint:
    values = ResultValues(path)
    found = values.values
    bubble, spread = found.get("bubble_share"), found.get("context_spread", 0.0)
    idle = bubble.get("mean") if isinstance(bubble, dict) else None
    jitter = tuple(found.get(name) for name in ("jitter_ms", "jitter_about_trend_ms"))
    return DecodePoint(
        path=path,
        run=values.text("run"),
        machine=values.text("machine"),
        gpus=values.count("gpus"),
        context=values.count("context"),
        spread=_number_or_none(spread) or 0.0,
        batch=values.count("batch"),
        lanes=values.count("lanes"),
        kv_dtype=values.text("kv_dtype"),
        tokens_per_s_per_gpu=values.number("tokens_per_s_per_gpu"),
        tpot_p50_ms=values.number("tpot_ms", "p50"),
        tpot_p99_ms=values.number("tpot_ms", "p99"),
        jitter_ms=(_number_or_none(jitter[0]), _number_or_none(jitter[1])),
        stages=tuple(
            (values.stage_us(name), values.stage(name, "roofline_share"))
            for name in ("attention", "ffn")
        ),
        idle=_number_or_none(idle),
    )


def _line(point: DecodePoint, directory: Path) -> str:
    stages = ", ".join(_stage(*stage) for stage in point.stages)
    spread = f" ±{point.spread:.0%}" if point.spread else ""
    cells = (
        f"[{point.run}]({os.path.relpath(point.path, directory)})",
        f"{point.gpus}",
        f"{point.context:,}{spread}",
        f"{point.batch:,}",
        f"{point.lanes}",
        point.kv_dtype,
        f"{point.tokens_per_s_per_gpu:,.0f}",
        f"{point.tpot_p50_ms:.1f}, {point.tpot_p99_ms:.1f}",
        _jitter(*point.jitter_ms),
        stages if any(us is not None for us, _ in point.stages) else "",
        "" if point.idle is None else f"{point.idle:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def _number_or_none(value: object) -> float | None:
    return float(value) if is_finite(value) else None  # type: ignore[arg-type]


def _jitter(of_steps: float | None, about_trend: float | None) -> str:
    if of_steps is None:
        return ""
    return f"{of_steps:.2f}" if about_trend is None else f"{of_steps:.2f} ({about_trend:.2f})"


def _stage(us: float | None, share: float | None) -> str:
    if us is None:
        return "?"
    return f"{us:.0f}" if share is None else f"{us:.0f} ({share:.0%})"
