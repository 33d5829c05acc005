"""`sdeefs`, as a console script and as `python -m sdeefs`."""

import sys

from sdeefs.cli import main

if __name__ == "__main__":
    sys.exit(main())
