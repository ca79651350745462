"""The page that searches an index, in Gradio.

Gradio keeps nothing of a visitor: the query's images travel with each event, and results are HTML whose images come
from a route of our own (see `app_server.py`).
"""

import threading
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..compat import value_of_event
from ..errors import InputError, MissingPackageError
from . import app_html as html
from .app_html import Overlay
from .app_maps import overlays_of
from .app_terms import OWN, ROW, TOKEN, Mark, checked, read_marks, terms_of, with_mark, write_marks
from .app_uploads import Upload, Uploads, small_copy
from .gallery import Gallery
from .queries import LONGEST

logger = logging.get_logger(__name__)

MOST_RESULTS = 200
LONGEST_CONDITION = 2_000  # characters
NEAREST = 5  # captions
MAP_SIDE = 640  # pixels of an image that maps are made for
AT_A_TIME = 8  # searches
FILTERS_AT_A_TIME = 2  # searches with a condition, which may take long
SECONDS_TO_WAIT = 10.0  # for one of them to end
WAITING = 256  # events
_FAULT = "Something went wrong on the server, and its log says what. Try another query."
_FOLDER = Path(__file__).parent


class Page:
    """Answer the events of the page.

    Args:
        gallery: to search.
    """

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.uploads = Uploads()
        self._model = threading.Lock()  # one at a time: each uses all cores
        self._filters = threading.BoundedSemaphore(FILTERS_AT_A_TIME)

    def summary(self) -> str:
        """Say what there is to search."""
        count = len(self.gallery)
        if not count:
            return "This index is empty: call icone index for it, and load the page again."
        return f"{count:,} images. Write what you want to see, and press Enter."

    def columns(self) -> list[str]:
        """List the columns that a condition may use."""
        columns = self.gallery.store("images").columns()
        return [name for name in columns if name not in (*html.HIDDEN, "captions", "copies")]

    def add_upload(self, image: Image.Image) -> dict[str, str]:
        """Keep a visitor's image; return its token."""
        with self._model:
            embedding = self.gallery.embed(image)
        return {"token": self.uploads.add(Upload(embedding, small_copy(image)))}

    def search(self, sentence: Any, where: Any, count: Any, cut: Any, marks: list[Mark]) -> str:
        """Find images; return them as HTML."""
        terms = terms_of(sentence, marks)
        k = int(np.clip(count, 1, MOST_RESULTS)) if isinstance(count, int | float) and np.isfinite(count) else 20
        condition = where.strip() if isinstance(where, str) else ""
        if len(condition) > LONGEST_CONDITION:
            raise InputError(f"The condition has {len(condition):,} characters, and the limit is {LONGEST_CONDITION}.")
        began = time.perf_counter()
        with self._model:
            embedding = self.gallery.embed(terms, self._embedding_of)
        if condition and not self._filters.acquire(timeout=SECONDS_TO_WAIT):
            raise InputError("Many conditions are being looked up now: try again in a minute.")
        try:
            found = self.gallery.search(embedding, k, where=condition or None, cut="auto" if cut else None)
        finally:
            if condition:
                self._filters.release()
        rows = found.remove_columns("image").to_list()
        if not rows:
            return html.note(self._why_nothing(condition, bool(cut)))
        seconds = time.perf_counter() - began
        summary = f"{len(rows):,} of {len(self.gallery):,} images, best first, in {seconds:.2f} s."
        return html.found(rows, [self.gallery.file(row) is None for row in rows], summary)

    def _why_nothing(self, condition: str, cut: bool) -> str:
        if condition and not self.gallery.store("images").count(condition):
            return "Nothing found: no image meets the condition."
        if cut:
            return "Nothing found: no image stands out from the others. Switch the cut off to see the nearest anyway."
        return "Nothing found."

    def _embedding_of(self, one: str) -> np.ndarray:
        return self.uploads.get(one).embedding if TOKEN.fullmatch(one) else self.gallery.embedding_of(one)

    def chips(self, marks: list[Mark]) -> str:
        """Show the query's images as HTML."""
        names = {mark.one: self.gallery.row(mark.one)["name"] for mark in marks if mark.kind != OWN}
        return html.chips(
            marks, names, {mark.one: self.uploads.get(mark.one).small for mark in marks if mark.kind == OWN}
        )

    def details(self, one: Any, sentence: Any) -> str:
        """Show one image as HTML."""
        if not isinstance(one, str) or not ROW.fullmatch(one):
            raise InputError("There is no such image.")
        row = self.gallery.row(one)
        is_gone = self.gallery.file(row) is None
        overlays, why = ([], "") if is_gone else self._overlays(row, sentence)
        return html.details(row, is_gone, overlays, why, self._nearest(one))

    def _overlays(self, row: dict[str, Any], sentence: Any) -> tuple[list[Overlay], str]:
        wanted = [term.text for term in terms_of(sentence, [Mark(OWN, "")]) if term.text and term.weight > 0]
        if not wanted:
            return [], "With a sentence in the query, you could see here where the image answers to its words."
        try:
            image = self.gallery.open_image(row, MAP_SIDE)
        except InputError:  # whose message says where it lies
            return [], "The file can't be read any more."
        image.thumbnail((MAP_SIDE, MAP_SIDE))
        try:
            with self._model:
                return overlays_of(*self.gallery.model, image, wanted[0]), ""
        except ValueError:  # of heat_maps, whose message is for those who call it
            return [], "This model's vision tower can't say which regions of an image answer to which words."

    def _nearest(self, one: str) -> list[tuple[str, float]]:
        if not self.gallery.store("captions").count():
            return []
        found = self.gallery.search(self.gallery.embedding_of(one), NEAREST, kind="captions")
        return list(zip(found["text"][:], found["score"][:], strict=True))

    def told(self, error: Exception) -> str:
        """Say to a stranger what went wrong."""
        if isinstance(error, InputError):
            return str(error).replace(str(self.gallery.folder.path), "The index")
        logger.error("The page could not answer.", exc_info=error)
        return _FAULT


def build_app(gallery: Gallery, page: Page | None = None) -> Any:
    """Build the page.

    Its images come from `make_server` of `app_server.py`, which `icone app` starts.

    Args:
        gallery: to search.
        page: that answers. Default: a new one.

    Returns:
        `gradio.Blocks`.

    Raises:
        MissingPackageError: if Gradio isn't installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingPackageError("The page needs Gradio: pip install 'icone_hf[app]'.") from error

    page = page or Page(gallery)
    script = (_FOLDER / "app.js").read_text(encoding="utf-8")

    def view(name: str, value: str = "", template: str = "${value}") -> Any:
        call = f"{script}\n{name}(element, trigger, props, watch);"
        return gr.HTML(value, html_template=template, js_on_load=call, elem_id=name, apply_default_css=False)

    def answer(sentence: Any, where: Any, count: Any, cut: Any, kept: Any, change: Callable[..., list[Mark]]) -> Any:
        """Change the query's images, then search."""
        try:
            marks = checked(change(read_marks(kept)))
            shown = page.chips(marks)
        except Exception as error:  # the query starts again
            return html.trouble(page.told(error)), "[]", ""
        if not marks and not (isinstance(sentence, str) and sentence.strip()):
            return html.note(page.summary()), "[]", ""
        try:
            return page.search(sentence, where, count, cut, marks), write_marks(marks), shown
        except Exception as error:
            return html.trouble(page.told(error)), write_marks(marks), shown

    def search(sentence: Any, where: Any, count: Any, cut: Any, kept: Any) -> Any:
        return answer(sentence, where, count, cut, kept, lambda marks: marks)

    def search_with(sentence: Any, where: Any, count: Any, cut: Any, kept: Any, event: gr.EventData) -> Any:
        mark = Mark(str(value_of_event(event, "kind")), str(value_of_event(event, "id")))
        return answer(sentence, where, count, cut, kept, lambda marks: with_mark(marks, mark))

    def search_without(sentence: Any, where: Any, count: Any, cut: Any, kept: Any, event: gr.EventData) -> Any:
        one = value_of_event(event, "id")
        return answer(sentence, where, count, cut, kept, lambda marks: [mark for mark in marks if mark.one != one])

    def show(sentence: Any, event: gr.EventData) -> str:
        try:
            shown = page.details(value_of_event(event, "id"), sentence)
        except Exception as error:
            shown = f"{html.trouble(page.told(error))}<button type='button' class='close'>Close</button>"
        # The browser hears of a value that has changed, so none is like the last.
        return f"<!-- {time.monotonic_ns()} -->{shown}"

    names = ", ".join(f"`{escape(name)}`" for name in page.columns())  # Gradio takes it for Markdown
    with gr.Blocks(title="Image search", analytics_enabled=False) as blocks:
        gr.HTML("<h1>Image search</h1>", elem_id="top", js_on_load=None)
        sentence = gr.Textbox(
            label="What you want to see",
            placeholder='a dog left of a bicycle, or a sum: "red car" - "snow"',
            max_lines=1,
            max_length=LONGEST,
            autofocus=True,
            submit_btn="Search",
            elem_id="sentence",
        )
        picker = view("picker", _PICKER)
        with gr.Accordion("Filter and number of results", open=False, elem_id="options"):
            where = gr.Textbox(
                label="Condition",
                placeholder="year >= 2020 and folder = 'holiday'",
                info=f"SQL on these columns: {names}." if names else "",
                max_lines=1,
                max_length=LONGEST_CONDITION,
                elem_id="where",
            )
            count = gr.Slider(1, MOST_RESULTS, 20, step=1, label="Results at most", elem_id="count")
            cut = gr.Checkbox(label="Leave out what stands out no more than random images do", elem_id="cut")
        kept = gr.Textbox("[]", visible="hidden", elem_id="marks")
        chips = view("chips")
        results = view("results", html.note(page.summary()))
        details = view("details", template="")

        query, outputs = [sentence, where, count, cut, kept], [results, kept, chips]
        common: dict[str, Any] = {"inputs": query, "outputs": outputs, "api_visibility": "private"}
        common |= {"concurrency_limit": AT_A_TIME, "concurrency_id": "search", "show_progress": "minimal"}
        common["trigger_mode"] = "always_last"  # a second Enter counts, while the first is being answered
        common["show_progress_on"] = results
        gr.on([sentence.submit, where.submit, count.release, cut.input], search, **common)
        gr.on([picker.upload, details.like], search_with, **common)
        chips.delete(search_without, **common)
        results.select(show, **{**common, "inputs": [sentence], "outputs": [details], "show_progress": "hidden"})
    blocks.queue(max_size=WAITING, default_concurrency_limit=AT_A_TIME, api_open=False)
    return blocks


_PICKER = (
    '<label class="pick"><input type="file" accept="image/*"><span>Or choose an image to search by</span></label>'
    '<span class="said" role="status"></span>'
)
