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
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import step3rt

ARCHITECTURE = "sm_90a"
"""Hopper with its architecture-specific instructions (wgmma, setmaxnreg)."""

FIXED_OPTIONS = (
    f"--gpu-architecture={ARCHITECTURE}",
    "-std=c++17",
    "-default-device",
    "--generate-line-info",
    "--ptxas-options=-v",
    "--no-cache",  # a hit in NVRTC's own cache comes without the ptxas report
)


class CompileError(RuntimeError):
    """NVRTC is missing or rejected a source; `log` is its full output."""

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
        CompileError: NVRTC is missing or rejects the source.
    """
    nvrtc = _load_nvrtc()
    all_options = (*FIXED_OPTIONS, *options)
    key = _cache_key(source, all_options, nvrtc)
    cubin_path = _cache_dir() / f"{source.stem}-{key}.cubin"
    report_path = cubin_path.with_suffix(".json")
    # The report is written last: its presence means that the cubin is complete.
    if report_path.is_file():
        report = ResourceReport(**json.loads(report_path.read_text()))
        return CompiledKernel(source.stem, cubin_path, report)
    cubin, log = _run_nvrtc(nvrtc, source, all_options)
    report = parse_report(source.stem, log)
    _write_atomically(cubin_path, cubin)
    _write_atomically(report_path, json.dumps(asdict(report)).encode())
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
    except RuntimeError as error:
        raise CompileError(
            "The user of this process has no home directory. Compiled kernels are kept there, in "
            ".cache/step3rt. Set STEP3RT_CACHE_DIR to a directory"
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


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
