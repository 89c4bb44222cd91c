"""Compile every Triton and CUDA kernel for sm_80, sm_90 and sm_100, without a GPU, and look at the machine code.

python kernels/compile_check.py [--write]: fails if a kernel spills registers or does not read its members by 128-bit
global loads. Prints what each kernel needs, and the time floor that its bytes imply; `--write` puts this into
compiled.md. Nothing here is measured: the floor is bytes divided by the bandwidth that NVIDIA states.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton  # type: ignore[import-untyped]  # Triton has no type stubs
from ensembler_kernels import triton_configs, triton_kernels
from ensembler_kernels.cuda.build import ARCHITECTURES, HERE, NVCC_FLAGS, code_flags
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

DOCUMENT = Path(__file__).with_name("compiled.md")

H100_BANDWIDTH = 3.35e12  # bytes per second: H100 SXM5 data sheet
WIDTH, NUM_MEMBERS, NUM_ALPHAS = 151_936, 3, 16  # of the table: Qwen2.5's vocabulary, a log-ratio, a usual grid
DTYPES = {"bf16": 2, "fp32": 4}
CUDA_DTYPES = {"0": "fp32", "1": "bf16", "2": "fp16", "3": "mixed"}  # enum Dtype of problem.h
KERNELS = {
    "combine": "combine",
    "argmax": "sample",
    "sample": "sample",
    "logprob": "logprob",
    "normaliser": "prepass",
    "threshold": "prepass",
}
"""Each Triton kernel, and the kind of launch that it has; `argmax` is `sample` without noise."""


@dataclass(frozen=True, order=True)
class Job:
    """One Triton kernel to compile; `options`: with normalisers, a cutoff, and rows that are (rows, positions)."""

    kernel: str
    dtype: str
    block: int
    num_warps: int
    options: bool
    architecture: int


@dataclass(frozen=True)
class Code:
    """The compiled code of one kernel; loads are counted in the machine code."""

    implementation: str
    kernel: str
    dtype: str
    config: str
    architecture: int
    registers: int
    shared_bytes: int
    spills: int
    wide_loads: int
    expected_wide_loads: int

    @property
    def faults(self) -> list[str]:
        name = f"{self.implementation} {self.kernel} {self.dtype} {self.config} sm_{self.architecture}"
        found = [f"{name}: {self.spills} bytes or instructions of spilled registers"] if self.spills else []
        if self.wide_loads < self.expected_wide_loads:
            found.append(f"{name}: {self.wide_loads} 128-bit loads, expected {self.expected_wide_loads}")
        return found


# -- Triton ----------------------------------------------------------------------------------------------------------


def triton_jobs() -> Iterator[Job]:
    """Every configuration of every kernel, and the first once with all options."""
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            for kernel, kind in KERNELS.items():
                few, many = triton_configs.CONFIGS[kind]
                for block, num_warps in dict.fromkeys((few, many)):
                    yield Job(kernel, dtype, block, num_warps, False, architecture)
                if kernel not in ("normaliser", "threshold"):
                    yield Job(kernel, dtype, *few, True, architecture)


def compile_triton(job: Job) -> Code:
    """Compile as the launcher would for members of one dtype whose strides and widths are multiples of 16."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    name = "sample" if job.kernel == "argmax" else job.kernel
    source = _source(getattr(triton_kernels, f"{name}_kernel"), job)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", job.architecture, 32),
        options={"num_warps": job.num_warps, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        ((_, resources, sass),) = functions_of(Path(cubin.name))
    return Code(
        implementation="Triton",
        kernel=job.kernel,
        dtype=job.dtype,
        config=f"{job.block} ids, {job.num_warps} warps" + (", all options" if job.options else ""),
        architecture=job.architecture,
        registers=resources["REG"],
        shared_bytes=made.metadata.shared,
        spills=resources["STACK"] + count("LDL|STL", sass),
        wide_loads=count(r"LDG\.E\.128", sass),
        expected_wide_loads=NUM_MEMBERS * job.block * DTYPES[job.dtype] // (16 * 32 * job.num_warps),
    )


def _source(kernel: Any, job: Job) -> Any:
    """The kernel with argument types: `d` after a type says that the value is a multiple of 16."""
    member = (f"*{job.dtype}", "i64d", "i64d", "i32d")
    floats = ("table", "log_sums", "thresholds", "temperatures", "out", "partial", "steps", "logprobs", "totals")
    types: dict[str, Any] = {
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(("width", "shared", "held"), "i32d"),
        "members": (member,) * NUM_MEMBERS,
        **dict.fromkeys(("rows", "runs", "counters"), "*i32"),
        "greedy": "*i1",
        **dict.fromkeys(("noise", "targets", "tokens"), "*i64"),
    }
    constants = {
        "HAS_ROWS": job.options,
        "RAW": 0,
        "NORMALISED": job.options,
        "CUT": job.options,
        "DRAWS": job.kernel == "sample",
        "TOTALS": job.options,
        "BLOCK": job.block,
        "SPLITS": triton.next_power_of_2(-(-WIDTH // job.block)),
        "POINTS": NUM_ALPHAS,
    }
    if not job.options:
        constants["positions"] = 1
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(describe(one, (*path, i)) for i, one in enumerate(kind))
        if kind.startswith("*") or kind.endswith("d"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind.removesuffix("d")

    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        else:
            signature[name] = describe(types.get(name, "i32"), (i,))
    return ASTSource(kernel, signature, values, attributes)


# -- CUDA ------------------------------------------------------------------------------------------------------------


def compile_cuda(architecture: int) -> list[Code]:
    """Compile kernels.cu for one architecture; one entry per kernel and dtype."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = [flag for flag in NVCC_FLAGS if flag not in ("-cudart", "static")]
        command = ["nvcc", *flags, "-cubin", *code_flags(architecture), str(HERE / "kernels.cu"), "-o", str(cubin)]
        subprocess.run(command, check=True)
        for name, resources, sass in functions_of(cubin):
            match = re.search(r"\d([a-z_]+)_kernel(?:ILi(\d)E)?", name)
            if match is None:
                raise RuntimeError(f"{name}: expected the name of a kernel of kernels.cu")
            kernel, dtype = match[1], CUDA_DTYPES[match[2] or "0"]
            found.append(
                Code(
                    implementation="CUDA",
                    kernel=kernel,
                    dtype=dtype,
                    config="1024 ids, 4 warps",
                    architecture=architecture,
                    registers=resources["REG"],
                    shared_bytes=resources["SHARED"],
                    spills=resources["STACK"] + count("LDL|STL", sass),
                    wide_loads=count(r"LDG\.E\.128", sass),
                    # one loop over the members: 8 ids are one such load, or two of fp32
                    expected_wide_loads=2 if dtype in ("fp32", "mixed") else 1,
                )
            )
    return found


# -- machine code ----------------------------------------------------------------------------------------------------


def functions_of(cubin: Path) -> list[tuple[str, dict[str, int], str]]:
    """Name, resource usage and disassembly of every kernel in a cubin."""
    usage = _cuobjdump("-res-usage", cubin)
    resources = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.+)", usage)
    }
    parts = re.split(r"Function : (\S+)", _cuobjdump("-sass", cubin))[1:]
    return [(name, resources[name], sass) for name, sass in zip(parts[::2], parts[1::2], strict=True)]


def count(instruction: str, sass: str) -> int:
    return len(re.findall(rf"\b(?:{instruction})\b", sass))


def _cuobjdump(flag: str, cubin: Path) -> str:
    """Triton's wheel brings the tool along; a CUDA toolkit may not."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's wheel nor on the PATH")
    path = f"{shipped.parent}:{os.environ['PATH']}"  # it calls nvdisasm
    return subprocess.run(
        [tool, flag, str(cubin)], check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}
    ).stdout


# -- the table -------------------------------------------------------------------------------------------------------


def bytes_per_row(kernel: str, dtype: str, block: int) -> int:
    """Bytes that one row moves to and from memory; partial results of the operations are written and read once."""
    member, splits = WIDTH * DTYPES[dtype], -(-WIDTH // block)
    return {
        "combine": NUM_MEMBERS * member + 4 * WIDTH,
        "argmax": NUM_MEMBERS * member + 2 * 20 * splits,
        "sample": NUM_MEMBERS * member + 2 * 20 * splits,
        "logprob": NUM_MEMBERS * member + (NUM_ALPHAS * 2 + 1) * 8 * splits,
        "normaliser": NUM_MEMBERS * member,
        "threshold": NUM_MEMBERS * member,
    }[kernel]


def table(codes: Sequence[Code]) -> str:
    """One line per kernel, dtype and configuration; registers for the three architectures side by side."""
    compilers = f"Triton {triton.__version__} and {_nvcc_version()}"
    lines = [
        f"Computed, not measured: what {compilers} make for {NUM_MEMBERS} members, V = {WIDTH:,}, {NUM_ALPHAS} α.",
        "The floor is bytes ÷ 3.35 TB/s, the memory bandwidth that NVIDIA states for an H100 SXM5: no kernel can be",
        "faster there, and these were not timed there. Shared memory in bytes, the largest of the three architectures.",
        "",
        "| | kernel | dtype | block | registers sm_80 / 90 / 100 | shared memory | bytes per row | floor per row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str, str], list[Code]] = {}
    for code in codes:
        if code.dtype in DTYPES:
            groups.setdefault((code.implementation, code.kernel, code.dtype, code.config), []).append(code)
    for (implementation, kernel, dtype, config), group in groups.items():
        by_architecture = {code.architecture: code for code in group}
        registers = " / ".join(str(by_architecture[a].registers) for a in ARCHITECTURES)
        shared = max(code.shared_bytes for code in group)
        moved = bytes_per_row(kernel, dtype, int(config.split()[0]))
        floor = f"{1e6 * moved / H100_BANDWIDTH:.3f} µs"
        lines.append(
            f"| {implementation} | `{kernel}` | {dtype} | {config} | {registers} | {shared:,} | {moved:,} | {floor} |"
        )
    return "\n".join(lines)


def _nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {DOCUMENT.name}")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: expected a run without it, because it compiles nothing")
    with ProcessPoolExecutor() as pool:
        triton_codes = pool.map(compile_triton, triton_jobs(), chunksize=4)
        cuda_codes = pool.map(compile_cuda, ARCHITECTURES)
        codes = [*triton_codes, *(code for group in cuda_codes for code in group)]
    text = table(codes)
    print(text)
    if arguments.write:
        DOCUMENT.write_text(f"# Compiled kernels\n\n{text}\n", encoding="utf-8")
    faults = [fault for code in codes for fault in code.faults]
    print(f"\n{len(codes)} compiled kernels looked at, {len(faults)} faults", file=sys.stderr)
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
