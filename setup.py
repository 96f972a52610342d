"""Builds the C++ extension, one translation unit per instruction set, and that for CUDA iff a toolkit is there."""

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import ClassVar

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError
from setuptools.modified import newer_group

X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=off: a multiply-add fused in one build and not in another would change the last bit, and so a token.
COMMON_FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off", "-fvisibility=hidden"]

CAPABILITIES = (80, 90, 100, 120)  # what the CUDA kernels are compiled for, where the toolkit can
NVCC_FLAGS = ["-std=c++20", "-O3", "-cudart=static", "--threads=0", "-Xcompiler=-fPIC,-Wall,-fvisibility=hidden"]


def cuda_extension() -> list[Extension]:
    """pcm_fast._cuda, iff PCM_FAST_CUDA asks for it: 0, 1, or auto (the default: where nvcc is found and succeeds)."""
    choice = os.environ.get("PCM_FAST_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"PCM_FAST_CUDA: expected 0, 1 or auto, got {choice!r}")
    nvcc = shutil.which("nvcc")
    if choice == "1" and nvcc is None:
        raise SystemExit("PCM_FAST_CUDA=1: no CUDA toolkit found (nvcc is not on PATH)")
    if choice == "0" or nvcc is None:
        return []
    sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc/cuda").glob(pattern))
    headers = [str(path) for path in Path("csrc/cuda").glob("*.h")]
    # optional: a toolkit that does not get on with this compiler is a warning then, and not the end of the build.
    return [Extension("pcm_fast._cuda", sources, depends=headers, optional=choice == "auto")]


class BuildExt(build_ext):
    """Compiles csrc/cpu/isa_<name>.cpp with the flags of that instruction set, everything else with the common ones."""

    ISA_FLAGS: ClassVar[dict[str, list[str]]] = {
        "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "isa_avx512.cpp": [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns about its own avx512fintrin.h
        ],
    }

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = self.ISA_FLAGS.get(Path(src).name, [])
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "pcm_fast._cuda":
            super().build_extension(ext)
            return
        target = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], target, "newer"):
            return
        known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        capabilities = [number for number in CAPABILITIES if f"sm_{number}" in known]
        if not capabilities:
            raise CompileError(f"nvcc compiles for none of {CAPABILITIES}")
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in capabilities]
        codes.append(f"-gencode=arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}")
        includes = ["-Icsrc", "-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include")]
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-shared", "-o", target, *NVCC_FLAGS, *codes, *includes, *ext.sources]
        print(*command, flush=True)
        if subprocess.run(command).returncode != 0:
            raise CompileError("nvcc failed")


cpu_sources = sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
if not X86:
    cpu_sources = [source for source in cpu_sources if not source.endswith(("isa_avx2.cpp", "isa_avx512.cpp"))]

ParallelCompile().install()  # one process a core

setup(
    ext_modules=[
        Pybind11Extension(
            "pcm_fast._native",
            cpu_sources,
            include_dirs=["csrc"],
            depends=[str(path) for pattern in ("*.h", "cpu/*.h") for path in Path("csrc").glob(pattern)],
            extra_compile_args=COMMON_FLAGS,
            extra_link_args=["-pthread"],
            define_macros=[("PCM_FAST_X86", "1")] if X86 else [],
        ),
        *cuda_extension(),
    ],
    cmdclass={"build_ext": BuildExt},
)
