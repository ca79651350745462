"""All forms, in the order in which they are tried. To add one, write its module and put it in here."""

from . import folders, json_lines, karpathy, parquet, separated
from .form import Form, Sample

# The first that recognises a source reads it: narrow ones come first, and the last takes what no other does.
FORMS: tuple[Form, ...] = (
    karpathy.FORM,
    separated.FORM,
    json_lines.FORM,
    parquet.FORM,
    folders.SAVED,
    folders.FORM,
)


def form_of(source: str) -> Form:
    """Recognise a source's form."""
    sample = Sample(source)
    return next(form for form in FORMS if form.recognises(sample))
