"""`accelerate launch scripts/train.py digits ...` does the same work as `diffcore train digits ...`."""

import sys

from diffcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
