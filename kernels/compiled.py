"""What Triton and NVIDIA's assembler make of a kernel, on a machine that needs no GPU: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class Report(NamedTuple):
    """``registers`` of a thread, of which there are 255; bytes that a thread ``spills`` to memory, stores and loads together;
    bytes of ``shared`` memory of a program: A100 has 166,912, H100 232,448."""

    registers: int
    spills: int
    shared: int


def report(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 1,
) -> Report:
    """Compile a kernel as it is compiled when it is called; array pointers are taken to be aligned to 16 bytes, as JAX's are.

    Args:
        kernel: a ``triton.jit`` function.
        signature: type by parameter in Triton's words ("*bf16", "i32"), constants left out.
        constants: value by ``tl.constexpr`` parameter.
        capability: 80 for A100, 90 for H100.
        num_warps, num_stages: Triton's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, types, dict(constants), pointers)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    said = _assembled(program.asm["ptx"], capability)
    registers, spills = _REGISTERS.search(said), _SPILLS.search(said)
    assert registers is not None and spills is not None, said
    return Report(int(registers[1]), int(spills[1]) + int(spills[2]), program.metadata.shared)


def _assembled(ptx: str, capability: int) -> str:
    """What the assembler that comes with Triton tells about a program."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
