"""Make torchvision importable in an environment whose torch it was not built for: python torchvision_operators.py

Its transforms are Python and need none of its operators, but ``import torchvision`` describes some and fails where they
are not there. Their names are declared before it is imported, by a .pth file, so that vLLM's processes see them, too.
For environments of tests only.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from pathlib import Path

_NAME = re.compile(r'"torchvision::(\w+)"|register_meta\("(\w+)"')


class _Declares(MetaPathFinder):
    """Declares the operators that torchvision is about to describe, once, and finds nothing."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare(Path(importlib.util.find_spec(name).origin).with_name("_meta_registrations.py").read_text())
        return None


def _declare(text):
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in {first or second for first, second in _NAME.findall(text)}:
        library.define(f"{name}(Tensor x) -> Tensor")
    sys.modules[__name__]._library = library  # which would forget them


def _install():
    works = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(works, capture_output=True).returncode == 0:
        return
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, packages / "torchvision_operators.py")
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    subprocess.run(works, check=True)


if __name__ == "__main__":
    _install()
else:
    sys.meta_path.insert(0, _Declares())
