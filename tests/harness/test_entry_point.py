"""What is imported when lmms-eval is not asked for."""

import subprocess
import sys


def test_the_package_is_imported_without_lmms_eval():
    code = (
        "import sys; import earlytom_compile.integrations.lmms_eval as ours; assert callable(ours.manifests); "
        "sys.exit('lmms_eval' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
