"""Builds the C++ extension: one translation unit per instruction set, and CUDA iff a toolkit is there."""

import os
import platform
import shutil
from pathlib import Path
from typing import ClassVar

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=off: a multiply-add fused in one build and not in another would change the last bit, and so a token.
COMMON_FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off", "-fvisibility=hidden"]


def cuda_wanted() -> bool:
    """What PCM_FAST_CUDA asks for: 0, 1, or auto (the default: iff nvcc is found)."""
    choice = os.environ.get("PCM_FAST_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"PCM_FAST_CUDA: expected 0, 1 or auto, got {choice!r}")
    nvcc = shutil.which("nvcc")
    if choice == "1" and nvcc is None:
        raise SystemExit("PCM_FAST_CUDA=1: no CUDA toolkit found (nvcc is not on PATH)")
    return choice != "0" and nvcc is not None and any(Path("csrc/cuda").glob("*.cu"))


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


cpu_sources = sorted(str(path) for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
if not X86:
    cpu_sources = [source for source in cpu_sources if not source.endswith(("isa_avx2.cpp", "isa_avx512.cpp"))]

macros = [("PCM_FAST_X86", "1")] if X86 else []
if cuda_wanted():
    macros.append(("PCM_FAST_CUDA", "1"))

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
            define_macros=macros,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
