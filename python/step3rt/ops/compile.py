"""Compiles the CUDA sources to cubins through NVRTC and caches them on disk.

Never touches a GPU or a driver: a machine without either compiles every kernel.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import step3rt
from step3rt.errors import ConfigError

ARCHITECTURE = "sm_90a"
"""Hopper with its architecture-specific instructions (wgmma, setmaxnreg)."""

COMPUTE_CAPABILITY = (9, 0)
"""Of the GPUs that this code runs on; no others, newer ones neither."""

FIXED_OPTIONS = (
    f"--gpu-architecture={ARCHITECTURE}",
    "-std=c++17",
    "-default-device",
    "--generate-line-info",
    "--ptxas-options=-v",
    "--no-cache",  # a hit in NVRTC's own cache comes without the ptxas report
)


class CompileError(ConfigError):
    """A kernel cannot be compiled or kept; `log` is the compiler's full output, if it ran."""

    def __init__(self, message: str, log: str = "") -> None:
        """Keeps the compiler's output beside the message."""
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True)
class ResourceReport:
    """What ptxas said about one kernel.

    `registers` is the allocation at entry; a kernel that moves registers between warpgroups uses
    more than that in some of them, so only the spill counts tell whether the code fits.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    is_wgmma_serialized: bool


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A cubin on disk and the resources of its one entry point."""

    name: str
    cubin_path: Path
    report: ResourceReport


def kernels_dir() -> Path:
    """Returns the folder of the CUDA sources, part of the installed package.

    Raises:
        CompileError: it is missing.
    """
    folder = Path(step3rt.__path__[0]) / "kernels"
    if (folder / "common" / "types.cuh").is_file():
        return folder
    raise CompileError(
        f"CUDA sources not found in {folder}. The kernels are compiled from source at first use. "
        "Reinstall step3rt, or run from a complete checkout."
    )


def kernel_sources() -> list[Path]:
    """Returns every kernel of the project, one entry point per file, sorted by path."""
    return sorted(kernels_dir().glob("*/*.cu"))


def compile_kernel(source: Path, options: Sequence[str] = ()) -> CompiledKernel:
    """Compiles one `.cu` file, or returns the cached cubin of the same source and options.

    Args:
        source: A file of `kernel_sources()`; its stem is the entry point.
        options: Further NVRTC options, for example `-DSTEP3RT_WAIT_LIMIT_NS=1000000000`.

    Raises:
        CompileError: NVRTC is missing or rejects the source, or the cache cannot be written.
    """
    nvrtc = _load_nvrtc()
    all_options = (*FIXED_OPTIONS, *options)
    key = _cache_key(source, all_options, nvrtc)
    cubin_path = _cache_dir() / f"{source.stem}-{key}.cubin"
    report = _read_cached(cubin_path)
    if report is None:
        cubin, log = _run_nvrtc(nvrtc, source, all_options)
        report = parse_report(source.stem, log)
        _write_cached(cubin_path, cubin, report)
    return CompiledKernel(source.stem, cubin_path, report)


def parse_report(name: str, log: str) -> ResourceReport:
    """Reads the resources of entry point `name` from the output of `ptxas -v`.

    Raises:
        CompileError: the log does not describe that entry point.
    """
    section = log.partition(f"Compiling entry function '{name}'")[2]
    used = re.search(r"Used (\d+) registers", section)
    frame = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section
    )
    if used is None or frame is None:
        raise CompileError(
            f"The compiler's report has no resources for `{name}`. The entry point must be named "
            f"as its file. Rename one of them.\n{log!r}",
            log,
        )
    return ResourceReport(
        registers=int(used[1]),
        stack_bytes=int(frame[1]),
        spill_store_bytes=int(frame[2]),
        spill_load_bytes=int(frame[3]),
        is_wgmma_serialized="serializ" in log,
    )


def _cache_dir() -> Path:
    explicit = os.environ.get("STEP3RT_CACHE_DIR")
    if explicit:
        return Path(explicit) / "cubin"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:  # a container's user without a home
        raise CompileError(
            f"There is no folder to keep compiled kernels in: {error} Set STEP3RT_CACHE_DIR to "
            "one that this user can write to."
        ) from error
    return root / "step3rt" / "cubin"


def _cache_key(source: Path, options: Sequence[str], nvrtc: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    digest = hashlib.sha256(json.dumps([major.value, minor.value, *options]).encode())
    # All headers, not only the included ones: there are few, and this cannot miss one.
    for path in [source, *sorted(kernels_dir().glob("*/*.cuh"))]:
        text = path.read_bytes()
        digest.update(f"{path.name}:{len(text)}:".encode())
        digest.update(text)
    return digest.hexdigest()[:32]


def _read_cached(cubin_path: Path) -> ResourceReport | None:
    """The report of a cubin that is as it was written; else it is compiled again.

    A file may be another user's who keeps it private, be lost to a cleaner of temporary files, or
    be cut off by a host that went down before its disk had it.
    """
    try:
        record = json.loads(cubin_path.with_suffix(".json").read_bytes())
        is_whole = record["sha256"] == hashlib.sha256(cubin_path.read_bytes()).hexdigest()
        return ResourceReport(**record["report"]) if is_whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_cached(cubin_path: Path, cubin: bytes, report: ResourceReport) -> None:
    """Writes a cubin, then what says that it is whole."""
    record = {"sha256": hashlib.sha256(cubin).hexdigest(), "report": asdict(report)}
    try:
        cubin_path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(cubin_path, cubin)
        _write_atomically(cubin_path.with_suffix(".json"), json.dumps(record).encode())
    except OSError as error:
        raise CompileError(
            f"The compiled kernel {cubin_path} cannot be kept: {error}. The driver loads it from "
            "there. Make room there, or set STEP3RT_CACHE_DIR to a folder that this user can "
            "write to."
        ) from error


def _write_atomically(path: Path, data: bytes) -> None:
    # By name and not by tempfile, whose files no other user of the cache could read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _library_dirs() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for folder in ("cu13/lib", "cuda_nvrtc/lib"):  # wheels of CUDA 13, of CUDA 12
            yield Path(root) / folder
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            yield Path(os.environ[variable]) / "lib64"
    yield Path("/usr/local/cuda/lib64")


@functools.cache
def _load_nvrtc() -> ctypes.CDLL:
    searched = []
    for folder in _library_dirs():
        searched.append(str(folder))
        for path in sorted(folder.glob("libnvrtc.so.1[23]")):
            # NVRTC opens its builtins by soname; loaded first, they are found in any folder.
            for builtins in folder.glob("libnvrtc-builtins.so.1[23].*"):
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(str(path))
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    raise CompileError(
        f"NVRTC (libnvrtc.so.12 or .13) not found in {searched}. It compiles the CUDA kernels. "
        "Install `nvidia-cuda-nvrtc`, or set CUDA_HOME."
    )


def _run_nvrtc(nvrtc: ctypes.CDLL, source: Path, options: Sequence[str]) -> tuple[bytes, str]:
    def check(status: int, what: str, log: str = "") -> None:
        if status != 0:
            reason = nvrtc.nvrtcGetErrorString(status).decode()
            raise CompileError(f"{what} failed for {source.name}: {reason}.\n{log}", log)

    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
    )
    check(status, "nvrtcCreateProgram")
    try:
        encoded = [f"-I{kernels_dir()}".encode(), *(option.encode() for option in options)]
        argument = (ctypes.c_char_p * len(encoded))(*encoded)
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), argument)
        log = _read_output(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        check(status, "Compilation", log)
        return _read_output(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read_output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
        raise CompileError(f"NVRTC produced no {what}.")
    buffer = ctypes.create_string_buffer(size.value)
    if getattr(nvrtc, f"nvrtcGet{what}")(program, buffer) != 0:
        raise CompileError(f"NVRTC produced no {what}.")
    return buffer.raw
