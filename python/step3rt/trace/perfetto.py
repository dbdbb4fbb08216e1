"""Writes a timeline as a Perfetto trace, for https://ui.perfetto.dev.

One track per instance and lane; an arrow from every send to the peer's work that it starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from step3rt.errors import ConfigError, InvalidArgument
from step3rt.trace.recording import Recording
from step3rt.trace.timeline import Rows, Timeline

_SEQUENCE_ID = 1


@dataclass(slots=True)
class _Slice:
    name: str
    begin_ns: int
    end_ns: int
    frame: int
    layer: int
    flows: list[int]


def check_installed() -> None:
    """Checks that traces can be written, before something takes its time to be traced.

    Raises:
        ConfigError: the package that knows the format is not installed.
    """
    try:
        import perfetto.trace_builder.proto_builder  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The Python package {error.name!r} is not installed. It knows Perfetto's format. "
            "Install it with: pip install 'step3rt[trace]'"
        ) from error


def write(timeline: Timeline, path: Path) -> int:
    """Writes the trace and returns how many slices it has.

    Raises:
        ConfigError: the package that knows the format is not installed.
        InvalidArgument: the file cannot be written.
    """
    check_installed()
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    builder = TraceProtoBuilder()
    tracks = _tracks(timeline)
    num_slices = 0
    for process, recording in enumerate(timeline.recordings, start=1):
        descriptor = builder.add_packet().track_descriptor
        descriptor.uuid = process << 32
        descriptor.process.pid = process
        descriptor.process.process_name = recording.name
        for lane in range(len(recording.lanes)):
            uuid = (process << 32) + 1 + lane
            descriptor = builder.add_packet().track_descriptor
            descriptor.uuid, descriptor.parent_uuid = uuid, process << 32
            descriptor.name = f"lane {lane}"
            for each in tracks[recording.name, lane]:
                num_slices += 1
                begin = builder.add_packet()
                begin.timestamp, begin.trusted_packet_sequence_id = each.begin_ns, _SEQUENCE_ID
                begin.track_event.type = TrackEvent.TYPE_SLICE_BEGIN
                begin.track_event.track_uuid, begin.track_event.name = uuid, each.name
                begin.track_event.flow_ids.extend(each.flows)
                for name, value in (("layer", each.layer), ("frame", each.frame)):
                    annotation = begin.track_event.debug_annotations.add()
                    annotation.name, annotation.uint_value = name, value
                end = builder.add_packet()
                end.timestamp, end.trusted_packet_sequence_id = each.end_ns, _SEQUENCE_ID
                end.track_event.type = TrackEvent.TYPE_SLICE_END
                end.track_event.track_uuid = uuid
    try:
        path.write_bytes(builder.serialize())
    except OSError as error:
        raise InvalidArgument(
            f"{str(path)!r} cannot be written: {error.strerror}. The trace goes there. Give "
            "another file"
        ) from error
    return num_slices


def _tracks(timeline: Timeline) -> dict[tuple[str, int], list[_Slice]]:
    tracks: dict[tuple[str, int], list[_Slice]] = {}
    sends: dict[tuple[str, int, int], _Slice] = {}
    work: dict[tuple[str, int, int], _Slice] = {}
    for recording in timeline.recordings:
        for lane, rows in enumerate(recording.lanes):
            slices = list(_slices(recording, rows))
            tracks[recording.name, lane] = slices
            for each in slices:
                if each.name == "send":
                    sends[recording.name, lane, each.frame] = each
                elif each.name != "wait":
                    # What an arrival starts: the experts, or the attention of the next layer.
                    started = each.frame if recording.shape.role == "ffn" else each.frame - 1
                    work[recording.name, lane, started] = each
    flow = 0
    num_layers = timeline.recordings[0].shape.num_layers
    layers: dict[tuple[str, int, int], int] = {}
    for exchange in timeline.exchanges:
        source, rank = f"attention {exchange.source}", f"ffn {exchange.rank}"
        frames = zip(
            exchange.attention["frame"].tolist(), exchange.ffn["frame"].tolist(), strict=True
        )
        for sent, served in frames:
            layers[rank, exchange.lane, served] = sent % num_layers
            for start, end in (
                ((source, exchange.lane, sent), (rank, exchange.lane, served)),
                ((rank, exchange.lane, served), (source, exchange.lane, sent)),
            ):
                if end in work:  # the last layer of all starts nothing
                    flow += 1
                    sends[start].flows.append(flow)
                    work[end].flows.append(flow)
    for (name, lane), slices in tracks.items():
        for each in slices:
            # A rank counts on when a step loses its sources half way: the source's count is right.
            each.layer = layers.get((name, lane, each.frame), each.layer)
    return tracks


def _slices(recording: Recording, rows: Rows) -> Iterator[_Slice]:
    num_layers = recording.shape.num_layers
    previous_end: int | None = None
    for row in rows:
        frame = int(row["frame"])
        layer = frame % num_layers
        send_begin, send_end = int(row["send_begin"]), int(row["send_end"])
        wait_begin, wait_end = int(row["wait_begin"]), int(row["wait_end"])
        if recording.shape.role == "ffn":
            yield _Slice("wait", wait_begin, wait_end, frame, layer, [])
            yield _Slice("ffn", wait_end, send_begin, frame, layer, [])
            yield _Slice("send", send_begin, send_end, frame, layer, [])
            continue
        if previous_end is not None:
            name = "attention" if layer else "head, sampler, attention"
            yield _Slice(name, previous_end, send_begin, frame, layer, [])
        yield _Slice("send", send_begin, send_end, frame, layer, [])
        yield _Slice("wait", max(wait_begin, send_end), wait_end, frame, layer, [])
        previous_end = wait_end
