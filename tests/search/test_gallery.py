"""Galleries: what a search returns, against NumPy over embeddings made by `encode_groups`."""

import json
import shutil
import threading

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import color_pairs, draw, make_groups

from icone_hf import Gallery, IConEModel, IConEProcessor, encode_groups
from icone_hf.cli import main
from icone_hf.errors import InputError
from icone_hf.search import Term
from icone_hf.search.index_folder import IndexFolder
from icone_hf.search.indexing import index

COUNT = 24


def save_files(folder, groups):
    """Write a data set's images as files; returns a source of those files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{'even' if number % 2 == 0 else 'odd'} {number:02d}.png" for number in range(len(groups))]
    for name, image in zip(names, groups["image"], strict=True):
        image.save(folder / name)
    rows = {"image": [str(folder / name) for name in names], "image_id": names, "captions": groups["captions"][:]}
    rows["ground"] = [ground for ground, _ in color_pairs(len(groups))]
    source = Dataset.from_dict(rows).cast_column("image", datasets.Image())
    return source


@pytest.fixture(scope="module")
def made(towers, tmp_path_factory):
    """A checkpoint, a folder of image files, and an index of them; nobody changes these."""
    root = tmp_path_factory.mktemp("gallery")
    torch.manual_seed(0)
    model = IConEModel.from_encoders(*towers, num_groups=8, projection_dim=16).eval()
    processor = IConEProcessor.from_encoders(*towers)
    model.save_pretrained(root / "checkpoint")
    processor.save_pretrained(root / "checkpoint")
    source = save_files(root / "images", make_groups(COUNT, captions=2))
    names = {"source_name": root / "images", "model_name": root / "checkpoint"}
    index(model, processor, source, root / "index", **names)
    return root, model, processor, encode_groups(model, processor, make_groups(COUNT, captions=2))


@pytest.fixture
def root(made, tmp_path):
    """A copy of the index that a test may change; the images are where they were."""
    shutil.copytree(made[0] / "index", tmp_path / "index")
    return tmp_path


@pytest.fixture
def gallery(made):
    return Gallery.open(made[0] / "index")


def path_of(number):
    return f"{'even' if number % 2 == 0 else 'odd'} {number:02d}.png"


def text_embedding(made, text):
    _, model, processor, _ = made
    with torch.no_grad():
        embedding = model(**processor(text=[text], return_tensors="pt")).text_embeds[0].numpy()
    return embedding / np.linalg.norm(embedding)


def expected(made, query, allowed=None, kind="image_embeds"):
    """Paths and scores, best first."""
    scores = getattr(made[3], kind).numpy() @ query
    order = [int(row) for row in np.argsort(-scores) if allowed is None or allowed(int(row))]
    return order, scores[order]


# --- five lines ---


def test_five_lines(made):
    gallery = Gallery.open(made[0] / "index")
    found = gallery.search("a red square on a blue ground", k=5)
    order, scores = expected(made, text_embedding(made, "a red square on a blue ground"))
    assert isinstance(found, Dataset)
    assert found["path"][:] == [path_of(row) for row in order[:5]]
    assert found["rank"][:] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(found["score"][:], scores[:5], atol=1e-3)
    for row in found:
        assert row["image"].convert("RGB").tobytes() == draw(*color_pairs(COUNT)[int(row["path"][-6:-4])]).tobytes()
        assert row["captions"] == make_groups(COUNT, captions=2)[int(row["path"][-6:-4])]["captions"]
    assert len(gallery) == COUNT
    assert str(COUNT) in repr(gallery)


def test_rows_have_the_source_s_columns(gallery):
    row = gallery.search("red", k=1)[0]
    assert row["ground"] == color_pairs(COUNT)[int(row["path"][-6:-4])][0]
    assert (row["width"], row["height"]) == (40, 40)
    assert len(row["id"]) == 64
    assert "digest" not in row
    assert json.dumps({name: value for name, value in row.items() if name != "image"})  # as --json prints it


@pytest.mark.parametrize("k", [1, 7, COUNT, 10 * COUNT])
def test_k_rows_at_most(made, gallery, k):
    order, _ = expected(made, text_embedding(made, "green"))
    assert gallery.search("green", k=k)["path"][:] == [path_of(row) for row in order[:k]]


def test_filters_apply_before_the_ranking(made, gallery):
    order, _ = expected(made, text_embedding(made, "red"), lambda row: row % 2 == 1)
    assert gallery.search("red", k=3, where="name like 'odd%'")["path"][:] == [path_of(row) for row in order[:3]]
    found = gallery.search("red", k=50, where="ground = 'red'")
    assert set(found["ground"]) == {"red"}
    assert len(found) == sum(ground == "red" for ground, _ in color_pairs(COUNT))


def test_nothing_is_left_by_a_filter(gallery):
    found = gallery.search("red", where="width > 1000", cut="auto", min_score=-1)
    assert len(found) == 0
    assert {"rank", "score", "id", "path", "image", "captions"} <= set(found.column_names)
    assert found.remove_columns("image").to_list() == []


def test_captions_are_found(made, gallery):
    _, scores = expected(made, text_embedding(made, "a blue square"), kind="text_embeds")
    found = gallery.search("a blue square", k=10, kind="captions")
    np.testing.assert_allclose(found["score"][:], scores[:10], atol=1e-3)
    groups = make_groups(COUNT, captions=2)
    for row in found:
        number = int(row["path"][-6:-4])
        assert row["text"] in groups[number]["captions"]
        embedding = made[3].text_embeds.numpy()[2 * number + groups[number]["captions"].index(row["text"])]
        np.testing.assert_allclose(embedding @ text_embedding(made, "a blue square"), row["score"], atol=1e-3)
    assert found[0]["image"].size == (40, 40)
    only = gallery.search("a blue square", k=5, kind="captions", where="text like '%yellow%'")
    assert all("yellow" in text for text in only["text"])


def test_min_score_leaves_out_what_scores_less(made, gallery):
    _, scores = expected(made, text_embedding(made, "red"))
    assert len(gallery.search("red", k=20, min_score=float(scores[7]) - 1e-3)) >= 8
    assert all(score >= scores[7] for score in gallery.search("red", k=20, min_score=float(scores[7]))["score"])
    assert len(gallery.search("red", min_score=2)) == 0


def test_a_cut_keeps_the_image_itself_and_what_stands_out(gallery):
    """The image that is searched by has a score of 1, which says nothing of the others."""
    one = gallery.search("red", k=1)[0]["id"]
    found = gallery.search(Term(like=one), k=COUNT, cut="auto")
    assert found["id"][0] == one
    whole = gallery.search(Term(like=one), k=COUNT)
    assert found["id"][:] == whole["id"][: len(found)]


def test_a_cut_measures_chance_by_the_whole_index(gallery, monkeypatch):
    """Where a filter leaves only what fits, all of it stays."""
    store = gallery.store("images")
    generator = np.random.default_rng(0)
    query, chance = np.eye(16, dtype=np.float32)[0], generator.normal(0.1, 0.02, 1_000)

    def sample(count, where=None, seed=0):
        scores = chance if where is None else generator.normal(0.8, 0.02, COUNT)
        return scores[:, None].astype(np.float32) * query

    rows = store.search(query, COUNT)
    high = rows.set_column(rows.column_names.index("score"), "score", [np.linspace(0.9, 0.7, COUNT, dtype=np.float32)])
    monkeypatch.setattr(store, "sample", sample)
    monkeypatch.setattr(store, "search", lambda *_: high)
    assert len(gallery.search("red", k=COUNT, where="width > 1", cut="auto")) == COUNT


# --- queries of every form ---


def test_an_image_in_memory_in_a_file_and_in_the_index(made, gallery, tmp_path):
    image = draw(*color_pairs(COUNT)[5])
    image.save(tmp_path / "query.png")
    one = gallery.search(image, k=1)[0]
    assert one["path"] == path_of(5)
    np.testing.assert_allclose(one["score"], 1, atol=1e-3)
    queries = [tmp_path / "query.png", str(tmp_path / "query.png"), Term(image=image), [Term(like=one["id"])]]
    for query in queries:
        assert gallery.search(query, k=4)["path"][:] == gallery.search(image, k=4)["path"][:]


def test_a_sum_of_terms(made, gallery):
    whole = text_embedding(made, "red") - 0.5 * text_embedding(made, "blue")
    order, _ = expected(made, whole / np.linalg.norm(whole))
    paths = [path_of(row) for row in order[:6]]
    for query in ('"red" - 0.5:"blue"', ["red", "-", "0.5:blue"], [Term(text="red"), Term(text="blue", weight=-0.5)]):
        assert gallery.search(query, k=6)["path"][:] == paths


@pytest.mark.parametrize("query", ["", "  ", [], ["red", Term(text="blue")], [draw("red", "blue")], '"red" "blue"'])
def test_what_is_no_query(gallery, query):
    with pytest.raises(InputError, match=r"[Qq]uery"):
        gallery.search(query)


def test_rows_that_cancel(gallery):
    one = gallery.search("red", k=1)[0]["id"]
    with pytest.raises(InputError, match="add up to nothing"):
        gallery.search([Term(like=one), Term(like=one, weight=-1.0)])


def test_like_by_the_first_digits(made, gallery):
    ids = gallery.store("images").listing()["id"].to_pylist()
    one = ids[3]
    assert gallery.row(one[:12])["id"] == one
    assert gallery.search(Term(like=one[:12]), k=1)["id"][:] == [one]
    for unknown in ("0" * 64, "f" * 12, "0000"):
        if not any(known.startswith(unknown) for known in ids):
            with pytest.raises(InputError, match="no image with the id"):
                gallery.search(Term(like=unknown))
    for no_id in ("abc", "g" * 12, "", "%%%%", "a" * 65, "' or 1 --"):
        with pytest.raises(InputError, match="is no id"):
            gallery.row(no_id)


def test_an_ambiguous_id_is_refused(gallery, monkeypatch):
    ids = gallery.store("images").listing()["id"].to_pylist()
    monkeypatch.setattr(gallery, "_ids_from", lambda start: ids)
    with pytest.raises(InputError, match="Several images"):
        gallery.row("abcd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": -1}, "k=-1"),
        ({"k": 2.5}, "k=2.5"),
        ({"cut": "largest"}, "cut='largest'"),
        ({"kind": "words"}, "kind='words'"),
        ({"where": " "}, "where is empty"),
        ({"where": "nowhere > 1"}, "no such column: nowhere"),
    ],
)
def test_arguments_that_mean_nothing(gallery, arguments, message):
    with pytest.raises(InputError) as error:
        gallery.search("red", **arguments)
    assert message in str(error.value)


# --- files and models that have moved ---


def test_a_file_that_is_gone(made, tmp_path):
    """It is found all the same, and has no image."""
    _, model, processor, _ = made
    source = save_files(tmp_path / "images", make_groups(4, captions=1))
    index(model, processor, source, tmp_path / "index", source_name=tmp_path / "images")
    gallery = Gallery.open(tmp_path / "index", model, processor)
    (tmp_path / "images" / path_of(2)).unlink()
    found = gallery.search("red", k=4)
    images = dict(zip(found["path"], found["image"], strict=True))
    assert images[path_of(2)] is None
    assert images[path_of(1)].size == (40, 40)
    row = next(row for row in found.remove_columns("image") if row["path"] == path_of(2))
    with pytest.raises(InputError, match="is gone"):
        gallery.open_image(row)
    (tmp_path / "images" / path_of(1)).write_bytes(b"no image")
    row = next(row for row in found.remove_columns("image") if row["path"] == path_of(1))
    with pytest.raises(InputError, match="can't be decoded"):
        gallery.open_image(row)


def test_images_that_lie_in_no_file_have_small_copies(made, tmp_path):
    _, model, processor, _ = made
    groups = make_groups(3, captions=1)
    index(model, processor, groups, tmp_path / "index", source_name="some data")
    found = Gallery.open(tmp_path / "index", model, processor).search(groups[1]["image"], k=1)
    assert found[0]["path"] == "1"
    difference = np.asarray(found[0]["image"], int) - np.asarray(groups[1]["image"], int)
    assert np.abs(difference).mean() < 8  # JPEG


def test_a_checkpoint_that_has_moved(made, root):
    settings = IndexFolder(root / "index").settings()
    IndexFolder(root / "index").write("index.json", {**settings, "model": str(root / "was here")})
    with pytest.raises(InputError, match=r"was here can't be loaded .* --model \(model=\)"):
        Gallery.open(root / "index").search("red")
    for model in (made[0] / "checkpoint", str(made[0] / "checkpoint")):
        assert len(Gallery.open(root / "index", model=model).search("red", k=3)) == 3
    assert len(Gallery.open(root / "index", made[1], made[2]).search("red", k=3)) == 3
    one = Gallery.open(root / "index")
    like = one.store("images").listing()["id"][0].as_py()
    assert one.search(Term(like=like), k=2)["id"][0] == like  # it needs no model


def test_another_model_is_refused(made, root, towers):
    torch.manual_seed(7)
    other = IConEModel.from_encoders(*towers, num_groups=8, projection_dim=16)
    other.save_pretrained(root / "other")
    made[2].save_pretrained(root / "other")
    with pytest.raises(InputError) as error:
        Gallery.open(root / "index", model=root / "other").search("red")
    assert str(made[0] / "checkpoint") in str(error.value)
    assert str(root / "other") in str(error.value)
    with pytest.raises(InputError, match="another model"):
        Gallery.open(root / "index", other, made[2])
    with pytest.raises(InputError, match="needs its processor"):
        Gallery.open(root / "index", other)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is no index"), ("{", "can't be read"), ('{"version": 99}', "version 99"), ("[]", "can't be read")],
)
def test_what_is_no_index(root, content, message):
    file = root / "index" / "index.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        Gallery.open(root / "index")


def test_an_index_without_captions_and_one_without_images(made, tmp_path):
    _, model, processor, _ = made
    source = save_files(tmp_path / "images", make_groups(3, captions=1)).remove_columns("captions")
    index(model, processor, source, tmp_path / "index", source_name=tmp_path / "images")
    gallery = Gallery.open(tmp_path / "index", model, processor)
    assert len(gallery.search("red")) == 3
    with pytest.raises(InputError, match="holds no captions"):
        gallery.search("red", kind="captions")
    shutil.rmtree(tmp_path / "index" / "exact")
    with pytest.raises(InputError, match="lacks the store that answers: `icone index INDEX --rebuild`"):
        Gallery.open(tmp_path / "index", model, processor).search("red")


# --- while the index grows ---


def test_searches_from_threads_while_images_are_added(made, tmp_path):
    """Every answer is whole: of rows that were there, in the order of their scores, each with its own columns."""
    _, model, processor, embeds = made
    source = save_files(tmp_path / "images", make_groups(COUNT, captions=2))
    names = {"source_name": tmp_path / "images", "shard_size": 1}
    index(model, processor, source.select(range(2)), tmp_path / "index", **names)
    gallery = Gallery.open(tmp_path / "index", model, processor)
    first = gallery.search("red", k=1)[0]["id"]
    query = gallery.embedding_of(first)
    scores = {path_of(row): float(score) for row, score in enumerate(embeds.image_embeds.numpy() @ query)}
    answers, failures, ended = [], [], threading.Event()

    def search(number):
        own = gallery if number % 2 else Gallery.open(tmp_path / "index", model, processor)
        try:
            while not ended.is_set():
                found = own.search(Term(like=first), k=50, where="width > 1" if number % 3 == 0 else None)
                answers.append(found.remove_columns("image").to_list())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        index(model, processor, source, tmp_path / "index", **names)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert {len(rows) for rows in answers} >= {2, 12}
    assert len(gallery.search(Term(like=first), k=50)) == COUNT
    for rows in answers:
        assert len({row["id"] for row in rows}) == len(rows)
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        for row in rows:
            assert row["score"] == pytest.approx(scores[row["path"]], abs=2e-3)


# --- the command ---


def searched(capsys, *arguments):
    assert main(["search", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_command_prints_what_python_finds(made, gallery, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw("red", "blue").save("like.png")
    folder = made[0] / "index"
    rows = json.loads(searched(capsys, folder, "red", "--k", 3, "--json"))
    assert rows == gallery.search("red", k=3).remove_columns("image").to_list()
    table = searched(capsys, folder, "red", "--k", 3)
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["1", "2", "3"]
    for row in rows:
        assert row["path"] in table
    as_sum = json.loads(searched(capsys, folder, "red", "+", "./like.png", "-", "0.5:blue", "--json"))
    assert as_sum == gallery.search('"red" + ./like.png - 0.5:"blue"').remove_columns("image").to_list()
    as_text = json.loads(searched(capsys, folder, '"red" + ./like.png - 0.5:"blue"', "--json"))
    assert as_text == as_sum
    by_image = json.loads(searched(capsys, folder, "--image", "like.png", "--json"))
    assert by_image == gallery.search("like.png").remove_columns("image").to_list()
    by_row = json.loads(searched(capsys, folder, "--like", rows[0]["id"][:12], "--k", 2, "--json"))
    assert by_row[0]["id"] == rows[0]["id"]
    captions = json.loads(searched(capsys, folder, "red", "--text", "--k", 2, "--json"))
    assert [row["text"] for row in captions] == gallery.search("red", k=2, kind="captions")["text"][:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--k", "2", "red"],
        ["red", "--k", "2"],
        ["--json", "red", "--k", "2"],
        ["red", "-", "blue", "--k", "2"],
        ["--k", "2", "red", "-", "blue"],
        ["--k=2", "-", "blue"],
        ["red", "--k", "2", "-", "blue"],
    ],
)
def test_options_stand_anywhere(made, capsys, arguments):
    shown = searched(capsys, made[0] / "index", *arguments)
    assert "2" in shown


def test_a_sheet_is_drawn(made, capsys, tmp_path):
    searched(capsys, made[0] / "index", "red", "--k", 7, "--grid", tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 1_200
        assert len(sheet.convert("RGB").getcolors(2**20)) > 20


def test_nothing_fits(made, capsys, tmp_path):
    shown = searched(capsys, made[0] / "index", "red", "--min_score", 2, "--grid", tmp_path / "none.png")
    assert shown.strip() == "Nothing fits."
    assert (tmp_path / "none.png").is_file()


@pytest.mark.parametrize("arguments", [[], ["--k", "0", "red"], ["red", "blue"], ["red", "--cut", "x"], ["-"]])
def test_the_command_refuses_with_a_message(made, capsys, arguments):
    try:
        code = main(["search", str(made[0] / "index"), *arguments])
    except SystemExit as end:  # as argparse ends
        code = end.code
    assert code == 2
    assert "icone search: error: " in capsys.readouterr().err
