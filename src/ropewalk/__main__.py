"""`python -m ropewalk`: the same as the command `ropewalk`."""

import sys

from ropewalk.cli import main

if __name__ == "__main__":
    sys.exit(main())
