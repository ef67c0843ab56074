"""Tasks: rows as in their files, tokens as the tokenizer has them, labels as the model does."""

import csv
import json
from itertools import pairwise

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sp3llm.errors import UserError
from sp3llm.text.encoding import encoded, encoded_stretches
from sp3llm.text.examples import joined
from sp3llm.text.labels import Labels, label_numbers, model_labels
from sp3llm.text.task_rows import Row, digests, evaluation_rows, training_rows
from sp3llm.text.task_sets import drawn
from sp3llm.text.tasks import CLASSES, SPAN, TASKS, VALUE, resolve_task, task_for
from tests.tasks import opinion_folder, opinions, word_tokenizer, write_jsonl

BINARY = Labels(CLASSES, ("negative", "positive"))


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def rows_of(*texts, label=0):
    return [Row(one if isinstance(one, tuple) else (one,), label, "a row") for one in texts]


# --------------------------------------------------------------------------- tokens


words = st.lists(st.sampled_from(["good", "film", "the", "7"]), min_size=1, max_size=40)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5), st.booleans())
def test_every_row_is_what_the_tokenizer_makes_of_it_alone(tokenizer, texts, pairs):
    texts = [tuple(map(" ".join, pair)) if pairs else (" ".join(pair[0]),) for pair in texts]
    examples = encoded(rows_of(*texts), tokenizer, 24, [0] * len(texts))
    for number, text in enumerate(texts):
        alone = tokenizer(*text, truncation=True, max_length=24)
        row = examples[number : number + 1]
        assert row.input_ids[0].tolist() == alone["input_ids"]
        assert row.token_type_ids[0].tolist() == alone["token_type_ids"]
        assert row.attention_mask.all()
        rest = examples.input_ids[number, row.shape[1] :]
        assert (rest == tokenizer.pad_token_id).all()
    assert examples.tokens == int(examples.attention_mask.sum())


@pytest.mark.parametrize("text", ["good film", ("good film", "the plot")])
def test_rows_without_room_for_a_token_of_text_are_refused(text, tokenizer):
    special = 3 if isinstance(text, tuple) else 2
    for seq_len in range(1, special + 1):
        with pytest.raises(UserError, match=f"Expected --seq-len of at least {special + 1}"):
            encoded(rows_of(text), tokenizer, seq_len)
    assert encoded(rows_of(text), tokenizer, special + 1).shape == (1, special + 1)


def test_joined_rows_are_the_rows(tokenizer):
    short, long = (encoded(rows_of(text), tokenizer, 24, [1]) for text in ("good", "good " * 9))
    both = joined([short, long, short])
    assert both.shape == (3, long.shape[1])
    for number, one in enumerate((short, long, short)):
        assert torch.equal(both[torch.tensor([number])].input_ids, one.input_ids)
    assert both.labels.tolist() == [1, 1, 1]
    assert joined([short, encoded(rows_of("film"), tokenizer, 24)]).labels is None


def test_stretches_cover_the_context_and_answers_are_found_in_it(tokenizer):
    context = " ".join(map(str, range(60)))
    answers = [{"text": [str(n)], "answer_start": [context.index(f" {n}") + 1]} for n in (12, 58)]
    rows = [Row(("is the plot ?", context), answer, "") for answer in answers]
    found = encoded_stretches(rows, tokenizer, 24)
    seen = {}
    for number, owner in enumerate(found.rows):
        begins, ends = found.offsets[number].unbind(1)
        of_context = begins >= 0
        assert not (of_context & (found.examples.token_type_ids[number] == 0)).any()
        seen.setdefault(owner, []).append((int(begins[of_context].min()), int(ends.max())))
        first, last = found.examples.labels[number].tolist()
        if first:
            assert context[begins[first] : ends[last]] == rows[owner].label["text"][0]
    for owner in range(2):
        pieces = sorted(seen[owner])
        assert pieces[0][0] == 0
        assert pieces[-1][1] == len(context)
        assert all(right[0] < left[1] for left, right in pairwise(pieces))
        labels = [found.examples.labels[n] for n, at in enumerate(found.rows) if at == owner]
        assert any(label[0] for label in labels)


def test_a_question_that_fills_the_row_is_refused(tokenizer):
    rows = [Row(("the " * 40, "a film"), {"text": ["film"], "answer_start": [2]}, "")]
    with pytest.raises(UserError, match="raise --seq-len"):
        encoded_stretches(rows, tokenizer, 24)


# --------------------------------------------------------------------------- rows


def in_format(folder, rows, suffix):
    path = folder / f"train{suffix}"
    if suffix == ".jsonl":
        return write_jsonl(path, rows)
    if suffix == ".parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(rows).to_parquet(path)
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_holds_the_same_rows(suffix, tmp_path):
    rows = [*opinions(40, 1), {"sentence": "null", "label": 1}, {"sentence": "NA, a", "label": 0}]
    path = in_format(tmp_path, rows, suffix)
    task = task_for(f"{path}:sentence,label", CLASSES)
    apart = [
        training_rows(task),
        training_rows(task, stopping=True),
        *evaluation_rows(task).values(),
    ]
    found = [(row.texts[0], row.label) for part in apart for row in part]
    assert sorted(found) == sorted((row["sentence"], row["label"]) for row in rows)
    known = [digests(part) for part in apart]
    assert all(not one & other for one in known for other in known if one is not other)


def test_a_copy_of_a_task_is_read_as_it_and_what_is_reported_on_is_whole(tmp_path, tokenizer):
    folder = opinion_folder(tmp_path)
    shared = opinions(4, 2)[0]
    write_jsonl(folder / "train.jsonl", [*opinions(96, 1), shared, shared])
    task = resolve_task(f"sst2={folder}")
    assert (task.name, task.columns, task.metrics) == ("sst2", ("sentence",), ("accuracy",))
    ((name, rows),) = evaluation_rows(task).items()
    assert name == "sst2"
    assert [row.texts[0] for row in rows] == [row["sentence"] for row in opinions(24, 2)]
    found = drawn(task, tokenizer, 1000, 16, 0, digests(rows), labels=BINARY)
    stopping = drawn(task, tokenizer, 1000, 16, 0, digests(rows), True, labels=BINARY)
    assert found.dropped_documents + stopping.dropped_documents == 1
    assert not found.documents & (stopping.documents | digests(rows))
    assert len(found.tokens) + len(stopping.tokens) == len(opinions(96, 1))
    again = drawn(task, tokenizer, 10, 16, 0, digests(rows), labels=BINARY)
    other = drawn(task, tokenizer, 10, 16, 1, digests(rows), labels=BINARY)
    assert torch.equal(again.tokens.labels, found.tokens.labels[:10])
    assert again.sha256 != other.sha256


def test_named_tasks_have_what_they_predict():
    for task in TASKS.values():
        assert bool(task.label_names) == (task.kind == CLASSES)
        assert len(task.columns) in (1, 2)
    assert set(TASKS["mnli"].evaluations) == {"matched", "mismatched"}
    with pytest.raises(UserError, match="Expected a task of values, which the model predicts"):
        task_for("sst2", VALUE)


@pytest.mark.parametrize(("name", "asked"), [
    ("sst2", ("nyu-mll/glue", "sst2", ["train", "validation"])),
    ("mnli", ("nyu-mll/glue", "mnli", ["train", "validation_matched", "validation_mismatched"])),
    ("squad", ("rajpurkar/squad", None, ["train", "validation"])),
])  # fmt: skip
def test_named_tasks_come_from_the_hub_split_by_split(name, asked, monkeypatch):
    task, seen = TASKS[name], []
    answers = {"text": ["film"], "answer_start": [4]}
    row = dict.fromkeys(task.columns, "the film") | {task.label: answers if name == "squad" else 1}

    def load(dataset, config, split):
        seen.append((dataset, config, split))
        return datasets.Dataset.from_list([{**row, task.columns[0]: f"{split} film"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = {**evaluation_rows(task), "": training_rows(task) + training_rows(task, stopping=True)}
    assert [one for *one, split in seen] == [list(asked[:2])] * len(seen)
    assert {split for *_, split in seen} == set(asked[2])
    assert all(len(rows) == 1 for rows in found.values())

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=f"check the network, or name a copy of it as {name}=FOLDER"
    ):
        training_rows(task)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sst3", "Unknown task 'sst3': expected one of cola, sst2"),
        ("sst3={folder}", "Unknown task"),
        ("sst2={folder}/nothing", "does not exist"),
        ("sst2={folder}/empty", "no train file"),
        ("sst2={folder}/alone", "Expected a validation file"),
        ("{folder}/train.jsonl", "two or three columns"),
        ("{folder}/train.jsonl:sentence", "two or three columns"),
        ("{folder}/train.jsonl:label,label", "two or three columns"),
        ("{folder}/train.jsonl:text,label", "Expected a column 'text'.*found columns sentence"),
        ("{folder}/none.jsonl:sentence,label", "does not exist"),
        ("{folder}/text.txt:sentence,label", "to be one of .jsonl, .csv, .tsv, .parquet"),
        ("{folder}/broken.jsonl:sentence,label", "Cannot read"),
        ("{folder}/nothing.csv:sentence,label", "found an empty file"),
        ("{folder}/gaps.jsonl:sentence,label", "Expected a text as 'sentence' in row 2"),
        ("{folder}/gaps.jsonl:other,label", "Expected a label as 'label' in row 1"),
    ],
)
def test_bad_tasks_are_refused_in_one_sentence(words, expected, tmp_path):
    opinion_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "alone" / "train.jsonl", opinions(4, 1))
    (tmp_path / "text.txt").write_text("film")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "nothing.csv").write_text("")
    write_jsonl(tmp_path / "gaps.jsonl", [
        {"sentence": "film", "other": "film", "label": None},
        {"sentence": None, "other": "plot", "label": 1},
    ])  # fmt: skip
    if "gaps" in words and "sentence" in words:
        write_jsonl(tmp_path / "gaps.jsonl", [{"sentence": s, "label": 1} for s in ("a", None)])
    with pytest.raises(UserError, match=expected) as refused:
        training_rows(task_for(words.format(folder=tmp_path), CLASSES))
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------------- labels


def test_classes_go_by_name_where_the_model_has_the_same(tmp_path):
    task = TASKS["mnli"]
    rows = [Row(("a", "b"), label, "") for label in (0, 1, 2)]
    reversed_names = Labels(CLASSES, ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    assert label_numbers(rows, task, reversed_names) == [2, 1, 0]
    unnamed = Labels(CLASSES, ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert label_numbers(rows, task, unnamed) == [0, 1, 2]
    worded = [Row(("a", "b"), label, "") for label in ("entailment", "neutral")]
    assert label_numbers(worded, task, reversed_names) == [2, 1]
    own = task_for(f"{write_jsonl(tmp_path / 'a.jsonl', opinions(3, 1))}:sentence,label", CLASSES)
    worded = [Row(("a",), label, "") for label in ("Positive", 0, "1", 1.0, True)]
    assert label_numbers(worded, own, BINARY) == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("label", [-1, 2, 0.5, "neutral", "", None, [0], float("nan")])
def test_unknown_labels_are_refused(label, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", opinions(3, 1))
    for words in (f"{path}:sentence,label", "sst2"):
        with pytest.raises(UserError, match="Expected a label that the model knows"):
            label_numbers([Row(("a",), label, "row 1")], task_for(words, CLASSES), BINARY)


def test_other_numbers_of_classes_are_refused():
    with pytest.raises(UserError, match=r"Expected a model of 3 classes for 'mnli'.*found 2"):
        label_numbers([Row(("a", "b"), 0, "")], TASKS["mnli"], BINARY)
    with pytest.raises(UserError, match="Expected a number as the label"):
        label_numbers([Row(("a",), "warm", "")], TASKS["stsb"], Labels(VALUE, ("LABEL_0",)))


@pytest.mark.parametrize(
    ("config", "kind", "count"),
    [
        ({}, CLASSES, 2),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, CLASSES, 3),
        ({"num_labels": 1}, VALUE, 1),
        ({"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}, VALUE, 1),
    ],
)
def test_what_a_model_predicts_stands_in_its_config(config, kind, count):
    labels = model_labels(config)
    assert (labels.kind, len(labels.names)) == (kind, count)


@pytest.mark.parametrize(
    "config",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression", "num_labels": 2},
        {"id2label": {"1": "a", "2": "b"}},
        {"id2label": ["a"]},
    ],
)
def test_what_no_task_asks_for_is_refused(config):
    with pytest.raises(UserError, match=r"config\.json"):
        model_labels(config)


def test_a_file_of_answers_has_a_question_and_a_context(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"context": "the film", "answers": {}}])
    with pytest.raises(UserError, match="Expected three columns with the file of a task of answ"):
        task_for(f"{path}:context,answers", SPAN)


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["plot"], "answer_start": [0]},
        {"text": [], "answer_start": []},
        {"text": ["film"]},
        {"text": "film", "answer_start": 4},
        {"text": ["film"], "answer_start": ["4"]},
        {"text": [None], "answer_start": [4]},
        {"text": ["film"], "answer_start": [None]},
        "film",
    ],
)
def test_answers_that_are_not_where_they_say_are_refused(answers, tmp_path):
    rows = [{"question": "a ?", "context": "the film", "answers": answers}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    task = task_for(f"{path}:question,context,answers", SPAN)
    with pytest.raises(UserError, match=r"row 1 of .*leave (the row|it) out"):
        training_rows(task, stopping=True)
    assert json.loads(path.read_text())
