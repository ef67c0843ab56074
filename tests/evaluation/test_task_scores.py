"""`sp3llm score --task`: what the stock model answers, and figures as GLUE and SQuAD count them."""

import json
import math

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from sp3llm.cli import main
from sp3llm.errors import UserError
from sp3llm.evaluation.score_task import score_task
from sp3llm.evaluation.task_answers import answers_of, questions_of
from sp3llm.evaluation.task_metrics import exact_match, metrics_of, word_f1
from sp3llm.evaluation.task_scores import reported, score_rows
from sp3llm.models.objectives.catalogue import task_objective
from sp3llm.options import ScoreConfig
from sp3llm.text.labels import Labels
from sp3llm.text.task_rows import Row
from sp3llm.text.tasks import CLASSES, SPAN, TASKS, VALUE, task_for
from tests.helpers import QUIET
from tests.tasks import opinion_folder, opinions, tiny_encoder, word_tokenizer, write_jsonl

pytest.importorskip("sklearn")
BINARY = Labels(CLASSES, ("LABEL_0", "LABEL_1"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny encoder, one that differs, and a task."""
    place = tmp_path_factory.mktemp("encoders")
    tiny_encoder(place / "dense")
    tiny_encoder(place / "small", num_hidden_layers=1)
    opinion_folder(place / "task")
    return place


# --------------------------------------------------------------------------- figures


def figures(task, labels, pairs, positive=1):
    return {m.name: m.figure(pairs) for m in metrics_of(task, labels, positive)}


def test_figures_of_classes_are_those_of_the_counts():
    pairs = [(1, 1)] * 5 + [(1, 0)] * 2 + [(0, 1)] * 3 + [(0, 0)] * 7
    tp, fp, fn, tn = 5, 2, 3, 7
    found = figures(task_for("mrpc", CLASSES), BINARY, pairs)
    assert found == {"accuracy": pytest.approx(12 / 17), "F1": pytest.approx(10 / 15)}
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert figures(TASKS["cola"], BINARY, pairs) == {"Matthews": pytest.approx(by_hand)}
    turned = [(1 - a, 1 - b) for a, b in pairs]
    assert figures(TASKS["mrpc"], BINARY, turned, positive=0) == found


def test_correlations_do_not_ask_for_the_scale():
    pairs = [(2.0 * value + 7, float(value)) for value in range(9)]
    labels = Labels(VALUE, ("LABEL_0",))
    both = {"Pearson": pytest.approx(1), "Spearman": pytest.approx(1)}
    assert figures(TASKS["stsb"], labels, pairs) == both
    assert figures(TASKS["stsb"], labels, [(1.0, b) for _, b in pairs])["Pearson"] == 0


@pytest.mark.parametrize(
    ("found", "answers", "exact", "f1"),
    [
        ("The Normans!", ["normans"], 1, 1),
        ("the Normans of France", ["Normans", "in Normandy"], 0, 0.5),
        ("", ["Normans"], 0, 0),
        ("a", ["the"], 1, 1),
        ("x y y", ["y z"], 0, 0.4),
    ],
)
def test_answers_are_compared_as_squad_compares_them(found, answers, exact, f1):
    assert exact_match(found, answers) == exact
    assert word_f1(found, answers) == pytest.approx(f1)


# --------------------------------------------------------------------------- answers


def test_answers_are_those_of_the_stock_model_row_by_row(folders):
    model = tiny_encoder(folders / "dense")
    objective = task_objective(
        model.config.to_dict() | {"architectures": [type(model).__name__]}, ""
    )
    tokenizer = word_tokenizer()
    asked = reported(task_for(f"sst2={folders / 'task'}", CLASSES), BINARY, tokenizer, 16)
    (questions,) = asked.splits.values()
    expected = []
    for row in questions.rows:
        with torch.no_grad():
            logits = model(**tokenizer(row.texts[0], return_tensors="pt")).logits
        expected.append(int(logits.argmax()))
    for batch in (1, 7, 100):
        assert answers_of(model, objective, questions, batch) == expected
    correct = sum(a == t for a, t in zip(expected, questions.truths, strict=True))
    (row,) = score_rows(asked, {"sst2": expected}, {"sst2": list(questions.truths)})
    assert row.small == pytest.approx(correct / len(expected))
    assert row.dense == 1
    assert 0 < row.paired_standard_error == pytest.approx(row.standard_error)


def test_the_likeliest_span_of_the_context_is_the_answer(tmp_path):
    model, tokenizer = tiny_encoder(tmp_path, "answers"), word_tokenizer()
    objective = task_objective({"architectures": ["BertForQuestionAnswering"]}, "")
    contexts = [" ".join(map(str, range(60))), "the film was good"]
    rows = [Row(("is it ?", c), {"text": ["film"], "answer_start": [4]}, "") for c in contexts]
    labels = objective.labels({})
    task = task_for("squad", SPAN)
    questions = questions_of(rows, task, labels, tokenizer, 24)
    found = answers_of(model, objective, questions, 2)
    assert found == answers_of(model, objective, questions, 50)
    given = tokenizer(*rows[1].texts, return_tensors="pt", return_offsets_mapping=True)
    offsets = given.pop("offset_mapping")[0]
    with torch.no_grad():
        output = model(**given)
    sums = {
        (first, last): float(output.start_logits[0, first] + output.end_logits[0, last])
        for first in range(5, 9)
        for last in range(first, 9)
    }
    first, last = max(sums, key=sums.get)
    assert found[1] == contexts[1][offsets[first, 0] : offsets[last, 1]]
    assert found[0] in contexts[0]


# --------------------------------------------------------------------------- the command


def test_the_command_writes_table_and_answers(folders, tmp_path, capsys):
    task = f"sst2={folders / 'task'}"
    settings = ScoreConfig(
        str(folders / "small"), task=task, against=str(folders / "dense"), output=tmp_path / "out"
    )
    comparison = score_task(settings, QUIET)
    (row,) = comparison.rows
    assert (row.task, row.metric, row.samples) == ("sst2", "accuracy", 24)
    written = json.loads(next(tmp_path.glob("out/comparison_*.json")).read_text())
    assert written["rows"][0]["difference"] == row.small - row.dense
    assert "scikit-learn" in written["versions"]
    answers = json.loads(next(tmp_path.glob("out/answers_*.json")).read_text())["sst2"]
    correct = [a == t for a, t in zip(answers["small"], answers["true"], strict=True)]
    assert row.small == pytest.approx(sum(correct) / 24)
    assert (
        next(tmp_path.glob("out/comparison_*.md")).read_text().startswith("# small against dense")
    )
    own = f"{write_jsonl(tmp_path / 'own.jsonl', opinions(90, 3))}:sentence,label"
    rows = score_task(ScoreConfig(str(folders / "small"), task=own, output=tmp_path), QUIET).rows
    assert [row.metric for row in rows] == ["accuracy", "F1", "Matthews"]
    assert {row.dense for row in rows} == {None}


def test_models_that_count_classes_otherwise_are_not_compared(folders, tmp_path):
    for name, names in (("one", ("negative", "positive")), ("other", ("positive", "negative"))):
        tiny_encoder(tmp_path / name, id2label=dict(enumerate(names)))
    settings = ScoreConfig(
        str(tmp_path / "one"), task=f"sst2={folders / 'task'}", against=str(tmp_path / "other")
    )
    with pytest.raises(UserError, match="to count classes alike"):
        score_task(settings, QUIET)


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path):
    tiny_encoder(tmp_path / "model", vocab_size=len(word_tokenizer()) - 1)  # none for "59"
    write_jsonl(tmp_path / "task" / "train.jsonl", opinions(50, 1))
    write_jsonl(tmp_path / "task" / "validation.jsonl", opinions(60, 2))
    told = refused("score", tmp_path / "model", "--task", f"sst2={tmp_path / 'task'}")
    assert "Expected token ids below the model's vocab_size" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Expected --tasks, for a decoder, or --task, for an encoder, found neither"),
        (["--task", "sst2", "--tasks", "stdlib"], "found both"),
        (["--task", "sst2", "--num-fewshot", "2"], "Expected --num-fewshot with --tasks only"),
        (["--tasks", "stdlib", "--seq-len", "2"], "Expected --seq-len with --task only"),
        (["--task", "sst3"], "Unknown task 'sst3'"),
        (["--task", "squad"], "Expected a task of classes, which the model predicts"),
        (["--task", "sst2={task}", "--seq-len", "99"], "Expected --seq-len of at most 32"),
        (["--task", "mnli={task}"], "Expected a column 'premise'"),
        (["--task", "sst2={task}", "--against", "{base}"], "fine-tune it on the task first"),
        (["--task", "mnli={three}"], "Expected a model of 3 classes for 'mnli'"),
    ],
)
def test_bad_input_is_one_sentence(words, expected, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_encoder(tmp_path / "base").bert.save_pretrained(tmp_path / "base")
    row = {"premise": "film", "hypothesis": "plot", "label": 2}
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "three" / f"{split}.jsonl", [row])
    places = {"task": folders / "task", "base": tmp_path / "base", "three": tmp_path / "three"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["score", str(folders / "dense"), *(word.format(**places) for word in words)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*-score"))


def test_models_that_know_no_types_are_given_none(tmp_path):
    config = DistilBertConfig(
        vocab_size=90, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=32
    )
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "small")
    word_tokenizer().save_pretrained(tmp_path / "small")  # of a class that has types
    pairs = [{"a": "good film", "b": "a plot", "label": n % 2} for n in range(3)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", pairs)
    task = f"{tmp_path / 'train.jsonl'}:a,b,label"
    found = score_task(ScoreConfig(str(tmp_path / "small"), task=task, output=tmp_path), QUIET)
    assert found.rows[0].samples == 3
