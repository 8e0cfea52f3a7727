"""Compiles kernels for a CPU of another architecture, as Numba would there, and prints assembly.

    python cross.py aarch64-unknown-linux-gnu neoverse-n1

Numba's own pipeline with another machine at its end. Nothing of it can run here: what would go to
the execution engine stays text.
"""

import sys
from typing import Any

import llvmlite.binding as llvm
from numba import types
from numba.core.registry import cpu_target


def compile_for(triple: str, cpu: str) -> list[str]:
    """Let Numba compile for another CPU from now on; return a list of what it will make."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features="", opt=3)
    assembly: list[str] = []
    codegen: Any = cpu_target.target_context.codegen()
    llvm.get_process_triple = lambda: triple
    codegen.magic_tuple = lambda: (triple, cpu, "")
    codegen._tm = machine
    codegen._data_layout = str(machine.target_data)
    codegen._add_module = lambda module: assembly.append(machine.emit_assembly(module))
    codegen._scan_and_fix_unresolved_refs = lambda module: None
    codegen.set_env = lambda name, environment: None
    codegen._engine.finalize_object = lambda: None
    codegen._engine.get_function_address = lambda name: 1  # nobody goes there
    return assembly


def main(triple: str, cpu: str) -> None:
    """Print the assembly of what accumulates in float32: prefill, decode, and rows of float16."""
    assembly = compile_for(triple, cpu)

    # Not before: the tiles are chosen when they are imported.
    from fastattn.kernels import code_cache, decode, prefill, rows
    from fastattn.kernels.record import FLOAT32, HALF

    code_cache.directory = lambda: None
    prefill.prefill(types.float32, in_pairs=False)
    decode.decode(types.float32, FLOAT32)
    rows.rows_of(types.float32, HALF)
    print("\n".join(assembly))


if __name__ == "__main__":
    main(*sys.argv[1:])
