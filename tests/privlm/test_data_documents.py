import sys

import pytest

from privlm.data import DataError, Document, load_documents
from privlm.data import documents as documents_module


def test_default_corpus_is_real_english_with_unique_topics():
    corpus = load_documents()
    assert len(corpus) > 70
    assert sum(len(document.text) for document in corpus) > 400_000
    by_id = {document.id: document for document in corpus}
    assert "Python" in by_id["types"].text
    assert by_id["types"].user == "types"


def test_text_file_and_directory(tmp_path):
    (tmp_path / "b.txt").write_bytes("zwei\r\nÄpfel".encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "notes.md").write_text("left out")
    assert [(d.id, d.text) for d in load_documents(tmp_path)] == [
        ("a", "one"),
        ("b", "zwei\r\nÄpfel"),
    ]
    assert load_documents(tmp_path / "b.txt") == (Document("b", "zwei\r\nÄpfel"),)


def test_jsonl_reads_names_users_and_gives_default_ids(tmp_path):
    path = tmp_path / "mail.jsonl"
    path.write_text(
        '{"text": "hello", "id": "m1", "user": "ada", "extra": 1}\n\n{"text": "bye", "user": 7}\n'
    )
    assert load_documents(path) == (
        Document("m1", "hello", "ada"),
        Document("mail:3", "bye", "7"),
    )


def test_csv_reads_quoted_and_long_fields(tmp_path):
    path = tmp_path / "t.csv"
    long = "word " * 100_000  # beyond the csv module's own limit
    path.write_text(f'id,text,user\nx,"a, b\nc",ada\ny,{long},bob\n')
    first, second = load_documents(path)
    assert (first.id, first.text, first.user) == ("x", "a, b\nc", "ada")
    assert second.text == long


def test_arrow_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"text": ["one", "two"], "user": ["ada", "bob"]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
    assert load_documents(tmp_path / "set") == (
        Document("set:0", "one", "ada"),
        Document("set:1", "two", "bob"),
    )
    datasets.Dataset.from_dict({"body": ["one"]}).save_to_disk(str(tmp_path / "no-text"))
    with pytest.raises(DataError, match=r"no column 'text'; its columns are body"):
        load_documents(tmp_path / "no-text")
    datasets.Dataset.from_dict({"text": [3]}).save_to_disk(str(tmp_path / "number"))
    with pytest.raises(DataError, match="row 0: text is int"):
        load_documents(tmp_path / "number")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one"]})})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="splits train; give the directory of one"):
        load_documents(tmp_path / "splits")


def test_arrow_without_the_library_names_the_install(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'privlm\[hf\]'"):
        load_documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: document 'a' is empty"),
        ("a.txt", b" \n\t", "empty or all whitespace"),
        ("a.txt", b"fine\nb\xff", r"a\.txt, line 2: byte 6 is not valid UTF-8"),
        ("a.pdf", b"%PDF", r"unknown suffix '\.pdf'; known are \.txt, \.jsonl, \.csv"),
        ("a.jsonl", b"", "holds no documents"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', r"line 2: Expected `str`, got `int`"),
        ("a.jsonl", b'{"body": "x"}', r"line 1: .*missing required field `text`"),
        ("a.jsonl", b'{"text": "x"}\nnot json', r"line 2: JSON is malformed"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"line 2: byte 10 is not valid UTF-8"),
        ("a.jsonl", b'{"text": "  "}', "line 1: document 'a:1' is empty"),
        ("a.jsonl", b'{"text": "x", "id": true}', "line 1: Expected"),
        (
            "a.jsonl",
            b'{"text": "x", "id": "k"}\n{"text": "y", "id": "k"}',
            "documents 1 and 2 share the id 'k'",
        ),
        ("a.csv", b"", "no column 'text'; its first line names nothing"),
        ("a.csv", b"id,body\n1,x", "no column 'text'; its first line names 'id', 'body'"),
        ("a.csv", b"id,text\n1", "line 2: fewer fields than the 2 columns"),
        ("a.csv", b"text\nhello, world", "line 2: more fields than the 1 columns"),
        ("a.csv", b'text\n"open', r"a\.csv, line 2: unexpected end of data"),
    ],
)
def test_bad_files_say_what_where_and_how(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_documents(path)


def test_lone_surrogates_are_refused(tmp_path):
    # Standard JSON readers accept them; nothing downstream could encode them.
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        Document("d", "a\ud800")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800"}')
    with pytest.raises(DataError, match="line 1"):
        load_documents(tmp_path / "a.jsonl")


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_documents(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        load_documents(tmp_path)


def test_overlong_lines_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "short"}\n{"text": "' + "x" * 60 + '"}\n')
    with pytest.raises(DataError, match="line 2 is longer than 50 bytes"):
        load_documents(path)


def test_a_documents_text_does_not_print():
    assert "hush" not in repr(Document("d", "hush"))
