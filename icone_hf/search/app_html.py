"""The parts of the page that Gradio has no component for, as HTML.

What comes from an index or a visitor is escaped here. It must never become part of a `gr.HTML` template, since Gradio
runs templates as JavaScript: all of this is a component's value.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from .app_terms import LESS, MORE, OWN, Mark

# Columns that are of no use to a visitor, or say where the files of the server lie.
HIDDEN = ("id", "digest", "file", "source", "image", "embedding", "rank", "score", "place")
_SHOWN_APART = (*HIDDEN, "path", "name", "folder", "captions", "copies", "width", "height", "size", "text", "year")


class Overlay(NamedTuple):
    """Hold where words are in an image.

    Args:
        words: of the query.
        url: of a half transparent image, as a data URL. `None`: no region answers to them.
    """

    words: str
    url: str | None


def trouble(message: str) -> str:
    """Show what went wrong."""
    return f'<p class="message trouble" role="alert">{escape(message)}</p>'


def note(message: str) -> str:
    """Show a remark."""
    return f'<p class="message" role="status">{escape(message)}</p>'


def found(rows: Sequence[Mapping[str, Any]], gone: Sequence[bool], summary: str) -> str:
    """Show what was found.

    Args:
        rows: of a search.
        gone: whether each row's file is gone.
        summary: one line above.
    """
    cells = []
    for row, is_gone in zip(rows, gone, strict=True):
        words = " / ".join(row["captions"] or ()) or row["name"]
        image = '<span class="gone">The file is gone.</span>'
        if not is_gone:
            image = f'<img src="image/{escape(row["id"])}" alt="{escape(words[:300])}" loading="lazy" decoding="async">'
        cells.append(
            f'<li><button type="button" data-id="{escape(row["id"])}" title="{escape(row["path"])}">{image}'
            f'<span class="label"><b>{row["score"]:.3f}</b> <span>{escape(row["name"])}</span></span></button></li>'
        )
    return f'<p class="message" role="status">{escape(summary)}</p><ol class="found">{"".join(cells)}</ol>'


def chips(marks: Sequence[Mark], names: Mapping[str, str], smalls: Mapping[str, str]) -> str:
    """Show the images that take part in the query.

    Args:
        marks: of the query.
        names: of images of the index, by id.
        smalls: of own images, by token: small copies, as data URLs.
    """
    if not marks:
        return ""
    texts = {MORE: "more like", LESS: "less like", OWN: "like your image"}
    cells = []
    for mark in marks:
        source = smalls[mark.one] if mark.kind == OWN else f"image/{mark.one}"
        text = f"{texts[mark.kind]} {names.get(mark.one, '')}".strip()
        cells.append(
            f'<li class="{mark.kind}"><img src="{escape(source)}" alt=""><span>{escape(text)}</span>'
            f'<button type="button" data-one="{mark.one}" aria-label="Remove: {escape(text)}">&times;</button></li>'
        )
    return f'<ul class="chips" aria-label="Images of the query">{"".join(cells)}</ul>'


def details(
    row: Mapping[str, Any],
    is_gone: bool,
    overlays: Sequence[Overlay],
    why_no_overlays: str,
    nearest: Sequence[tuple[str, float]],
) -> str:
    """Show one image, with all that is known.

    Args:
        row: of the image.
        is_gone: whether its file is gone.
        overlays: where words of the query are in it.
        why_no_overlays: where there are none.
        nearest: captions of the index, with their scores.
    """
    one = escape(row["id"])
    words = escape((" / ".join(row["captions"] or ()) or row["name"])[:300])
    image = f'<img src="image/{one}/large" alt="{words}">' if not is_gone else '<p class="gone">The file is gone.</p>'
    # A layer lies where the image does if the figure has its shape, whatever the size of its file.
    shape = f' style="--shape: {int(row["width"])} / {int(row["height"])}"' if row.get("width") else ""
    layers = "".join(
        f'<img class="layer" data-layer="{number}" src="{escape(overlay.url)}" alt="" hidden>'
        for number, overlay in enumerate(overlays)
        if overlay.url is not None
    )
    parts = [_buttons(one), _captions("Captions", row["captions"] or ())]
    parts.append(_captions("Nearest captions of the index", [f"{score:.3f}  {text}" for text, score in nearest]))
    parts.append(_facts(row))
    return (
        f'<header><h2>{escape(row["name"])}</h2><button type="button" class="close" aria-label="Close">&times;</button>'
        f'</header><div class="two"><div><figure{shape}>{image}{layers}</figure>'
        f"{_choice(overlays, why_no_overlays)}</div>"
        f"<div>{''.join(parts)}</div></div>"
    )


def _buttons(one: str) -> str:
    return (
        '<p class="marks">'
        f'<button type="button" data-mark="{MORE}" data-id="{one}">More like this</button>'
        f'<button type="button" data-mark="{LESS}" data-id="{one}">Less like this</button></p>'
    )


def _choice(overlays: Sequence[Overlay], why_none: str) -> str:
    """Let the visitor choose the words to look for."""
    if not overlays:
        return f'<p class="message">{escape(why_none)}</p>' if why_none else ""
    options = ['<label><input type="radio" name="layer" value="" checked> nothing</label>']
    for number, overlay in enumerate(overlays):
        state = "" if overlay.url is not None else ' disabled title="No region answers to it."'
        options.append(
            f'<label><input type="radio" name="layer" value="{number}"{state}> {escape(overlay.words)}</label>'
        )
    return f'<fieldset class="layers"><legend>Show where the image answers to</legend>{"".join(options)}</fieldset>'


def _captions(title: str, captions: Sequence[str]) -> str:
    if not captions:
        return ""
    cells = "".join(f"<li>{escape(caption)}</li>" for caption in captions)
    return f"<h3>{title}</h3><ul>{cells}</ul>"


def _facts(row: Mapping[str, Any]) -> str:
    """List what else a row says."""
    facts = {"path": row["path"], "also at": ", ".join(row.get("copies") or ())}
    if row.get("width"):
        facts["pixels"] = f"{row['width']} x {row['height']}"
    facts |= {name: str(value) for name, value in row.items() if name not in _SHOWN_APART and value is not None}
    cells = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value.strip()
    )
    return f"<h3>File</h3><dl>{cells}</dl>"
