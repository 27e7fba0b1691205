"""`python -m shaper` is the `shaper` command."""

import sys

from shaper.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
