"""``python -m earlytom_compile``: the ``earlytom`` command where no script of that name was installed."""

import sys

from .cli.main import main

sys.exit(main())
