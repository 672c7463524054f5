"""``python -m sewd_np``: the same as the command ``sewd-np``."""

import sys

from sewd_np.cli import main

if __name__ == "__main__":
    sys.exit(main())
