"""`python -m gptforge`: the command line."""

import sys

try:
    from gptforge.cli import main
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
