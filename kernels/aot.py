"""Ahead-of-time compilation: what a launch becomes on an architecture, told without a GPU."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedmoe.kernels.launch import Launch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may use, by architecture."""

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
_ASYNC_COPY = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)"


class Compiled(NamedTuple):
    """What a kernel takes of a multiprocessor, and its code."""

    registers: int  # of a thread
    stack: int  # bytes of a thread, which is where spills go
    shared: int  # bytes of a block
    ttir: str
    ptx: str

    @property
    def copies(self) -> list[int]:
        """Bytes of each asynchronous copy from device to shared memory."""
        return [int(wide, 0) for wide in re.findall(_ASYNC_COPY, self.ptx)]

    @property
    def products(self) -> dict[str, int]:
        """How many of each tensor-core instruction there are."""
        kinds = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
        return {name: count for name, text in kinds.items() if (count := self.ptx.count(text))}


def compiled(call: Launch, arch: int) -> Compiled:
    """Compile what `call` would run for compute capability `arch` (80, 90, ...).

    All pointers are taken to be divisible by 16, as those of whole torch tensors are.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(call.kernel.arg_names):
        tensor = call.tensors.get(name)
        if tensor is not None:
            signature[name] = "*" + _TYPES[tensor.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in call.sizes:
            signature[name] = "i32" if call.sizes[name] < 2**31 else "i64"
        else:
            signature[name] = "constexpr"
            constants[name] = call.constants.get(name)
    binary = triton.compile(
        ASTSource(call.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=call.options,
    )
    return Compiled(*_resources(binary.asm["cubin"]), binary.metadata.shared, binary.asm["ttir"], binary.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    return int(found[1]), int(found[2])
