"""Answer sentences with images of an index, drawn on one sheet.

icone index CHECKPOINT SOURCE INDEX
python examples/search.py INDEX "a red car" "a dog left of a bicycle" --grid found.png
"""

import argparse

from icone_hf import Gallery
from icone_hf.cli.search import results
from icone_hf.search.grids import draw_grid

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="Folder of an index, from icone index.")
    parser.add_argument("sentences", nargs="+")
    parser.add_argument("--k", type=int, default=5, help="Images a sentence.")
    parser.add_argument("--grid", required=True, help="Image file for the sheet.")
    options = parser.parse_args()
    gallery = Gallery.open(options.index)
    found = {sentence: gallery.search(sentence, options.k) for sentence in options.sentences}
    for sentence, rows in found.items():
        print(f"{sentence}: {', '.join(rows['path'])}")
    draw_grid([(sentence, results(gallery, rows)) for sentence, rows in found.items()]).save(options.grid)
    print(options.grid)
