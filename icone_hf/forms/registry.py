"""All forms, in the order in which they are tried. To add one, write its module and put it in here."""

from . import (
    annotated_folders,
    coco,
    dialogues,
    flickr_tokens,
    folders,
    img2dataset,
    json_lines,
    karpathy,
    parquet,
    separated,
    text_files,
    webdataset,
)
from .form import Form, Sample

# The first that recognises a source reads it: narrow ones come first, and the last takes what no other does.
FORMS: tuple[Form, ...] = (
    dialogues.FORM,
    coco.FORM,
    json_lines.FORM,
    karpathy.FORM,
    flickr_tokens.FORM,
    separated.FORM,
    webdataset.FORM,
    img2dataset.FOLDERS,
    img2dataset.PARQUET,
    parquet.FORM,
    folders.SAVED,
    text_files.FORM,
    folders.FORM,
)
# Of what is left to `datasets`, a folder with one file of these forms is read as that file.
OF_FILES = (json_lines.FORM, karpathy.FORM, flickr_tokens.FORM, separated.FORM)


def form_of(source: str) -> Form:
    """Recognise a source's form.

    Raises:
        InputError: for a folder with several files of captions.
    """
    sample = Sample(source)
    form = next(form for form in FORMS if form.recognises(sample))
    if form is folders.FORM and sample.is_folder:
        return annotated_folders.find_within(sample, OF_FILES) or form
    return form
