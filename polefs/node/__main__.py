"""``python -m polefs.node VOLUME MOUNTPOINT``: the background daemon, started by ``polefs.node.background``."""

import sys

from polefs.node.background import child

sys.exit(child())
