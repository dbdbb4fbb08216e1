import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from step3rt.ops import launch, mfa_decode, rmsnorm_quantize, router_topk
from step3rt.ops.compile import (
    CompileError,
    compile_kernel,
    kernel_sources,
    kernels_dir,
    parse_report,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEP3RT_CACHE_DIR", str(tmp_path))
    return tmp_path / "cubin"


@pytest.mark.parametrize("source", kernel_sources(), ids=lambda path: path.stem)
def test_every_kernel_compiles_without_a_gpu_and_without_spills(source: Path, cache: Path) -> None:
    compiled = compile_kernel(source)
    assert compiled.cubin_path.read_bytes()[:4] == b"\x7fELF"
    report = compiled.report
    assert (report.stack_bytes, report.spill_store_bytes, report.spill_load_bytes) == (0, 0, 0)
    assert not report.is_wgmma_serialized
    assert report.registers > 0


@pytest.mark.parametrize(
    "kernel",
    [
        *(variant.kernel for variant in router_topk.VARIANTS),
        *rmsnorm_quantize.ADD_KERNELS,
        *mfa_decode.BF16_KERNELS,
        *mfa_decode.FP8_KERNELS,
    ],
    ids=lambda kernel: " ".join((Path(kernel.source).stem, *kernel.options)),
)
def test_every_build_that_a_launcher_chooses_has_no_spills(
    kernel: launch.Kernel, cache: Path
) -> None:
    report = compile_kernel(kernels_dir() / kernel.source, kernel.options).report
    assert (report.stack_bytes, report.spill_store_bytes, report.spill_load_bytes) == (0, 0, 0)
    assert not report.is_wgmma_serialized


@pytest.mark.parametrize("name", ["sm90_fp8_moe_gate_up", "sm90_fp8_moe_down", "sm90_fp8_linear"])
def test_a_build_for_racecheck_has_every_lane_arrive(name: str, cache: Path) -> None:
    source = next(path for path in kernel_sources() if path.stem == name)
    usual = compile_kernel(source)
    for_racecheck = compile_kernel(source, ["-DSTEP3RT_EVERY_LANE_ARRIVES"])
    assert for_racecheck.cubin_path.read_bytes() != usual.cubin_path.read_bytes()
    assert not for_racecheck.report.is_wgmma_serialized


@pytest.mark.parametrize("source", kernel_sources(), ids=lambda path: path.stem)
def test_every_kernel_states_its_contract_and_only_headers_hold_ptx(source: Path) -> None:
    text = source.read_text()
    assert text.startswith("//")
    for word in ("Threads", "Shared memory", "Roofline", "Reference"):
        assert f"// {word}" in text, f"{source.name} does not state its {word.lower()}"
    assert "asm" not in text
    assert len(text.splitlines()) <= 500


def test_a_spill_is_read_from_the_report() -> None:
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    report = parse_report("k", log)
    assert (report.stack_bytes, report.spill_store_bytes, report.spill_load_bytes) == (16, 8, 4)
    assert report.registers == 255
    with pytest.raises(CompileError, match="no resources for `other`"):
        parse_report("other", log)


def test_a_kernel_that_cannot_keep_its_registers_reports_the_spill(
    cache: Path, tmp_path: Path
) -> None:
    source = tmp_path / "greedy.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float* p) {\n'
        "  float v[128];\n"
        "  for (int i = 0; i < 128; ++i) v[i] = p[i * 7];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 128; ++i) p[i] = v[i] * v[(i + 1) % 128];\n"
        "}\n"
    )
    assert compile_kernel(source).report.spill_store_bytes > 0


def test_the_cache_is_keyed_by_source_and_options(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void tiny(int* p) { *p = VALUE; }\n')
    one = compile_kernel(source, ["-DVALUE=1"])
    modified = one.cubin_path.stat().st_mtime_ns
    assert compile_kernel(source, ["-DVALUE=1"]) == one
    assert one.cubin_path.stat().st_mtime_ns == modified
    assert compile_kernel(source, ["-DVALUE=2"]).cubin_path != one.cubin_path
    source.write_text(source.read_text() + "// changed\n")
    assert compile_kernel(source, ["-DVALUE=1"]).cubin_path != one.cubin_path
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", [_truncate, _empty, Path.unlink])
def test_what_a_crash_or_a_cleaner_left_of_a_cached_kernel_is_compiled_again(
    damage: Callable[[Path], None], suffix: str, cache: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void tiny(int* p) { *p = 1; }\n')
    compiled = compile_kernel(source)
    cubin = compiled.cubin_path.read_bytes()
    damage(compiled.cubin_path.with_suffix(suffix))
    assert compile_kernel(source) == compiled
    assert compiled.cubin_path.read_bytes() == cubin
    modified = compiled.cubin_path.stat().st_mtime_ns
    assert compile_kernel(source) == compiled
    assert compiled.cubin_path.stat().st_mtime_ns == modified


def test_other_users_can_read_a_cache_that_they_share(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void tiny(int* p) { *p = 1; }\n')
    before = os.umask(0o022)
    try:
        compile_kernel(source)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()}
    assert modes == {0o644}


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void tiny(int* p) { *p = 1; }\n')
    monkeypatch.setenv("STEP3RT_CACHE_DIR", str(source))  # no folder
    with pytest.raises(CompileError, match=r"tiny\.cu/cubin.*set STEP3RT_CACHE_DIR"):
        compile_kernel(source)


def test_a_user_without_a_home_is_asked_for_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" __global__ void tiny(int* p) { *p = 1; }\n')
    for name in ("STEP3RT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 0x7FFFFFF1)  # of no user
    with pytest.raises(CompileError, match="Set STEP3RT_CACHE_DIR"):
        compile_kernel(source)


def test_a_rejected_source_raises_with_the_compilers_words_and_caches_nothing(
    cache: Path, tmp_path: Path
) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('extern "C" __global__ void broken() { not_declared(); }\n')
    with pytest.raises(CompileError, match="not_declared"):
        compile_kernel(source)
    assert not cache.exists()
