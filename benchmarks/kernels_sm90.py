"""What the GPU engines' kernels become on an H100 or H200, found on any machine: compiled for sm_90, nothing is run.

    python benchmarks/kernels_sm90.py [--d-in 2304 3584] [--width 16384] [--json]

A step of each engine is taken on CPU tensors with every kernel's launch recorded in its place. Each kernel is then compiled as it
would be for these arguments, and NVIDIA's ptxas, which comes with Triton, says what it needs: registers of a thread, bytes that
do not fit them and go through memory (spills), shared memory of a program. Programs that an SM holds at once follow from these.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from everyscope.sae.bf16_gpu import GpuBfloat16
from everyscope.sae.config import SaeConfig
from everyscope.sae.pairs_gpu import GpuPairs
from everyscope.sae.presets import fast, gemma_scope
from everyscope.sae.trainable import TrainableSae

TARGET = GPUTarget("cuda", 90, 32)
REAL_SIZES = (512, 576, 640, 768, 1024, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 5376, 6144, 8192)
"""d_in of models that people train SAEs on."""
SM_REGISTERS, SM_THREADS, SM_SHARED, SM_PROGRAMS = 65536, 2048, 227 * 1024, 32
"""What one SM of compute capability 9.0 has (CUDA programming guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Launch:
    """A kernel as it would have been started."""

    kernel: Any
    arguments: tuple[Any, ...]
    warps: int
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on sm_90."""

    name: str
    d_in: int
    warps: int
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of each thread that are stored to memory for want of registers."""
    shared: int
    """Bytes of a program."""
    barriers: int
    """Places at which the warps of a program wait for one another."""
    programs: int
    """That one SM holds at once."""


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every kernel started within, which is not run."""
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, num_warps: int = 4, **_: Any) -> None:
        launches.append(Launch(self, arguments, num_warps, tuple(grid)))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def source_of(launch: Launch) -> ASTSource:
    """The kernel with what Triton knows when it compiles: types, constants, and which pointers and numbers divide by 16."""
    signature, constants, divisible = {}, {}, {}
    kernel = launch.kernel
    for number, (parameter, value) in enumerate(zip(kernel.params, launch.arguments, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(number,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool | int):
            if int(value) == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[(number,)] = "constexpr", 1
                continue
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, divisible)


TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"
}  # fmt: skip


def compiled(launch: Launch, d_in: int) -> Compiled:
    """Compile for sm_90 and ask ptxas."""
    assert make_backend(TARGET) is not None
    kernel = triton.compile(source_of(launch), target=TARGET, options={"num_warps": launch.warps})
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        command = [str(ptxas), "-v", "-arch=sm_90a", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", said)[-1])
    spilled = int(re.findall(r"(\d+) bytes spill stores", said)[-1])
    shared, threads = kernel.metadata.shared, 32 * launch.warps
    # Registers are handed out to a warp 256 at a time.
    by_registers = SM_REGISTERS // (launch.warps * -(-registers * 32 // 256) * 256)
    programs = min(by_registers, SM_THREADS // threads, SM_SHARED // max(1, shared + 1024), SM_PROGRAMS)
    barriers = kernel.asm["ptx"].count("bar.sync")
    return Compiled(launch.kernel.__name__, d_in, launch.warps, registers, spilled, shared, barriers, programs)


def sae_of(d_in: int, width: int, is_fast: bool) -> TrainableSae:
    """An SAE whose numbers nobody reads."""
    config = (
        SaeConfig(width=width, target_l0=4.0, preset=fast(d_in))
        if is_fast
        else SaeConfig(width=width, sparsity_coefficient=1e-3, preset=gemma_scope())
    )
    shapes = {"W_enc": (width, d_in), "W_dec": (width, d_in), "b_enc": (width,), "b_dec": (d_in,), "threshold": (width,)}
    tensors = [{name: torch.ones(shape) for name, shape in shapes.items()} for _ in range(2)]
    for named in tensors:
        named["W_enc"] = named["W_enc"].T
    if is_fast:
        tensors[1]["W_dec"] = torch.ones(width)
    touched, last_fired = (torch.zeros(width, dtype=torch.int32) for _ in range(2))
    return TrainableSae(config, tensors[0], tensors[1], torch.ones(d_in), touched, last_fired)


def launches_of(d_in: int, width: int, rows: int, is_fast: bool, precision: str) -> list[Launch]:
    """All kernels of one step by pairs and, in bfloat16, of a dense one; each once."""
    x, found = torch.zeros(rows, d_in), []
    with recorded() as launches:
        for way in (True, False) if precision == "bfloat16" else (True,):
            sae = sae_of(d_in, width, is_fast)
            if precision == "bfloat16":
                engine = GpuBfloat16([sae], max_pairs=256, crossover=1e9 if way else -1.0)
            else:
                engine = GpuPairs([sae], max_pairs=256)
            engine.tensors()["uses_pairs"].fill_(way)
            engine.step(x, 1, 10)
    for launch in launches:
        if launch.kernel.__name__ not in [other.kernel.__name__ for other in found]:
            found.append(launch)
    return found


def main() -> None:
    """Compile all, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, nargs="+", default=list(REAL_SIZES))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--recipes", nargs="+", default=["gemma_scope", "fast"])
    parser.add_argument("--only", nargs="*", help="kernels by name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = Table("recipe", *(name.replace("_", " ") for name in Compiled.__dataclass_fields__), title="sm_90")
    for precision in options.precisions:
        for recipe in options.recipes:
            for d_in in options.d_in:
                for launch in launches_of(d_in, options.width, options.rows, recipe == "fast", precision):
                    if options.only and launch.kernel.__name__ not in options.only:
                        continue
                    row = {"precision": precision, "recipe": recipe} | asdict(compiled(launch, d_in))
                    if options.json:
                        print(json.dumps(row), flush=True)
                    table.add_row(f"{precision} {recipe}", *(str(row[name]) for name in Compiled.__dataclass_fields__))
    if not options.json:
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
