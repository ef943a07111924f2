"""``python -m mixpert_kernels.cli``."""

import sys

from mixpert_kernels.cli import main

sys.exit(main())
