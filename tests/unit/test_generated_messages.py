"""The checked-in messages are what `make proto` generates."""

from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def test_generated_messages_are_current(tmp_path: Path) -> None:
    names = ["step3rt/v1/common.proto", "step3rt/v1/inference_service.proto"]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    well_known = Path(protoc.__file__).parent / "_proto"
    includes = [f"-I{ROOT / 'proto'}", f"-I{well_known}"]
    assert protoc.main(["protoc", *includes, *outputs, *names]) == 0
    checked_in = sorted((ROOT / "python/step3rt/v1").glob("*_pb2*"))
    assert len(checked_in) == 5
    for path in checked_in:
        assert path.read_text() == (tmp_path / "step3rt/v1" / path.name).read_text(), path.name
