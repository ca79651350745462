"""Filters: conditions that mean what they say, and hostile ones, which end with a message."""

import json
import sqlite3
import time

import numpy as np
import pyarrow as pa
import pytest

from icone_hf.errors import InputError
from icone_hf.search import row_table
from icone_hf.search.exact_store import ExactStore
from icone_hf.search.row_table import LONGEST_CONDITION, check_condition

ODD = ["two words", 'a "quoted" name', "it's", "größe", "名前", "select", "with", "x--y", "a/*b", "semi;colon", "UPPER"]


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    return [
        {
            "id": f"{number:064x}",
            "digest": "",
            "year": int(generator.integers(2000, 2027)) if number % 5 else None,
            "folder": ["holiday", "work", "Ça va", "it's"][number % 4],
            "score_of": float(generator.normal()),
            "captions": [f"a dog {number}", "snow"] if number % 3 else ["a cat"],
            **dict.fromkeys(ODD, number),
        }
        for number in range(60)
    ]


@pytest.fixture
def store(rows, tmp_path):
    store = ExactStore(tmp_path / "store")
    embeddings = np.random.default_rng(1).normal(size=(len(rows), 8))
    store.add(pa.Table.from_pylist(rows), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    return store


def found(store, where):
    table = store.search(np.eye(8, dtype=np.float32)[0], 1_000, where)
    assert store.count(where) == len(table)
    return {int(one, 16) for one in table["id"].to_pylist()}


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("year >= 2020 and folder = 'holiday'", lambda row: (row["year"] or 0) >= 2020 and row["folder"] == "holiday"),
        ("YEAR IS NULL", lambda row: row["year"] is None),
        ("year between 2001 and 2010 or score_of > 0.5", None),
        ("folder in ('work', 'Ça va')", lambda row: row["folder"] in ("work", "Ça va")),
        ("folder like 'HOL%'", lambda row: row["folder"] == "holiday"),
        ("folder glob 'h*'", lambda row: row["folder"] == "holiday"),
        ("folder = 'it''s'", lambda row: row["folder"] == "it's"),
        ("captions like '%dog%'", lambda row: row["captions"][0].startswith("a dog")),
        ("json_array_length(captions) = 1", lambda row: len(row["captions"]) == 1),
        ("lower(substr(folder, 1, 1)) = 'h' -- a remark", lambda row: row["folder"] == "holiday"),
        ("/* a (remark */ not (year > 2010)", lambda row: row["year"] is not None and row["year"] <= 2010),
        ("folder = '); select 1; --'", lambda row: False),
        ("folder != 'select' and folder != '\"x\"'", lambda row: True),
        ("cast(score_of as integer) = 0 and abs(score_of) < 0.5", lambda row: abs(row["score_of"]) < 0.5),
        ("case when year > 2010 then 1 else 0 end", lambda row: (row["year"] or 0) > 2010),
        ("1", lambda row: True),
        ("0", lambda row: False),
        *((f'"{name.replace(chr(34), chr(34) * 2)}" < 7', lambda row: row["two words"] < 7) for name in ODD),
        ("[two words] = 3 or `two words` = 4", lambda row: row["two words"] in (3, 4)),
        ("größe = 5 or 名前 = 6", lambda row: row["größe"] in (5, 6)),
        ("upper = 5", lambda row: row["UPPER"] == 5),
        ('"it\'s" = 1 and "UPPER" != 2', lambda row: row["it's"] == 1),
    ],
)
def test_conditions_choose_what_python_chooses(store, rows, where, holds):
    if holds is None:
        holds = lambda row: row["score_of"] > 0.5 or 2001 <= (row["year"] or 0) <= 2010  # noqa: E731
    assert found(store, where) == {number for number, row in enumerate(rows) if holds(row)}


HOSTILE = [
    "id in (select id from rows)",
    "exists (SELECT 1 FROM meta)",
    "(select count(*) from rows a, rows b, rows c, rows d, rows e) > 0",
    "1 in (with recursive n(x) as (select 1 union all select x + 1 from n) select x from n)",
    "1 in (values (1), (2))",
    "1 /* ' */ and (select 1) /* ' */",
    "1 -- '\n and (select 1) -- '",
    "\"folder\" = '' and (select '\"') is null",
    "1) union select place from rows where (1",
    "1) order by (place",
    "1) limit (5",
    "1; drop table rows",
    "1); drop table rows; --",
    "1); attach database '/tmp/attached.db' as other; --",
    "pragma table_info(rows)",
    "1 in pragma_table_info('rows')",
    "1 in sqlite_master",
    "1 in json_each('[1]')",
    "name in meta",
    "load_extension('x') is null",
    "length(zeroblob(1000000000)) > 0",
    "length(printf('%.*c', 1000000000, 'x')) > 0",
    "length(replace(hex(zeroblob(10000)), '0', '0000000000')) > 0",
    "length(" + "hex(" * 40 + "folder" + ")" * 40 + ") > 0",
    "length(" + "json_quote(" * 40 + "'\"'" + ")" * 40 + ") > 0",
    "group_concat(folder) is null",
    "count(*) > 1",
    "random() > 0",
    "max(year) over () > 1",
    "folder regexp 'a+'",
    "folder match 'a'",
    'folder = "holiday"',
    "nowhere = 1",
    "year >",
    "year = 2020)",
    "(year = 2020",
    "'unclosed",
    "year ? 1",
    "year = ?",
    "year = :year",
    "\x00",
    "year = 1\x00",
    "\ud800 = 1",
    "",
    "--",
    "(" * 2_000 + "1" + ")" * 2_000,
    "not " * 2_000 + "1",
    "1 or " * 5_000 + "1",
    "folder like '" + "%a" * 30_000 + "'",
]


@pytest.mark.parametrize("where", HOSTILE, ids=lambda where: where[:40])
def test_hostile_conditions_end_with_a_message(store, where, tmp_path):
    before = store.table.path.read_bytes()
    began = time.monotonic()
    for ask in (lambda: check_condition(where, store.columns()), lambda: store.count(where)):
        with pytest.raises(InputError) as error:
            ask()
        assert "is no condition" in str(error.value)
        assert "The columns are year, folder, score_of, captions" in str(error.value)
        assert len(str(error.value)) < 2_000
    assert time.monotonic() - began < 5
    assert store.table.path.read_bytes() == before


def test_what_only_rows_show_to_be_wrong(store):
    with pytest.raises(InputError, match="no condition: ESCAPE"):
        store.count("folder like 'a' escape 'ab'")


def test_patterns_with_many_wildcards_are_fast(store, rows):
    """Backtracking over every wildcard would take years."""
    rows[0] = {**rows[0], "folder": "a" * 5_000, "id": "f" * 64}
    store.add(pa.Table.from_pylist(rows[:1]), np.eye(8)[:1])
    began = time.monotonic()
    assert found(store, "folder like '" + "%a" * 100 + "%b'") == set()
    assert found(store, "folder glob '" + "*a" * 100 + "*b'") == set()
    assert len(found(store, "folder like '" + "%a" * 100 + "%'")) == 1
    assert time.monotonic() - began < 5


def test_a_long_search_is_ended(store, monkeypatch):
    monkeypatch.setattr(row_table, "SECONDS_OF_A_FILTER", -1.0)
    with store.table.writing() as connection:  # enough rows for SQLite to ask whether to go on
        many = [(place, f"{place:064x}") for place in range(100, 20_000)]
        connection.executemany("INSERT INTO rows (place, id) VALUES (?, ?)", many)
    with pytest.raises(InputError, match="it takes more than"):
        store.count("folder like '%b%' or id like '%x%y%'")
    assert len(store.table.places()) == 60 + len(many)  # other reads have no limit


def test_the_longest_condition(store, rows):
    ids = ", ".join(f"'{row['id']}'" for row in rows)
    where = f"id in ({ids})"
    assert len(found(store, where)) == 60
    assert len(found(store, where + " " * (LONGEST_CONDITION - len(where)))) == 60
    with pytest.raises(InputError, match="the limit is 10,000"):
        store.count(where + " " * (LONGEST_CONDITION + 1 - len(where)))


def test_a_condition_writes_nothing(store):
    """The connection that a condition is read by is open for reading alone."""
    with store.table.reading() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM rows")


def test_lists_are_json(store):
    row = store.get([f"{1:064x}"]).to_pylist()[0]
    assert row["captions"] == ["a dog 1", "snow"]
    assert found(store, f"captions = '{json.dumps(row['captions'])}'") == {1}
