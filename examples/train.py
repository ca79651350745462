"""Trains IConE on a source of captioned pictures: `icone train` as a file that `accelerate launch` and torchrun start.

accelerate launch examples/train.py examples/configs/quickstart.yaml [--any_argument value]
"""

import sys

from icone_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
