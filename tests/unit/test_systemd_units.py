"""The shipped units are valid, hardened, and restart what must be restarted."""

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


def test_instances_keep_compiled_kernels_where_they_may_write() -> None:
    lines = (UNITS / "step3rt-node@.service").read_text().splitlines()
    assert "ProtectSystem=strict" in lines
    assert "CacheDirectory=step3rt" in lines
    assert "Environment=STEP3RT_CACHE_DIR=%C/step3rt" in lines


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
