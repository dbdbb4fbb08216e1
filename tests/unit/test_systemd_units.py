"""The shipped units are valid, hardened, and restart what must be restarted."""

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
# systemd's own scale ends at 10 (unsafe); in tenths, as --threshold takes it.
MAX_EXPOSURE = 20


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units with a program that exists here, the template as an instance."""
    paths = []
    for unit in sorted(UNITS.glob("step3rt*")):
        target = tmp_path / unit.name.replace("@.", "@ffn0.")
        text = unit.read_text().replace("/opt/step3rt/bin/step3rt", "/bin/true")
        target.write_text(text)
        if "@" in unit.name:
            (tmp_path / unit.name).write_text(text)
        paths.append(target)
    return paths


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "install systemd: .ci/run does"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_units_pass_verification(units: list[Path]) -> None:
    done = systemd_analyze("verify", *units)
    assert (done.returncode, done.stderr) == (0, "")


def test_services_are_hardened(units: list[Path]) -> None:
    services = [unit for unit in units if unit.suffix == ".service"]
    assert len(services) == 2
    for service in services:
        done = systemd_analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", service)
        assert done.returncode == 0, done.stdout


def test_services_stay_down_after_bad_configuration_only(units: list[Path]) -> None:
    for unit in units:
        if unit.suffix == ".service":
            lines = unit.read_text().splitlines()
            assert "Restart=always" in lines
            assert "RestartPreventExitStatus=78" in lines


def settings(unit: Path, key: str) -> list[str]:
    """The values of `key` in `unit`, in order."""
    lines = unit.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(f"{key}=") for line in lines if line.startswith(f"{key}=")]


def test_services_come_back_however_often_they_end() -> None:
    for unit in UNITS.glob("*.service"):
        assert settings(unit, "StartLimitIntervalSec") == ["0"]


def test_instances_reach_the_devices_under_every_name_that_drivers_gave_them() -> None:
    allowed = settings(UNITS / "step3rt-node@.service", "DeviceAllow")
    patterns = [value.removeprefix("char-").removesuffix(" rw") for value in allowed]
    before_550 = ("nvidia-frontend", "nvidia-uvm", "nvidia-caps")
    since_550 = ("nvidia", "nvidiactl", "nvidia-uvm", "nvidia-caps")
    for name in (*before_550, *since_550, "infiniband_verbs"):
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name


def test_instances_keep_compiled_kernels_though_their_user_has_no_home() -> None:
    unit = UNITS / "step3rt-node@.service"
    assert settings(unit, "CacheDirectory") == ["step3rt"]
    (environment,) = settings(unit, "Environment")
    assert environment.split() == ["HOME=%C/step3rt", "STEP3RT_CACHE_DIR=%C/step3rt"]


def test_example_configurations_are_accepted() -> None:
    from step3rt.config import NodeConfig, ServeConfig, build
    from step3rt.setting import load_toml

    build(ServeConfig, load_toml(UNITS / "serve.toml"), "serve.toml")
    for name in ("ffn0", "attention0"):
        file = UNITS / f"node-{name}.toml"
        assert build(NodeConfig, load_toml(file), file.name).role == name.rstrip("0")


def test_every_unit_that_the_guide_enables_has_its_configuration() -> None:
    guide = (UNITS.parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
    names = set(re.findall(r"step3rt-node@([a-z0-9]+)", guide))
    assert names == {"ffn0", "attention0"}
    for name in names:
        assert f"deploy/systemd/node-{name}.toml" in guide
        assert (UNITS / f"node-{name}.toml").is_file()
