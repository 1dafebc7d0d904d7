"""The command `diffcore train`, for accelerate: `accelerate launch scripts/train.py digits`."""

import sys

from diffcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
