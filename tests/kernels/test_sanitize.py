import pytest

from tests.kernels.sanitize import CASES, parse_arguments


def test_cases_are_named_and_all_run_without_a_name() -> None:
    assert parse_arguments([]).cases == []
    named = parse_arguments(["moe", "links", "--every-lane-arrives"])
    assert named.cases == ["moe", "links"]
    assert named.every_lane_arrives
    assert {"moe", "linear", "links"} <= CASES.keys()


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["moo"])
    assert "no case moo" in capsys.readouterr().err
