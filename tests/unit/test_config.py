"""Settings come from flags, then the file, then defaults; mistakes are named with a remedy."""

import os
from pathlib import Path
from typing import Any

import pytest

from step3rt import LLM
from step3rt.config import NodeConfig, ServeConfig, build, resolve_model
from step3rt.errors import ConfigError


def test_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match=r"'lane' does not exist \(x.toml\).*Did you mean 'lanes'"
    ):
        build(ServeConfig, {"model": "m", "lane": 2}, "x.toml")


def test_dashes_and_underscores_are_the_same_key() -> None:
    assert build(ServeConfig, {"model": "m", "max-model-len": 7}, "x").max_model_len == 7


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lanes", 0, "must be from 1 to 8"),
        ("max_waiting_requests", 0, "must be from 1 to 1000000"),
        ("target_tpot_ms", 0, "must be from 1 to 60000"),
        ("lanes", 9, "must be from 1 to 8"),
        ("lanes", "3", "must be of type int"),
        ("lanes", True, "must be of type int"),
        ("drain_timeout_s", float("nan"), "must be from 0 to 86400"),
        ("fabric", "tpc", "Did you mean 'tcp'"),
        ("reflection", 1, "must be of type bool"),
        ("ready_file", "~nobody-of-that-name/x", "knows none of theirs. Write the whole path"),
    ],
)
def test_wrong_values_are_refused(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(ServeConfig, {"model": "m", key: value}, "x.toml")


def test_a_step_must_have_more_time_than_a_lease() -> None:
    with pytest.raises(ConfigError, match=r"'step_timeout_ms' is 2000 and 'lease_ms' is 3000") as e:
        build(ServeConfig, {"model": "m", "step_timeout_ms": 2000}, "x.toml")
    assert "only slow. Raise step_timeout_ms to at least lease_ms" in str(e.value)
    assert "(x.toml)" in str(e.value)
    same = build(ServeConfig, {"model": "m", "step_timeout_ms": 500, "lease_ms": 500}, "x.toml")
    assert same.step_timeout_ms == 500


def test_missing_setting_says_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"'role' is missing.*what this instance does"):
        build(NodeConfig, {"model": "m"}, "command line")


def test_whole_numbers_are_accepted_for_seconds() -> None:
    assert build(ServeConfig, {"model": "m", "drain_timeout_s": 3}, "x").drain_timeout_s == 3.0


def test_model_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json.*Give its path, or 'nano'"):
        resolve_model(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model(tmp_path / "absent")


def test_model_that_is_closed_to_this_user_is_a_wrong_setting(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "model").mkdir(parents=True)
    closed.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(ConfigError, match=r"cannot be read: Permission denied.*/home"):
            resolve_model(closed / "model")
    finally:
        os.seteuid(user)
        closed.chmod(0o700)


def test_precision_names_the_types_on_the_way() -> None:
    def wire(**values: str) -> tuple[str, str, str]:
        return build(ServeConfig, {"model": "m", **values}, "x").wire_dtypes()

    assert wire(dtype="float32") == ("float32", "float32", "float32")
    assert wire(dtype="bfloat16") == ("bfloat16", "bfloat16", "bfloat16")
    assert wire(precision="production") == ("fp8", "bfloat16", "fp8")
    assert wire(precision="production", kv_dtype="bfloat16") == ("fp8", "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "float16"}, r"'dtype' is 'float16' \(LLM\)"),
        ({"fabric": "pigeon"}, r"'fabric' is 'pigeon' \(LLM\)"),
        ({"attention": "2"}, "must be of type int"),
        ({"lanes": 9}, "from 1 to 8"),
        ({"devices": "cpu"}, "must be a list of texts"),
    ],
)
def test_llm_refuses_a_wrong_setting_by_itself(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM("nano", **values)
