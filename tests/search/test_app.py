"""The page of `icone app`, over HTTP: what it finds, what it shows, and what strangers can't do."""

import contextlib
import gc
import html
import io
import json
import os
import re
import runpy
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import numpy as np
import pytest
from PIL import Image
from search.app_visitor import DEFAULTS, Visitor, running
from search.fixtures import write_images
from tiny import draw, make_groups

from icone_hf import IConEModel, IConEProcessor
from icone_hf.cli import main
from icone_hf.data.pictures import find_pictures
from icone_hf.search import Gallery, index
from icone_hf.search.queries import Term

pytest.importorskip("gradio")

QUERY = "a red square on a blue ground"
EVIL = "<img src=x onerror=alert(1)>\"' ${alert(2)} `{{this}}`"


@pytest.fixture(scope="module")
def made(towers, tmp_path_factory):
    """A checkpoint, an index of groups and one of files, whose first has EXIF with a place."""
    folder = tmp_path_factory.mktemp("app")
    model, processor = IConEModel.from_encoders(*towers, projection_dim=16), IConEProcessor.from_encoders(*towers)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    groups = make_groups(20)
    rows = [dict(groups[row], number=row) for row in range(20)]
    rows[3] |= {"captions": [EVIL], "image_id": f"a/{EVIL}.png"}
    features = datasets.Features({**groups.features, "number": datasets.Value("int64")})
    files, others = write_images(folder / "files", 1), write_images(folder / "others", 3)
    index(model, processor, datasets.Dataset.from_list(rows, features=features), folder / "index", source_name="groups")
    index(model, processor, find_pictures(files).rows(), folder / "index", source_name=files)
    index(model, processor, find_pictures(others).rows().select([1, 2]), folder / "other", source_name=others)
    gallery, other = (Gallery.open(folder / name, folder / "model") for name in ("index", "other"))
    return SimpleNamespace(folder=folder, model=folder / "model", files=files, gallery=gallery, other=other)


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    with running(made.folder / "index", made.model, tmp_path_factory.mktemp("server") / "tmp") as server:
        yield server


@pytest.fixture
def visitor(server):
    one = Visitor(server.url)
    yield one
    one.close()


def png(width, height, data=b""):
    """A PNG file whose header says this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def stored(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# --- what it finds and shows ---


def test_it_finds_what_the_gallery_finds(visitor, made):
    visitor.search(QUERY)
    expected = made.gallery.search(QUERY, 20)
    assert visitor.ids() == expected["id"][:]
    np.testing.assert_allclose(visitor.scores(), expected["score"][:], atol=6e-4)
    assert visitor.search(QUERY, count=3) == expected["id"][:3]
    some = made.gallery.search(QUERY, 20, where="number >= 15")
    assert visitor.search(QUERY, count=20, where="number >= 15") == some["id"][:]
    assert len(some) == 5
    assert visitor.search(QUERY, where="", cut=True) == made.gallery.search(QUERY, 20, cut="auto")["id"][:]
    visitor.search('"red square" - 0.5:"blue ground"', cut=False)
    terms = [Term(text="red square"), Term(text="blue ground", weight=-0.5)]
    assert visitor.ids() == made.gallery.search(terms, 20)["id"][:]


def test_more_and_less_of_results_move_the_query(visitor, made):
    first, *_, last = visitor.search(QUERY)
    found = visitor.mark("more", last)
    text, likes = made.gallery.embed(QUERY), {one: made.gallery.embedding_of(one) for one in (first, last)}
    assert found == made.gallery.search(text + 0.75 * likes[last], 20)["id"][:]
    assert found.index(last) < 19
    found = visitor.mark("less", first)
    assert found == made.gallery.search(text + 0.75 * likes[last] - 0.25 * likes[first], 20)["id"][:]
    assert visitor.parts["chips"].count("<li") == 2
    visitor.mark("less", last)  # it changes its mind
    assert json.loads(visitor.parts["marks"]) == [["less", first], ["less", last]]
    moved = text - 0.125 * likes[first] - 0.125 * likes[last]
    assert visitor.ids() == made.gallery.search(moved, 20)["id"][:]
    for one in (first, last):
        assert visitor.do("chips", "delete", {"id": one})
    assert visitor.parts["chips"] == ""
    assert visitor.ids() == made.gallery.search(QUERY, 20)["id"][:]


def test_an_image_of_ones_own_is_a_query(visitor, made):
    own = draw("red", "blue", 200)
    answer = visitor.upload(stored(own, "PNG"))
    assert answer.status_code == 200
    assert visitor.do("picker", "upload", {"kind": "own", "id": answer.json()["token"]})
    expected = made.gallery.search(own, 20)
    assert visitor.ids() == expected["id"][:]
    np.testing.assert_allclose(visitor.scores(), expected["score"][:], atol=6e-4)
    assert "data:image/jpeg;base64," in visitor.parts["chips"]
    visitor.do("picker", "upload", {"kind": "own", "id": "0" * 32})
    assert "no longer here" in visitor.message()


def test_one_image_is_shown_with_its_words(visitor, made):
    one = visitor.search(QUERY)[0]
    shown = visitor.show(one)
    row = made.gallery.row(one)
    assert f'src="image/{one}/large"' in shown
    assert row["path"] in shown
    assert all(caption in shown for caption in row["captions"])
    nearest = made.gallery.search(made.gallery.embedding_of(one), 5, kind="captions")["text"][:]
    assert nearest == [html.unescape(text) for text in re.findall(r"<li>-?[\d.]+  (.*?)</li>", shown)]
    labels = re.findall(r'type="radio" name="layer" value="\d"[^>]*> (.*?)</label>', shown)
    assert labels == ["the whole sentence", "red", "square", "blue", "ground"]
    layers = re.findall(r'data-layer="\d" src="data:image/png;base64,', shown)
    assert layers
    visitor.search("", marks=json.dumps([["more", one]]))
    assert "With a sentence in the query" in visitor.show(one)


def test_a_tower_without_maps_says_so(made, monkeypatch):
    from icone_hf.search import app_maps
    from icone_hf.search.app import Page

    def none(*_):
        raise ValueError("The vision tower states no patch_size.")

    monkeypatch.setattr(app_maps, "heat_maps", none)
    one = made.gallery.search(QUERY, 1)["id"][0]
    assert "vision tower can&#x27;t say which regions" in Page(made.gallery).details(one, QUERY)


def test_states_in_plain_words(visitor):
    visitor.search(" ")
    assert visitor.message() == "21 images. Write what you want to see, and press Enter."
    visitor.search(QUERY, where="number > 99")
    assert visitor.message() == "Nothing found: no image meets the condition."
    visitor.search(QUERY, where="nummer > 99")
    assert "no such column: nummer" in visitor.message()
    assert 'role="alert"' in visitor.parts["results"]
    visitor.search("x" * 10_001, where="")
    assert "10,001 characters" in visitor.message()
    visitor.search('"red" "blue"')
    assert "write + or - between sentences" in visitor.message()
    visitor.search('- "red"')
    assert "Nothing in this query is wanted" in visitor.message()
    visitor.search(QUERY, where="x" * 2_001)
    assert "2,001 characters" in visitor.message()


def test_what_an_index_says_is_text_and_no_code(visitor):
    (evil,) = visitor.search(QUERY, where="number = 3")
    shown = [visitor.parts["results"], visitor.show(evil)]
    visitor.mark("more", evil)
    shown += [visitor.parts["chips"], visitor.parts["results"]]
    for text in shown:
        assert "onerror" in text
        assert "<img src=x" not in text
    # Gradio runs templates as code, so none may hold a text of the index or of a visitor.
    templates = [part["props"].get("html_template") for part in visitor.config["components"]]
    assert {one for one in templates if one is not None} == {"${value}", ""}


# --- what it serves ---


def test_images_are_small_and_written_anew(visitor, made):
    rows = made.gallery.store().get(made.gallery.store().listing()["id"].to_pylist()).to_pylist()
    row = next(row for row in rows if row["name"] == "image 0.jpg")
    original = (made.files / "image 0.jpg").read_bytes()
    assert Image.open(io.BytesIO(original)).getexif()
    for route in (f"/image/{row['id']}", f"/image/{row['id']}/large"):
        answer = visitor.client.get(route)
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.headers["x-content-type-options"] == "nosniff"
        image = Image.open(io.BytesIO(answer.content))
        assert image.size == (96, 64)
        assert not image.getexif()
        assert answer.content != original
    # Where files of the server lie is nobody's business.
    visitor.search(QUERY, count=30)
    said = visitor.parts["results"] + visitor.show(row["id"]) + json.dumps(visitor.config)
    assert "image 0.jpg" in said
    assert str(made.files) not in said


def test_the_page_loads_nothing_from_elsewhere(visitor):
    answer = visitor.client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert not re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?:https?:)?//[^"']+""", answer.text)
    assert visitor.config["analytics_enabled"] is False
    assert not visitor.config["stylesheets"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/assets/../../../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "/assets//etc/passwd",
        "/static/..%5c..%5cetc%5cpasswd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/svelte/....//etc/passwd",
        "/image//etc/passwd",
        "/image/..%2f..%2fetc%2fpasswd",
        "/image/%00",
        "/gradio_api/custom_component/x/client/y/z",
        "/gradio_api/info",
        "/gradio_api/upload",
        "/gradio_api/upload_progress?upload_id=1",
        "/gradio_api/runs",
        "/gradio_api/deep_link?session_hash=1",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/monitoring",
        "/monitoring/summary",
        "/docs",
        "/openapi.json",
        "/gradio_api/openapi.json",
        "/index.json",
        "/pictures/",
    ],
)
def test_no_path_leads_to_a_file(server, path):
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert answer.split(b" ")[1] == b"404"
    assert b"root:" not in answer


def test_another_indexs_image_and_file_are_not_served(visitor, made):
    other = made.other.store().listing()["id"].to_pylist()[0]
    mine = made.gallery.store().listing()["id"].to_pylist()[0]
    assert visitor.client.get(f"/image/{mine}").status_code == 200
    for wrong in (other, mine.upper(), mine[:12], mine[:-1], mine + "0", "0" * 64):
        assert visitor.client.get(f"/image/{wrong}").status_code == 404
    file = next((made.folder / "others").iterdir())
    for path in (file, made.folder / "index" / "index.json", made.folder / "index" / "seen.parquet"):
        assert visitor.client.get(f"/gradio_api/file={path}").status_code == 404
    visitor.search(QUERY)
    assert visitor.mark("more", other) == []
    assert "has no image with the id" in visitor.message()
    assert str(made.folder) not in visitor.message()


def test_a_query_names_no_file(visitor, made):
    """What `icone search` takes for a file is a sentence here, and nobody learns whether it is there."""
    file = next(made.files.iterdir())
    visitor.search(QUERY)
    for sentence in (str(file), "/etc/passwd", "./nothing.jpg", "~/x.png"):
        assert visitor.search(sentence) == made.gallery.search([Term(text=sentence)], 20)["id"][:]
    visitor.search(f'"red" + {file}')
    assert "can't be read" in visitor.message()


def test_other_methods_and_routes_are_closed(visitor):
    for method, path in [
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/search"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("PUT", "/upload"),
        ("DELETE", "/"),
        ("OPTIONS", "/upload"),
    ]:
        assert visitor.client.request(method, path).status_code == 404, path


def test_what_stands_for_a_file_in_an_event_is_neither_read_nor_fetched(visitor, server):
    """To Gradio a mapping in an event may be a file, which it copies, or an address, which it fetches."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for path, address in [("/etc/passwd", None), (url, url), ("/etc/passwd", url)]:
            fake = {"path": path, "url": address, "orig_name": "x", "meta": {"_type": "gradio.FileData"}}
            for name in ("sentence", "where", "count", "cut", "marks"):
                visitor.parts = {**visitor.parts, **DEFAULTS, name: fake}
                assert visitor.post("sentence", "submit")[0].status_code == 400
                visitor.parts[name] = [fake]
                assert visitor.post("sentence", "submit")[0].status_code == 400
            visitor.parts |= DEFAULTS
            for said in (fake, {"id": fake}, {"id": [fake]}):
                assert visitor.post("results", "select", **said)[0].status_code == 400
                assert visitor.post("picker", "upload", **said)[0].status_code == 400
            with contextlib.suppress(TimeoutError):
                asked.append(trap.accept())
    for body in (b"[" * 100_000, b"[]", b"{}", b'{"data": {}}', b"\xff", b'{"data": [], "session_hash": {}}'):
        assert visitor.client.post("/gradio_api/queue/join", content=body).status_code == 400
    assert not asked
    assert not [path for path in server.folder.rglob("*") if path.is_file()]
    assert visitor.search(QUERY)


@pytest.mark.parametrize(
    "marks",
    ["{", "1", '[["more"]]', '[["own", "../../x"]]', '[["more", "/etc/passwd"]]', "[" * 100_000, '[["x", "0"]]'],
)
def test_marks_that_no_page_makes_are_refused(visitor, marks):
    visitor.search(QUERY, marks=marks)
    assert visitor.message() == "The query's images can't be read: load the page again."
    assert visitor.search(QUERY)


def test_hostile_conditions_change_nothing(visitor):
    for where in ("1); DROP TABLE rows; --", "(SELECT count(*) FROM sqlite_master) > 0", "load_extension('x')"):
        visitor.search(QUERY, where=where)
        assert "is no condition" in visitor.message()
    assert len(visitor.search(QUERY, where="")) == 20


def test_another_sites_name_is_refused(server):
    for host, code in (("evil.example", 421), ("127.0.0.1.evil.example:80", 421), ("localhost:1", 200), ("[::1]", 200)):
        assert httpx.get(server.url, headers={"host": host}).status_code == code


# --- what it takes ---

DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "a page": b"<html><script>alert(1)</script>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) run\n",
    "truncated jpeg": stored(draw("red", "blue", 300))[:900],
    "truncated png": stored(draw("red", "blue", 300), "PNG")[:200],
    "only a header": b"\xff\xd8\xff\xe0",
    "huge": png(30_000, 30_000),
    "empty data": png(500, 500),
    "no size": png(0, 0),
    "text in a png": png(10, 10, b"text"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_image_is_refused_in_plain_words(visitor, name):
    answer = visitor.upload(DAMAGED[name])
    assert answer.status_code == 422
    assert re.match(r"(The|Images) .*\w", answer.json()["error"])
    assert "object at 0x" not in answer.json()["error"]


def test_uploads_have_a_limit_of_bytes(visitor, server):
    answer = visitor.upload(b"\xff\xd8\xff" + bytes(20_000_000))
    assert answer.status_code == 413
    assert answer.json()["error"] == "This has 20.0 MB, and the limit is 20."
    assert visitor.client.post("/upload", content=iter([b"x" * 100])).status_code == 411
    assert visitor.client.post("/gradio_api/queue/join", content=b" " * 200_001).status_code == 413


def state_of(server):
    """File descriptors, memory in MB and temporary files of the server."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    files = len(list(server.folder.rglob("*")))
    return fds_of(server), int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, files


def fds_of(server):
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def test_fifty_visitors_and_two_hundred_bad_images_leave_nothing(server, made):
    """Each visitor searches, opens an image and loads thumbnails, while others send what is no image."""
    expected = made.gallery.search(QUERY, 20)["id"][:]
    kinds = [content for name, content in DAMAGED.items() if name != "empty"]
    for content in kinds:  # what is imported and opened once
        httpx.post(f"{server.url}/upload", content=content, timeout=60)
    gc.collect()
    before, failures = state_of(server), []

    def visit(number):
        one = Visitor(server.url)
        try:
            found = one.search(QUERY)
            assert found == expected
            one.show(found[number % 20])
            for image in found[:4]:
                assert one.client.get(f"/image/{image}").status_code == 200
            for turn in range(4):
                assert one.upload(kinds[(4 * number + turn) % len(kinds)]).status_code == 422
        except Exception as error:
            failures.append(repr(error))
        finally:
            one.close()

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    ends = time.monotonic() + 15
    while fds_of(server) > before[0] + 2 and time.monotonic() < ends:
        time.sleep(0.2)
    after = state_of(server)
    assert after[0] <= before[0] + 2, "file descriptors"
    assert after[1] < before[1] + 150, "memory"
    assert after[2] == before[2], "temporary files"


@pytest.mark.slow
def test_memory_stays_where_it_is(server, made):
    """Large images by several visitors at once are decoded one at a time."""
    large = stored(Image.effect_noise((4000, 4000), 20).convert("RGB"))
    assert len(large) < 20_000_000
    assert httpx.post(f"{server.url}/upload", content=large, timeout=120).status_code == 200
    before = state_of(server)

    def send(_):
        return httpx.post(f"{server.url}/upload", content=large, timeout=300).status_code

    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(send, range(60))) == {200}
    after = state_of(server)
    assert after[1] < before[1] + 300
    assert after[2] == before[2]


def test_the_servers_log_has_no_traceback_of_the_users_making(server, visitor):
    visitor.search(QUERY, where="nothing")
    assert "no such column" not in server.log.read_text()


# --- the command, and the Space ---


@pytest.fixture
def served(monkeypatch):
    """Have `icone app` say what it would serve."""
    from icone_hf.cli import app

    calls = []
    monkeypatch.setattr(app, "serve", lambda gallery, host, port, said: calls.append((len(gallery), host, port)))
    return calls


def test_the_command_refuses_what_it_cannot_serve(made, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        index_and_model = [str(made.folder / "index"), "--model", str(made.model)]
        for arguments, said in [
            ([*index_and_model, "--port", str(port)], f"--host 127.0.0.1 --port {port} can't be had"),
            ([*index_and_model, "--host", "203.0.113.1"], "--host 203.0.113.1 --port 7860 can't be had"),
            ([*index_and_model, "--port", "65536"], "port=65536 must be from 0 to 65535"),
            ([str(tmp_path)], "is no index"),
            ([str(made.folder / "index"), "--model", str(tmp_path / "none")], "--model"),
        ]:
            with contextlib.suppress(SystemExit):
                assert main(["app", *arguments]) == 2
            assert said in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(made.folder / "index"), "--model", str(made.model)]) == 2
    assert "pip install 'icone_hf[app]'" in capsys.readouterr().err


def test_the_space_serves_the_index_beside_it(made, served, tmp_path, monkeypatch):
    space = Path(__file__).parents[2] / "examples" / "space" / "app.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(made.model)
    (tmp_path / "index").symlink_to(made.folder / "index")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(space), run_name="__main__")
    (tmp_path / "index").unlink()  # now it makes one of the images that lie there
    (tmp_path / "pictures").symlink_to(made.files)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(space), run_name="__main__")
    assert served == [(21, "0.0.0.0", 7860), (1, "0.0.0.0", 7860)]
