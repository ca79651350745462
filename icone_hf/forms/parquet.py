"""A Parquet file of paths, or of images, and captions."""

from .form import Form, Listing, Options, Sample
from .parts import parts_of
from .reading import read_table, root_of

MAGIC = b"PAR1"  # how every Parquet file begins
LAYOUT = "a whole Parquet file"


def _recognises(sample: Sample) -> bool:
    return sample.content.startswith(MAGIC) or sample.ending == ".parquet"


def _read(source: str, options: Options) -> Listing:
    table = read_table(source, "parquet", LAYOUT)
    return Listing(parts_of({"train": table}, source), root=root_of(source, options.image_root))


FORM = Form("a Parquet file of paths or images, and captions", _recognises, _read)
