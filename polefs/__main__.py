"""``python -m polefs``: the command line."""

import sys

from polefs.cli import main

sys.exit(main())
