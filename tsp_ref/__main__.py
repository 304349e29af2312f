"""`python -m tsp_ref`."""

import sys

if __name__ == "__main__":
    try:
        from .cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        # While modules load, Ctrl-C arrives here.
        sys.exit(130)
