"""Measure a checkpoint: `icone evaluate` as a file for `accelerate launch` and torchrun.

python examples/evaluate.py CHECKPOINT SOURCE [--split test] [--folds 5] [--grid FILE.png]
"""

import sys

from icone_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
