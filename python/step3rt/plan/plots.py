"""Draws the planner's figures; the only module of the package that imports matplotlib.

Owns how things look. SVG files come out the same from the same numbers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step3rt.errors import ConfigError
from step3rt.plan.cost import afd_cost, token_cost
from step3rt.plan.decode_table import DecodePoint
from step3rt.plan.hardware import PAPER_CARDS, Hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.search import Candidate
from step3rt.plan.search_space import Target
from step3rt.plan.simulate import Span
from step3rt.plan.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {
    "step3": "Step-3",
    "deepseek-v3": "DSv3",
    "kimi-k2": "Kimi K2",
    "qwen3-235b-a22b": "Qwen3 MoE",
    "qwen3-32b": "Qwen3 32B",
    "llama4-maverick": "Llama 4 M",
    "minimax-m1": "MM M1",
    "ernie-4.5": "ERNIE 4.5",
    "pangu-pro-moe": "Pangu Pro",
}
_SHOWN_TPOT = 2.0  # times the target: beyond it, the front says nothing about the choice
_SUFFIXES = (".svg", ".png")
_STAGE_COLOURS = {
    "head": "#8c6d31",
    "attention": "#4c78a8",
    "a2f": "#bab0ac",
    "ffn": "#e45756",
    "f2a": "#d8d3cf",
}


def draw_costs(path: Path, figure: str, cards: dict[str, Hardware]) -> None:
    """Draws a figure of the paper: "1" cost front, "2" cost by hardware, "5" compute and memory.

    Raises:
        ConfigError: matplotlib is missing, or the file is no .svg or .png or cannot be written.
    """
    paper_cards = [cards[key] for key in PAPER_CARDS]
    width = 9.0 if figure == "2" else 6.0
    canvas, axes = _canvas(path, columns=2 if figure == "2" else 1, width=width)
    if figure == "1":
        _cost_front(axes[0], paper_cards)
    elif figure == "2":
        for axis, context in zip(axes, (8192, 32768), strict=True):
            _cost_by_hardware(axis, paper_cards, context)
        axes[0].legend(fontsize=8)
    else:
        _compute_and_memory(axes[0], paper_cards)
    _save(canvas, path)


def draw_front(path: Path, verdict: Verdict, target: Target) -> None:
    """Draws TPOT against tokens/s/GPU and against USD of the Pareto fronts, with the choices.

    Raises:
        ConfigError: as for `draw_costs`.
    """
    canvas, axes = _canvas(path, columns=2, width=10.0)
    within = [p for p in verdict.found.front if p.tpot_ms <= _SHOWN_TPOT * target.tpot_ms]
    for axis, merit in zip(axes, ("tokens_per_s_per_gpu", "usd_per_1m_tokens"), strict=True):
        front = _front_in(within, merit)
        for placement, colour in (("colocated", "#54a24b"), ("disaggregated", "#4c78a8")):
            points = [p for p in front if p.deployment.placement == placement]
            x, y = [p.tpot_ms for p in points], [getattr(p, merit) for p in points]
            axis.plot(x, y, "o", markersize=3, color=colour, label=placement)
            choice = verdict.of(placement)
            if choice is not None:
                place = (choice.result.tpot_ms["mean"], getattr(choice.candidate, merit))
                axis.plot(*place, "*", markersize=12, color=colour)
                axis.annotate(
                    choice.candidate.deployment.label,
                    place,
                    xytext=(-6, 6 if placement == "colocated" else -12),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
        axis.axvline(target.tpot_ms, color="#888888", linestyle="--", linewidth=1)
        axis.set_xlim(0, _SHOWN_TPOT * target.tpot_ms)
        axis.set_xlabel("TPOT (ms)")
    axes[0].set_ylabel("tokens/s/GPU, all cards counted")
    axes[1].set_ylabel("USD per 1M tokens, cards in use")
    axes[1].set_yscale("log")
    axes[1].legend(fontsize=8, title=f"{target.context_tokens} tokens of context", title_fontsize=8)
    _save(canvas, path)


def _front_in(points: Sequence[Candidate], merit: str) -> list[Candidate]:
    """Of points sorted by TPOT, those that improve on all faster ones in `merit` alone."""
    sign = -1 if merit.startswith("usd") else 1
    kept: list[Candidate] = []
    for point in points:
        if not kept or sign * getattr(point, merit) > sign * getattr(kept[-1], merit):
            kept.append(point)
    return kept


def draw_decode(path: Path, points: Sequence[DecodePoint], target_ms: float = 50.0) -> None:
    """Draws measured tokens/s/GPU against context, and TPOT (p50, whisker to p99) against batch.

    Of several batches at one context, the left side shows the best that meets the target at p99, or
    the best of all where none does.

    Raises:
        ConfigError: as for `draw_costs`.
    """
    canvas, (rates, tpots) = _canvas(path, columns=2, width=11.0, height=4.5)
    for name in dict.fromkeys(point.series for point in points):
        series = [point for point in points if point.series == name]
        best = [_best_at(series, context, target_ms) for context in _contexts(series)]
        x, y = [point.context for point in best], [p.tokens_per_s_per_gpu for p in best]
        (line,) = rates.plot(x, y, "o-", markersize=4, label=name)
        for point in best:
            rates.annotate(
                f"{point.batch}",
                (point.context, point.tokens_per_s_per_gpu),
                xytext=(3, 4),
                textcoords="offset points",
                fontsize=7,
            )
        for index, context in enumerate(_contexts(series)):
            swept = [point for point in series if point.context == context]
            p50 = [point.tpot_p50_ms for point in swept]
            whiskers = [point.tpot_p99_ms - point.tpot_p50_ms for point in swept]
            tpots.errorbar(
                [point.batch for point in swept],
                p50,
                yerr=[[0.0] * len(swept), [max(0.0, each) for each in whiskers]],
                fmt="o-",
                markersize=4,
                capsize=2,
                color=line.get_color(),
                alpha=1 - 0.7 * index / len(_contexts(series)),
            )
            tpots.annotate(
                f"{context // 1024}K" if context >= 1024 else f"{context}",
                (swept[-1].batch, p50[-1]),
                xytext=(4, -3),
                textcoords="offset points",
                fontsize=7,
            )
    rates.set_xscale("log", base=2)
    contexts = _contexts(points)
    rates.set_xticks(contexts, [f"{context:,}" for context in contexts])
    rates.set_ylim(bottom=0)
    rates.set_xlabel("context (tokens); numbers are batches")
    rates.set_ylabel("tokens/s/GPU, all GPUs counted")
    rates.legend(fontsize=7, title=", ".join(sorted({p.machine for p in points})), title_fontsize=7)
    tpots.axhline(target_ms, color="#888888", linestyle="--", linewidth=1)
    tpots.set_ylim(bottom=0)
    tpots.set_xlabel("batch (sequences); labels are contexts")
    tpots.set_ylabel("TPOT p50, whiskers to p99 (ms)")
    _save(canvas, path, font="none")  # many numbers: as paths they would be most of the file


def _contexts(points: Sequence[DecodePoint]) -> list[int]:
    return sorted({point.context for point in points})


def _best_at(points: Sequence[DecodePoint], context: int, target_ms: float) -> DecodePoint:
    found = [point for point in points if point.context == context]
    within = [point for point in found if point.tpot_p99_ms <= target_ms]
    return max(within or found, key=lambda point: point.tokens_per_s_per_gpu)


def draw_timeline(path: Path, spans: Sequence[Span], num_layers: int = 4) -> None:
    """Draws the first layers of one step: one row a stage, one shade a lane.

    Raises:
        ConfigError: as for `draw_costs`.
    """
    canvas, (axis,) = _canvas(path, width=9.0, height=3.0)
    stages = list(_STAGE_COLOURS)
    lanes = 1 + max(span.lane for span in spans)
    shown = num_layers * lanes * (len(stages) - 1) + lanes
    kept = spans[:shown]
    origin = min(span.begin_us for span in kept)
    for span in kept:
        left, length = span.begin_us - origin, span.end_us - span.begin_us
        axis.barh(
            stages.index(span.stage),
            length,
            left=left,
            height=0.8,
            color=_STAGE_COLOURS[span.stage],
            alpha=1 - 0.6 * span.lane / lanes,
            edgecolor="white",
        )
        axis.text(
            left + length / 2,
            stages.index(span.stage),
            str(span.lane),
            ha="center",
            va="center",
            fontsize=6,
        )
    axis.set_yticks(range(len(stages)), stages)
    axis.invert_yaxis()
    axis.set_xlabel(f"us from the step's begin ({num_layers} layers, numbers are lanes)")
    _save(canvas, path)


def _cost_front(axis: "Axes", cards: Sequence[Hardware]) -> None:
    for name, label in _NAMES.items():
        model = load_model(name)
        usd = afd_cost(token_cost(model, 8192), cards).usd
        active = model.active_params / 1e9
        axis.plot([usd], [active], "o", color="#e45756" if name == "step3" else "#4c78a8")
        axis.annotate(label, (usd, active), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set_xlabel("theoretical decoding cost (USD per 1M tokens), 8K context, AFD")
    axis.set_ylabel("activated parameters (billions)")
    axis.set_ylim(0, 55)


def _cost_by_hardware(axis: "Axes", cards: Sequence[Hardware], context: int) -> None:
    names = ("deepseek-v3", "qwen3-235b-a22b", "qwen3-32b", "step3")
    labels = [card.key.upper() for card in cards] + ["AFD"]
    for index, name in enumerate(names):
        cost = token_cost(load_model(name), context)
        usd = [cost.attention_usd(card) + cost.ffn_usd(card) for card in cards]
        usd.append(afd_cost(cost, cards).usd)
        places = [place + 0.2 * (index - 1.5) for place in range(len(labels))]
        axis.bar(places, usd, width=0.2, label=_NAMES[name])
    axis.set_xticks(range(len(labels)), labels)
    axis.set_title(f"{context // 1024}K context", fontsize=10)
    axis.set_ylabel("USD per 1M tokens")


def _compute_and_memory(axis: "Axes", cards: Sequence[Hardware]) -> None:
    contexts = (8192, 16384, 24576, 32768)
    for name in ("deepseek-v3", "qwen3-235b-a22b", "step3"):
        costs = [token_cost(load_model(name), context) for context in contexts]
        axis.plot(
            [cost.kv_bytes / 1e9 for cost in costs],
            [cost.attn_flops / 1e9 for cost in costs],
            "o-",
            label=f"{_NAMES[name]}, 8K to 32K",
        )
    for card in cards:
        # Up to the edge of the plot along the card's own ridge.
        right = min(3.5, 650 / card.roofline)
        axis.plot([0, right], [0, right * card.roofline], "--", color="#888888", linewidth=1)
        axis.annotate(card.key.upper(), (right, right * card.roofline), fontsize=8)
    axis.set_xlabel("memory access (GB per token)")
    axis.set_ylabel("attention compute (GFLOP per token)")
    axis.set_ylim(0, 680)
    axis.legend(fontsize=8)


def _canvas(
    path: Path, *, columns: int = 1, width: float = 6.0, height: float = 4.0
) -> "tuple[Figure, list[Axes]]":
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"The plot {str(path)!r} has an unknown suffix. Plots are {' or '.join(_SUFFIXES)}. "
            "Rename it"
        )
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The plot cannot be drawn: matplotlib is not installed. Only plots need it. "
            "Install it: pip install 'step3rt[plot]'"
        ) from error
    mpl.rcParams["svg.hashsalt"] = "step3rt"  # element ids would be random otherwise
    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(1, columns, squeeze=False)
    for axis in axes[0]:
        axis.grid(visible=True, alpha=0.3)
        axis.set_axisbelow(True)
    return canvas, list(axes[0])


def _save(canvas: "Figure", path: Path, font: str = "path") -> None:
    """Writes the file; `font`: SVG's text as paths ("path"), or as text ("none")."""
    import matplotlib as mpl

    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    try:
        with mpl.rc_context({"svg.fonttype": font}):
            canvas.savefig(path, dpi=110, metadata=metadata)
    except OSError as error:
        raise ConfigError(
            f"The plot cannot be written to {str(path)!r}: {error.strerror}. Nothing was drawn. "
            "Give another path"
        ) from error
