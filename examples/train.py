"""Train IConE on captioned images: `icone train` as a file for `accelerate launch` and torchrun.

accelerate launch examples/train.py examples/configs/quickstart.yaml [--any_argument value]
"""

import sys

from icone_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
