"""What ptxas makes of a kernel for an H200, which needs no GPU.

binaries = compiled(CODE, tmp_path)     # CODE writes <name>.cubin and <name>.ptx into the folder sys.argv[1]
no_spills(binaries[0])
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(code: str, folder: Path) -> list[Path]:
    """The .cubin files of ``code``, run where Triton compiles instead of interpreting; skips without ptxas."""
    if not all((_TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip("this triton brings no ptxas or cuobjdump")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True, timeout=300)
    return sorted(folder.glob("*.cubin"))


def no_spills(binary: Path) -> str:
    """Asserts that nothing lies on the stack or in local memory; returns registers and instructions."""
    command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", "--dump-sass", str(binary)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in dump and "LOCAL:0" in dump, f"{binary.stem} spills: {dump[:2000]}"
    return dump
