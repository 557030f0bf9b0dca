"""`python -m gptforge` is `gptforge`."""

import sys

from gptforge.cli import main

if __name__ == "__main__":
    sys.exit(main())
