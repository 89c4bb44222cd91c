"""Build the CUDA kernels with nvcc, or with --harness the same bodies for the host with g++.

python kernels/ensembler_kernels/cuda/build.py [--harness]: one shared library in `_build` beside this file. Needs no
GPU and imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "_build" / "libensembler_kernels.so"
HARNESS = HERE / "_build" / "libensembler_kernels_harness.so"

ARCHITECTURES = (80, 90, 100)
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--compiler-options", "-fPIC", "-cudart", "static", "--threads", "0")
"""-fmad=false: one rounding per operation, as in the reference and the harness; the kernels wait for memory anyway."""

GXX_FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off"),
    *("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
)


def code_flags(architecture: int, *, ptx: bool = False) -> list[str]:
    """The nvcc flags for machine code of one architecture, with `ptx` for what comes after it as well."""
    code = f"[sm_{architecture},compute_{architecture}]" if ptx else f"sm_{architecture}"
    return ["-gencode", f"arch=compute_{architecture},code={code}"]


def build_library(output: Path = LIBRARY) -> Path:
    """Build the CUDA library for every architecture, with PTX of the last for later ones."""
    codes = [flag for a in ARCHITECTURES for flag in code_flags(a, ptx=a == ARCHITECTURES[-1])]
    return _compile(["nvcc", *NVCC_FLAGS, "-shared", *codes, str(HERE / "kernels.cu")], output)


def build_harness(output: Path = HARNESS) -> Path:
    """Build the host harness."""
    return _compile(["g++", *GXX_FLAGS, "-shared", str(HERE / "harness.cpp")], output)


def _compile(command: list[str], output: Path) -> Path:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not on the PATH: it compiles {Path(command[-1]).name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(unfinished)], check=True)
    return unfinished.replace(output)  # complete or not there: another process may be about to load it


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels.")
    parser.add_argument("--harness", action="store_true", help="build for the host with g++, to test without a GPU")
    try:
        print(build_harness() if parser.parse_args().harness else build_library())
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
