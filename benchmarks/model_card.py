"""Write MODEL_CARD.md and its figures from the quickstart's run.

python -m benchmarks.model_card [outputs/quickstart]
"""

import shutil
import sys
from pathlib import Path

from icone_hf.publishing.hub import EPOCHS_PICTURE, EXAMPLES_PICTURE, write_card

ROOT = Path(__file__).parent.parent
REPOSITORY = "icone_hf/scenes"
IN_DOCS = {EPOCHS_PICTURE: "validation_rsum.png", EXAMPLES_PICTURE: "quickstart.png"}


def main() -> None:
    """Copy the card and figures that a push of the run would upload."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quickstart")
    write_card(run, REPOSITORY)
    card = (run / "README.md").read_text()
    for name, in_docs in IN_DOCS.items():
        shutil.copy(run / name, ROOT / "docs" / in_docs)
        card = card.replace(f"]({name})", f"](docs/{in_docs})")
    (ROOT / "MODEL_CARD.md").write_text(card)


if __name__ == "__main__":
    main()
