"""Trains a network. The same as `cvt-keras train`, for a checkout: python train.py --help."""

import sys

from cvt_keras import cli

if __name__ == "__main__":
    sys.exit(cli.run("train", sys.argv[1:]))
