import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privlm.data import ByteTokenizer, DataError, load_documents, load_tokenizer, train_bpe

TEXTS = [document.text for document in load_documents()[:12]]
BPE = train_bpe(TEXTS, 400)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
@given(text=st.text())
@settings(max_examples=150, deadline=None)
def test_round_trip_is_exact_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.n_bytes_V[ids].sum()) == len(text.encode("utf-8"))
    assert all(token < tokenizer.end_id for token in ids)  # no text encodes to a special id


@pytest.mark.parametrize("text", ["<|endoftext|>", " leading", "a  b\n\n\tc ", "🇩🇪é\u0301\x00"])
def test_awkward_text_survives_bpe(text):
    assert BPE.decode(BPE.encode(text)) == text


def test_bpe_compresses_and_keeps_its_size():
    assert BPE.vocab_size == 400
    assert BPE.end_id == 399
    text = load_documents()[20].text
    assert len(BPE.encode(text)) < 0.7 * len(text.encode("utf-8"))


def test_training_is_deterministic_across_processes():
    code = (
        "from privlm.data import load_documents, train_bpe\n"
        "t = train_bpe([d.text for d in load_documents()[:12]], 400)\n"
        "print(t.library.to_str())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == BPE.library.to_str()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_reserved_ids_stand_at_the_end_and_mean_no_text(tokenizer):
    larger = tokenizer.reserve(3).reserve(2)
    assert larger.vocab_size == tokenizer.vocab_size + 5
    assert list(larger.reserved_ids) == list(range(tokenizer.vocab_size, larger.vocab_size))
    assert larger.encode("same text") == tokenizer.encode("same text")
    assert larger.decode([*larger.encode("a"), larger.end_id, *larger.reserved_ids]) == "a"
    assert len(larger.n_bytes_V) == larger.vocab_size
    assert not larger.n_bytes_V[larger.end_id :].any()
    with pytest.raises(DataError, match="cannot reserve -1"):
        tokenizer.reserve(-1)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.reserve(4).save(path)
    loaded = load_tokenizer(path)
    assert loaded == tokenizer.reserve(4)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"kind": "byte", "reserved": -1}',
        b'{"kind": "byte", "path": "x"}',
        b'{"kind": "bpe"}',
        b'{"kind": "bpe", "bpe": {"model": 3}}',
        b'{"kind": "bpe", "bpe": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}}',
    ],
)
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_tokenizer(path)


def test_errors_name_the_numbers(tmp_path):
    with pytest.raises(DataError, match="at least 257, got 256"):
        train_bpe(["text"], 256)
    for nothing in ([], [""], "one string"):
        with pytest.raises(DataError, match="sequence of texts"):
            train_bpe(nothing, 300)
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="outside the vocabulary of 257"):
        ByteTokenizer().decode([257])
    with pytest.raises(DataError, match="lone surrogate"):
        BPE.encode("\ud800")
