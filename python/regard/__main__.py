"""`python -m regard info | check | bench`."""

import sys

from regard._cli import main

if __name__ == "__main__":
    sys.exit(main())
