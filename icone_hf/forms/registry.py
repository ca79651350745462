"""All forms, in the order in which they are tried. To add one, write its module and put it in here."""

from . import dialogues, folders, img2dataset, json_lines, karpathy, parquet, separated, webdataset
from .form import Form, Sample

# The first that recognises a source reads it: narrow ones come first, and the last takes what no other does.
FORMS: tuple[Form, ...] = (
    dialogues.FORM,
    karpathy.FORM,
    separated.FORM,
    json_lines.FORM,
    webdataset.FORM,
    img2dataset.FOLDERS,
    img2dataset.PARQUET,
    parquet.FORM,
    folders.SAVED,
    folders.FORM,
)


def form_of(source: str) -> Form:
    """Recognise a source's form."""
    sample = Sample(source)
    return next(form for form in FORMS if form.recognises(sample))
