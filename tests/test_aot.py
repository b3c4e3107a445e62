"""Every shipped configuration of the Triton kernels, compiled ahead of time for sm_80 and sm_90, without a GPU."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fedmoe.kernels import gated_head_launch as launch  # noqa: E402
from fedmoe.kernels import gated_mix  # noqa: E402
from fedmoe.kernels.gated_head_kernels import SHIPPED  # noqa: E402
from fedmoe.kernels.gated_head_launch import Launch, Options, Scratch  # noqa: E402

pytestmark = pytest.mark.skipif(launch._INTERPRETED, reason="interpreted kernels cannot be compiled")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use
WIDE_OFFSETS = re.compile(r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi64>")
ASYNC_COPY = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


class Compiled(NamedTuple):
    """What a kernel takes, and its code."""

    registers: int
    stack: int
    shared: int
    ttir: str
    ptx: str


def compiled(call: Launch, arch: int) -> Compiled:
    """Compile what `call` would run, with all pointers divisible by 16, as those of whole torch tensors are."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(call.kernel.arg_names):
        tensor = call.tensors.get(name)
        if tensor is not None:
            signature[name] = "*" + TYPES[tensor.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name == "B":
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = call.constants.get(name)
    binary = triton.compile(
        ASTSource(call.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": call.warps, "num_stages": call.stages},
    )
    return Compiled(*resources(binary.asm["cubin"]), binary.metadata.shared, binary.asm["ttir"], binary.asm["ptx"])


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which is where spills go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    return int(found[1]), int(found[2])


def calls(dtype: torch.dtype, rows: int, width: int, classes: int, full: bool, scales: int) -> dict[str, Launch]:
    """The launches of one step and of a forward pass alone, on tensors without memory."""
    with torch.device("meta"):
        fp32 = torch.empty(())
        inputs: launch.Inputs = (
            torch.empty(rows, width, dtype=dtype),
            torch.empty(rows, width, dtype=dtype),
            torch.empty(rows, 2, dtype=dtype),
            torch.empty(classes, width, dtype=dtype),
            torch.empty(classes, dtype=dtype) if full else None,
            torch.empty(rows, dtype=torch.int64),
            torch.empty(classes) if full else None,
        )
        options = Options(-100, 0.1, 1e-4, 30.0) if full else Options()
        add = ("loss", "correct", "d_global", "d_local", "d_gate", "d_weight", "d_bias") if full else ()
        scratch = Scratch.empty(rows, classes, "meta")
        scale: Tensor = torch.empty(rows) if scales else fp32
        header = (torch.empty(classes, width), torch.empty(classes) if full else None)
        correct = torch.empty((), dtype=torch.int64)
        return {
            "rows": launch.rows_launch(inputs, options, scratch, scale, fp32, inputs[:3], add),
            "header": launch.header_launch(inputs, scratch, scale, fp32, fp32, correct, header, add),
            "forward": launch.rows_launch(inputs, options, scratch),
        }


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "width", "classes", "full"), SHIPPED, ids=lambda value: str(value).removeprefix("torch.")
)
def test_shipped(dtype: str, width: int, classes: int, full: bool, arch: int) -> None:
    size = 4 if dtype == "float32" else 2
    made = calls(getattr(torch, dtype), 64, width, classes, full, scales=0)
    for name in ("rows", "header"):
        call = made[name]
        got = compiled(call, arch)
        copies = [int(wide, 0) for wide in re.findall(ASYNC_COPY, got.ptx)]
        products = {p: got.ptx.count(p) for p in ("mma.sync", "wgmma.mma_async")}
        print(  # pytest -s shows the table
            f"{name:8} sm_{arch} {dtype:9} D={width} C={classes:4} {'all options' if full else 'plain':11} "
            f"registers {got.registers:3} shared {got.shared:6} stack {got.stack} {products} "
            f"copies {len(copies)} of {sorted(set(copies))} bytes"
        )
        assert got.stack == 0
        assert got.shared <= SHARED_LIMIT[arch]
        assert "tf32" not in got.ptx
        assert any(products.values()) == (size == 2)  # fp32 is multiplied without tensor cores
        if width > call.constants["BLOCK_D"] or name == "header":  # otherwise nothing is left to overlap with
            assert max(copies) >= min(16, size * (width & -width))  # as wide as D's divisibility allows
        assert WIDE_OFFSETS.search(got.ttir)  # row offsets in 64 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_launches(dtype: torch.dtype) -> None:
    made = calls(dtype, 64, 500, 100, full=True, scales=1)
    for call in (*made.values(), totals(), *mixes(dtype)):
        got = compiled(call, 90)
        assert got.stack == 0 and got.shared <= SHARED_LIMIT[80] and "tf32" not in got.ptx


def totals() -> Launch:
    with torch.device("meta"):
        scratch, count = Scratch.empty(64, 0, "meta"), torch.empty((), dtype=torch.int64)
        return launch.totals_launch(scratch, torch.empty(()), count, torch.empty(()), mean=True)


def mixes(dtype: torch.dtype) -> tuple[Launch, Launch]:
    with torch.device("meta"):
        r, gate = torch.empty(64, 500, dtype=dtype), torch.empty(64, 2, dtype=dtype)
        return gated_mix.forward_launch(r, r, gate, r), gated_mix.backward_launch(r, r, r, gate, (r, r, gate))
