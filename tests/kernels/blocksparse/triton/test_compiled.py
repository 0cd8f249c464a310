"""The index kernels compile to machine code, which needs no GPU; the interpreter accepts more than the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

# A process of its own: where TRITON_INTERPRET is set the kernels are not for the compiler.
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsort.kernels.blocksparse.triton import align
from sparsort.kernels.blocksparse.triton import select

POINTERS = {"order_ptr": "*i64", "bounds_ptr": "*i64", "chooser_ptr": "*i64", "slot_ptr": "*i64", "table_ptr": "*i32",
            "position_ptr": "*i32", "blocks_ptr": "*i32"}
VECTORS = ("query_ptr", "key_ptr", "index_query_ptr", "index_key_ptr")
SCALARS = ("scale", "scale2", "index_scale", "index_scale2")
name, dtype, capability, constants = json.loads(sys.argv[1])
kernel = getattr(select if name == "select_kernel" else align, name)

def kind(argument):
    if argument in constants:
        return "constexpr"
    if argument in VECTORS:
        return "*" + dtype
    if argument in SCALARS:
        return "fp32"
    return POINTERS.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")

signature = {argument: kind(argument) for argument in kernel.arg_names}
aligned = {(n,): [["tt.divisibility", 16]] for n, argument in enumerate(kernel.arg_names)
           if argument.endswith("_ptr") or argument.startswith(("query_", "key_", "index_"))}
source = ASTSource(kernel, signature, constants, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
print(json.dumps([len(compiled.asm["cubin"]), compiled.metadata.shared]))
"""
SELECT = {"query_i": 1, "key_i": 1, "G": 2, "W": 64, "W_TILE": 64, "BLOCKS": 1, "ROWS": 128, "K": 5, "K_PAD": 8}
ALIGN = {"query_d": 1, "key_d": 1, "HEADS": 3, "WIDTH": 40, "PADDED": 64, "BLOCK_SIZE": 50, "ROWS": 32, "KEYS": 64}
INDEX = {"index_query_i": 1, "index_key_i": 1, "lse_t": 1, "INDEX_WIDTH": 32, "INDEX_PADDED": 32}
PRECISION = {"PRECISION": "tf32x3"}


@pytest.mark.parametrize(
    ("kernel", "dtype", "capability", "constants"),
    [
        ("select_kernel", "bf16", 90, SELECT | {"WIDTH": 64, "WIDTH_TILE": 64, "SCORED": False}),
        ("select_kernel", "fp32", 80, SELECT | {"WIDTH": 40, "WIDTH_TILE": 32, "ROWS": 32, "SCORED": True}),
        ("lse_kernel", "fp16", 80, ALIGN | PRECISION),
        ("align_kernel", "bf16", 90, ALIGN | INDEX | PRECISION | {"GRADIENTS": True}),
        ("align_kernel", "fp32", 80, ALIGN | INDEX | PRECISION | {"GRADIENTS": True, "KEYS": 32}),
    ],
)
def test_kernels_compile(kernel, dtype, capability, constants, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    asked = json.dumps([kernel, dtype, capability, constants])
    command = [sys.executable, "-P", "-c", SCRIPT, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    size, shared = json.loads(done.stdout)
    assert size > 0
    # What a program may have on the smallest GPU that is thought of.
    assert shared <= 99 * 1024
