"""`python scripts/sample.py runs/digits ...` does the same work as `diffcore sample runs/digits ...`."""

import sys

from diffcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
