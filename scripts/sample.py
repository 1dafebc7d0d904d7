"""`python scripts/sample.py RUN ...` does the same work as `diffcore sample RUN ...`."""

import sys

from diffcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
