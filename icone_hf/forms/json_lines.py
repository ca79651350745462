"""JSON lines, or a JSON list: objects with a path and captions."""

import json
import re

from .form import Form, Listing, Options, Sample
from .parts import parts_of
from .reading import read_table, root_of

LAYOUT = "UTF-8 text, a JSON object on each line, and one line at least, or a list of such objects"
_LIST = re.compile(r"\s*\[\s*\{")


def _recognises(sample: Sample) -> bool:
    if sample.ending in (".jsonl", ".ndjson"):
        return True
    if _LIST.match(sample.text):
        return True
    return len(sample.lines) > 1 and all(_is_record(line) for line in sample.lines[:2])


def _is_record(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read(source: str, options: Options) -> Listing:
    table = read_table(source, "json", LAYOUT)
    return Listing(parts_of({"train": table}, source), root=root_of(source, options.image_root))


FORM = Form("JSON lines of paths and captions, or a list of them", _recognises, _read)
