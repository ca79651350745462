"""Stores that hold the first dimensions of embeddings alone, beside plain calls of the model that are cut here."""

import importlib.util
import json

import numpy as np
import pytest
from search.albums import album, call, contents, embedding_of, index_again, opened, sha, stored
from tiny import make_groups

from icone_hf.errors import InputError
from icone_hf.search import Gallery, Term, index
from icone_hf.search.app import Page
from icone_hf.search.indexing import rebuild
from icone_hf.search.store_check import check_store

WHOLE, DIM = 16, 6
STORES = [
    "exact",
    pytest.param(
        "lancedb",
        marks=pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb isn't installed"),
    ),
]


def first(embedding, dim=DIM):
    """Cut an embedding."""
    return embedding[..., :dim] / np.linalg.norm(embedding[..., :dim], axis=-1, keepdims=True)


def settings_of(place):
    return json.loads((place / "index.json").read_text())


def scores_of(gallery, query, **options):
    found = gallery.search(query, 50, **options)
    return dict(zip(found["id"][:], found["score"][:], strict=True))


@pytest.mark.parametrize("store", STORES)
def test_images_and_captions_are_compared_by_their_first_dimensions(pair, tmp_path, store):
    model, processor = pair
    groups = make_groups(12)
    index(model, processor, groups, tmp_path / "index", store=store, dim=DIM, source_name="groups")
    assert settings_of(tmp_path / "index")["store_dim"] == DIM
    gallery = Gallery.open(tmp_path / "index", model, processor)
    rows = {kind: stored(gallery.folder.path, kind) for kind in ("pictures", "sentences")}
    images = {group["image_id"]: first(embedding_of(*pair, image=group["image"])) for group in groups}
    captions = {text: first(embedding_of(*pair, text=text)) for texts in groups["captions"] for text in texts}
    for row in rows["pictures"].values():
        np.testing.assert_allclose(row["embedding"], images[row["path"]], atol=1e-3)
    for row in rows["sentences"].values():
        np.testing.assert_allclose(row["embedding"], captions[row["text"]], atol=1e-3)
    assert gallery.store("images").info()["dim"] == gallery.dim == DIM

    # Sentences, images, sums, rows of the index and embeddings, each against the same terms that are cut here.
    text, image = first(embedding_of(*pair, text="a red square")), groups[3]["image"]
    (one,) = (one for one, row in rows["pictures"].items() if row["path"] == groups[5]["image_id"])
    whole = embedding_of(*pair, text="a red square")
    queries = {
        "sentence": ("a red square", text),
        "image": (image, images[groups[3]["image_id"]]),
        "like": (Term(like=one), images[groups[5]["image_id"]]),
        "sum": ([Term(text="a red square"), Term(like=one, weight=-0.5)], text - 0.5 * images[groups[5]["image_id"]]),
        "embedding of the model": (whole, text),
        "embedding of the index": (text, text),
    }
    for name, (query, expected) in queries.items():
        for kind, where in (("images", None), ("images", "path > '4'"), ("captions", None)):
            found = gallery.search(query, 5, kind=kind, where=where)
            kept = rows["pictures" if kind == "images" else "sentences"].values()
            all_scores = sorted(
                (first(expected) @ first(np.array(row["embedding"])) for row in kept if not where or row["path"] > "4"),
                reverse=True,
            )
            np.testing.assert_allclose(found["score"][:], all_scores[:5], atol=2e-3, err_msg=f"{name} {kind} {where}")
    assert len(gallery.search("a red square", 12, cut="auto")) <= 12
    with pytest.raises(InputError, match=f"a vector of {DIM} numbers"):
        gallery.search(np.ones(DIM + 1), 3)


@pytest.mark.parametrize("store", STORES)
def test_the_size_changes_without_the_model(pair, checkpoint, tmp_path, capsys, store):
    photos, place = album(tmp_path / "photos", 12), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place, "--store", store, "--dim", DIM)[0] == 0
    images = {sha(content): embedding_of(*pair, image=opened(content)) for content in contents(12)}
    gallery = Gallery.open(place, *pair)
    query = embedding_of(*pair, text="a red square")
    for dim in (DIM, 3, None, WHOLE):
        if dim != DIM:
            options = [] if dim is None else ["--dim", dim]
            code, out, said = call(capsys, "index", place, "--rebuild", "--json", *options)
            assert (code, out["in_index"]) == (0, 12), said
        dim = dim or 3  # without --dim it stays
        assert settings_of(place)["store_dim"] == dim
        # Who has it open follows, and --check compares with embeddings that are cut alike.
        found = scores_of(gallery, "a red square")
        assert found == pytest.approx({one: first(query, dim) @ first(images[one], dim) for one in images}, abs=2e-3)
        facts = call(capsys, "index", place, "--check", "--json")[1]
        assert (facts["dim"], facts["recall"], facts["recall_filtered"]) == (dim, 1, 1)
        code, out, _ = call(capsys, "search", place, "a red square", "--json", "--k", 50)
        assert {row["id"]: row["score"] for row in out} == pytest.approx(found, abs=1e-6)


def test_new_images_are_cut_as_the_others_are(pair, tmp_path):
    photos, place = album(tmp_path / "photos", 5), tmp_path / "index"
    index_again(*pair, photos, place, dim=DIM)
    for options in ({}, {"dim": DIM}):
        album(tmp_path / "photos", 8 + len(options))
        index_again(*pair, photos, place, **options)
    images = {sha(content): first(embedding_of(*pair, image=opened(content))) for content in contents(9)}
    rows = stored(place)
    assert rows.keys() == images.keys()
    for one, row in rows.items():
        np.testing.assert_allclose(row["embedding"], images[one], atol=1e-3)


def test_another_size_is_refused_with_the_way_out(pair, checkpoint, tmp_path, capsys):
    photos, place = album(tmp_path / "photos", 3), tmp_path / "index"
    assert call(capsys, "index", checkpoint, photos, place)[0] == 0
    before = stored(place)
    code, _, said = call(capsys, "index", checkpoint, photos, place, "--dim", DIM)
    assert code == 2
    assert f"has dim 16, not {DIM}" in said
    assert f"`icone index {place} --rebuild --dim {DIM}`" in said
    for arguments in ([checkpoint, photos, place], [checkpoint, photos, tmp_path / "new"], [place, "--rebuild"]):
        for dim, why in ((17, "must be 1 to 16"), (0, "must be 1 or more"), (-1, "must be 1 or more")):
            code, _, said = call(capsys, "index", *arguments, "--dim", dim)
            assert code == 2
            assert f"dim={dim} {why}" in said
    code, _, said = call(capsys, "index", place, "--check", "--dim", DIM)
    assert code == 2
    assert "--check takes INDEX as it is" in said
    assert stored(place) == before
    assert "store_dim" not in settings_of(place)
    assert not (tmp_path / "new" / "index.json").exists()


def test_an_index_of_before_holds_whole_embeddings(pair, tmp_path):
    place = tmp_path / "index"
    index_again(*pair, album(tmp_path / "photos", 3), place)
    settings = settings_of(place)
    del settings["nested_dims"]
    (place / "index.json").write_text(json.dumps(settings))
    assert Gallery.open(place, *pair).dim == WHOLE
    index_again(*pair, album(tmp_path / "photos", 4), place, dim=WHOLE)
    assert len(stored(place)) == 4


@pytest.mark.parametrize(("nested", "warns"), [(None, False), ([16, 6, 4], False), ([16, 8], True)])
def test_a_size_that_the_model_was_not_trained_for_is_warned_of(make_model, processor, tmp_path, caplog, nested, warns):
    photos = album(tmp_path / "photos", 2)
    index_again(make_model(nested_dims=nested), processor, photos, tmp_path / "whole")
    assert "nested_dims" not in caplog.text
    index_again(make_model(nested_dims=nested), processor, photos, tmp_path / "index", dim=DIM)
    assert ("nested_dims=16, 8, and dim=6 is none of them" in caplog.text) == warns
    caplog.clear()
    rebuild(tmp_path / "whole", dim=DIM)
    assert ("dim=6 is none of them" in caplog.text) == warns
    caplog.clear()
    rebuild(tmp_path / "whole", dim=WHOLE)
    assert "none of them" not in caplog.text


def test_a_rebuild_that_is_killed_leaves_an_index_that_says_what_it_holds(pair, tmp_path, monkeypatch):
    photos, place = album(tmp_path / "photos", 6), tmp_path / "index"
    index_again(*pair, photos, place)
    for name in ("write", "store"):  # of IndexFolder: before the new size is kept, and before rows are
        with monkeypatch.context() as patch:

            def killed(*args, **kwargs):
                raise KeyboardInterrupt

            patch.setattr(f"icone_hf.search.indexing.IndexFolder.{name}", killed)
            with pytest.raises(KeyboardInterrupt):
                rebuild(place, dim=DIM)
        with pytest.raises(InputError, match="lacks the store"):
            Gallery.open(place, *pair).search("red")
        index_again(*pair, photos, place)  # goes on with what index.json says
        expected = WHOLE if name == "write" else DIM
        assert len(stored(place)) == check_store(place)["rows"] == 6
        assert check_store(place)["dim"] == Gallery.open(place, *pair).dim == expected


def test_more_like_this_and_nearest_captions_on_the_page(pair, tmp_path):
    pytest.importorskip("gradio")
    groups = make_groups(12)
    index(*pair, groups, tmp_path / "index", dim=DIM, source_name="groups")
    gallery = Gallery.open(tmp_path / "index", *pair)
    page = Page(gallery)
    one = gallery.search("a red square", 1)["id"][0]
    token = page.add_upload(groups[0]["image"])["token"]
    assert len(page.uploads.get(token).embedding) == DIM
    for terms in ([Term(like=one)], [Term(like=one), Term(like=token), Term(text="a red square")]):
        embedding = gallery.embed(terms, page._embedding_of)
        expected = [first(np.array(stored(gallery.folder.path)[one]["embedding"]))]
        if len(terms) > 1:
            expected += [first(embedding_of(*pair, image=groups[0]["image"]))]
            expected += [first(embedding_of(*pair, text="a red square"))]
        np.testing.assert_allclose(embedding, first(np.sum(expected, axis=0)), atol=2e-3)
    nearest = page._nearest(one)
    image = np.array(stored(gallery.folder.path)[one]["embedding"])
    captions = stored(gallery.folder.path, "sentences").values()
    scores = sorted((first(np.array(row["embedding"])) @ first(image) for row in captions), reverse=True)
    np.testing.assert_allclose([score for _, score in nearest], scores[: len(nearest)], atol=1e-5)
    rebuild(gallery.folder.path, dim=DIM + 2)
    with pytest.raises(InputError, match="choose its images again"):
        gallery.embed([Term(like=token), Term(text="red")], page._embedding_of)
