"""`sp3llm score`: lm-eval's own figures, and what the difference between two models is worth."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sp3llm.compression.story import compress
from sp3llm.errors import UserError
from sp3llm.evaluation.comparison import (
    Row,
    Scored,
    compare,
    mean,
    not_compared,
    paired_standard_error,
)
from sp3llm.evaluation.harness import _Model, _within_positions, score, select
from sp3llm.evaluation.selection import (
    Mean,
    Selection,
    TokenPerplexity,
    presets,
    read_preset,
    shipped,
)
from sp3llm.evaluation.speed_run import load
from sp3llm.models.objectives.causal_lm import window_losses
from sp3llm.models.source import bundled_model
from sp3llm.options import CompressConfig, ScoreConfig
from sp3llm.text.split import part_of
from sp3llm.text.stdlib import stdlib_documents
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import Windows, unbroken_windows
from tests.conftest import save_model, tiny_model
from tests.helpers import QUIET, weights

QUESTIONS = 24
NOTHING = {"tasks": {}, "groups": {}}


# --------------------------------------------------------------------------- standard errors


def test_paired_standard_error_is_that_of_the_differences():
    small, dense = [1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]
    differences = [0, -1, 0, 1, -1, 0]
    by_hand = statistics.stdev(differences) / math.sqrt(6)
    assert paired_standard_error(small, dense) == pytest.approx(by_hand, abs=1e-15)
    assert paired_standard_error(small, small) == 0
    assert paired_standard_error([1], [0]) is None


def test_resampled_standard_error_agrees_where_the_exact_one_is_known():
    generator = np.random.default_rng(5)
    dense = generator.normal(size=300)
    small = dense + generator.normal(0.3, 0.2, size=300)
    exact = paired_standard_error(small, dense)
    resampled = paired_standard_error(list(small), list(dense), mean)
    assert resampled == pytest.approx(exact, rel=0.1)
    unpaired = math.hypot(small.std(), dense.std()) / math.sqrt(300)
    assert exact < unpaired / 4


def scored(values, counts, items, errors=None):
    return Scored(values, errors or {}, counts, {}, items, {}, {}, {})


def fake_task(name):
    return SimpleNamespace(task_name=name, aggregation=lambda: {"acc": mean})


def fake_group(name, tasks, weight_by_size):
    how = SimpleNamespace(metric="acc", weight_by_size=weight_by_size)
    return SimpleNamespace(
        name=name, child_names=tasks, aggregate_metric_list=[how],
        get_all_tasks=lambda: [fake_task(task) for task in tasks],
    )  # fmt: skip


@pytest.mark.parametrize("weight_by_size", [True, False])
def test_error_of_a_group_is_that_of_the_mean_its_score_is(weight_by_size):
    answers = {
        "a": ([1, 0, 1, 1], [1, 1, 1, 0]),
        "b": ([0, 0, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0, 1]),
    }
    rows = {}
    for at in (0, 1):
        by_task = {name: pair[at] for name, pair in answers.items()}
        every = [answer for found in by_task.values() for answer in found]
        means = [statistics.mean(found) for found in by_task.values()]
        group = statistics.mean(every) if weight_by_size else statistics.mean(means)
        rows[at] = scored(
            {**{(n, "acc,none"): statistics.mean(f) for n, f in by_task.items()},
             ("both", "acc,none"): group},
            {"a": 4, "b": 8, "both": 12},
            {(n, "acc,none"): dict(enumerate(f)) for n, f in by_task.items()},
        )  # fmt: skip
    loaded = {
        "tasks": {name: fake_task(name) for name in answers},
        "groups": {"both": fake_group("both", list(answers), weight_by_size)},
    }
    found = compare(loaded, Selection(("both",), (), ()), rows[0], rows[1])
    error = {row.task: row.paired_standard_error for row in found}
    weights = [4, 8] if weight_by_size else [1, 1]
    by_hand = math.hypot(weights[0] * error["a"], weights[1] * error["b"]) / sum(weights)
    assert error["both"] == pytest.approx(by_hand)
    assert next(r for r in found if r.task == "a").difference == 0


def test_other_questions_are_not_paired():
    one = scored({("a", "acc,none"): 0.5}, {"a": 2}, {("a", "acc,none"): {0: 1, 1: 0}})
    other = scored({("a", "acc,none"): 0.5}, {"a": 2}, {("a", "acc,none"): {0: 1, 7: 0}})
    loaded = {"tasks": {"a": fake_task("a")}, "groups": {}}
    (row,) = compare(loaded, Selection(("a",), (), ()), one, other)
    assert row.difference == 0
    assert row.paired_standard_error is None


def test_mean_takes_the_first_metric_that_a_task_has():
    values = {("a", "acc,none"): 0.2, ("a", "acc_norm,none"): 0.4, ("b", "acc,none"): 0.6}
    small = scored(values, {"a": 10, "b": 10}, {}, dict.fromkeys(values, 0.03))
    mean = Mean("mine", ("a", "b"), ("acc_norm", "acc"))
    *_, row = compare(NOTHING, Selection(("a", "b"), (), (mean,)), small, None)
    assert row.small == pytest.approx(0.5)
    assert row.standard_error == pytest.approx(0.03 / math.sqrt(2))
    assert row.dense is None


def test_figures_that_are_no_numbers_are_null_in_json():
    row = Row("a", "f1,none", 1, math.nan, None)
    assert row.describe()["small"] is None


# --------------------------------------------------------------------------- token perplexity


def test_token_perplexity_is_that_of_the_papers(tmp_path):
    """The loop that GPTQ, SparseGPT and SliceGPT share, on a text of two rows."""
    rows = [" ".join(d.split()) for d in stdlib_documents()[:2]]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(rows))
    tokenizer = load_tokenizer(bundled_model())
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    seq_len = 64
    samples = ids.numel() // seq_len
    total = 0.0
    for at in range(samples):
        window = ids[:, at * seq_len : (at + 1) * seq_len]
        with torch.no_grad():
            logits = model(window).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:])
        total += loss.item() * seq_len
    expected = math.exp(total / (samples * seq_len))

    windows = unbroken_windows(str(text), tokenizer, seq_len)
    assert torch.equal(windows.tokens.flatten(), ids[0, : samples * seq_len])
    asked = TokenPerplexity(str(text), seq_len)
    losses = torch.stack([window_losses(model, w, torch.device("cpu"))
                          for w in windows.tokens])  # fmt: skip
    one = Scored({}, {}, {}, {}, {}, {asked: windows}, {asked: losses}, {})
    perplexity, logarithm = compare(NOTHING, Selection((), (asked,), ()), one, one)
    assert perplexity.small == pytest.approx(expected, rel=1e-6)
    assert logarithm.small == pytest.approx(math.log(expected), rel=1e-6)
    assert perplexity.difference == perplexity.paired_standard_error == 0
    assert logarithm.standard_error == pytest.approx(
        losses.mean(1).std().item() / math.sqrt(samples)
    )


def test_token_perplexities_of_other_tokens_do_not_stand_side_by_side():
    asked = TokenPerplexity("text", 4)
    text, losses = torch.arange(8).reshape(2, 4), torch.rand(2, 3).double()
    dense, small = (
        Scored({}, {}, {}, {}, {}, {asked: Windows(tokens, (), frozenset(), False)},
               {asked: losses}, {})
        for tokens in (text, text % 5)
    )  # fmt: skip
    for row in compare(NOTHING, Selection((), (asked,), ()), small, dense):
        assert row.dense is row.difference is row.paired_standard_error is None
        assert row.small > 0
    (note,) = not_compared(small, dense)
    assert "the other's tokens are not the same" in note
    assert not_compared(dense, dense) == []


def test_windows_are_too_long_for_the_model(tmp_path):
    models = [_Model.of(str(bundled_model()))]
    asked = tuple(TokenPerplexity("stdlib", n) for n in (1024, 2048))
    kept, notes = _within_positions(Selection(("x",), asked, ()), models)
    assert kept.perplexities == asked[:1]
    assert len(notes) == 1
    assert "1024 positions" in notes[0]
    with pytest.raises(UserError, match="shorter"):
        _within_positions(Selection((), asked[1:], ()), models)


# --------------------------------------------------------------------------- names


def test_compress_refuses_what_cannot_be_scored_before_it_begins(tmp_path):
    preset = tmp_path / "long.yaml"
    preset.write_text("token_perplexity: {text: stdlib, seq_lens: [2048]}\n")
    settings = CompressConfig(out=tmp_path / "small", score=str(preset))
    with pytest.raises(UserError, match="2048 positions"):
        compress(settings, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["long.yaml"]


def test_presets_name_tasks_of_lm_eval_and_unknown_ones_get_near_matches():
    assert {"zero-shot", "papers", "wikitext-token", "stdlib"} <= set(presets())
    with pytest.raises(UserError, match=r"'arc_eazy': did you mean .*arc_easy") as end:
        # All presets on the way: their names are looked up first.
        select(",".join([*presets(), "arc_eazy"]))
    assert "\n" not in str(end.value)


def test_wikitext_preset_counts_tokens_and_words():
    preset = read_preset(presets()["wikitext-token"])
    assert preset["tasks"] == ["wikitext"]
    assert preset["token_perplexity"] == {"text": "wikitext2", "seq_lens": [2048, 4096]}


def test_lm_eval_missing_is_one_sentence_with_the_command(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'lm-eval" in refused("score", bundled_model(), "--tasks", "stdlib")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", " , "], "at least one"),
        (["--tasks", "no-such-file.yaml"], "no-such-file.yaml"),
        (["--tasks", "stdlib", "--limit", "0"], "--limit"),
        (["--tasks", "stdlib", "--num-fewshot", "-1"], "--num-fewshot"),
        (["--tasks", "stdlib", "--batch-size", "many"], "--batch-size"),
        (["--tasks", "stdlib", "--dtype", "int3"], "--dtype"),
        (["--tasks", "stdlib", "--include-path", "nowhere"], "--include-path"),
        (["--tasks", "stdlib", "--device", "abacus"], "--device"),
        (["--tasks", "stdlib", "--against", "no/such-model/here"], "no/such-model/here"),
        (["--tasks", "wrong.yaml"], "compare it with"),
    ],
)
def test_bad_input_gets_one_sentence(words, said, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("tasks: [a]\nseq_lens: [7]\n")
    assert said in refused("score", bundled_model(), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


# --------------------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def questions():
    sys.path.insert(0, str(shipped("tasks")))
    try:
        import questions
    finally:
        sys.path.pop(0)
    return questions


def test_questions_are_the_same_in_every_process(questions, tmp_path):
    script = str(Path(questions.__file__))
    subprocess.run(
        [sys.executable, script, str(tmp_path)],
        check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "77"},
    )  # fmt: skip
    for name, made in (
        ("stdlib_cloze", questions.cloze_questions()),
        ("stdlib_next", questions.next_sentence_questions()),
    ):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == made


@pytest.mark.parametrize("kind", ["cloze_questions", "next_sentence_questions"])
def test_questions_are_held_out_and_have_one_answer(kind, questions):
    found = getattr(questions, kind)()
    assert len(found) > 300
    held_out = " ".join(
        " ".join(d.split()) for d in stdlib_documents() if part_of(d) == "evaluation"
    )
    for question in found:
        choices = question["choices"]
        assert len(set(choices)) == len(choices) == questions.UNIT_SELECTIONS
        whole = f"{question['context']} {choices[question['answer']]}"
        assert kind != "cloze_questions" or whole in held_out
    places = [question["answer"] for question in found]
    assert all(places.count(at) > len(found) / 8 for at in range(questions.UNIT_SELECTIONS))


# --------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def few_tasks(tmp_path_factory):
    """The offline tasks with few questions, as files."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("stdlib_cloze", "stdlib_next"):
        (folder / f"{name}.yaml").write_text(
            f"include: {shipped('tasks').resolve() / name}.yaml\n"
            f"task: few_{name}\n"
            f"dataset_kwargs: {{most: {QUESTIONS}}}\n"
        )
    return [str(folder / f"{name}.yaml") for name in ("stdlib_cloze", "stdlib_next")]


@pytest.fixture(scope="module")
def compressed(few_tasks, tmp_path_factory):
    """The bundled model, compressed in a hurry and scored at the end."""
    out = tmp_path_factory.mktemp("out") / "small"
    settings = CompressConfig(
        keep=0.6, out=out, refit=False, basis="pca", samples=4, seq_len=128, eval_samples=2,
        score=",".join(few_tasks),
    )  # fmt: skip
    compress(settings, QUIET)
    return out


def results_of(folder: Path, model: Path) -> dict:
    """lm-eval's own results of a model, the newest."""
    inside = folder / str(model).replace("/", "__")
    return json.loads(sorted(inside.glob("results_*.json"))[-1].read_text())


def test_scores_land_in_the_record(compressed):
    record = json.loads((compressed / "sp3llm.json").read_text())
    assert "--score" in record["command"]
    assert record["scores"]["command"] == record["command"]
    rows = {(row["task"], row["metric"]): row for row in record["scores"]["rows"]}
    cloze = rows["few_stdlib_cloze", "acc,none"]
    assert cloze["samples"] == QUESTIONS
    assert 0.4 < cloze["dense"] < 1
    assert cloze["difference"] == cloze["small"] - cloze["dense"]
    assert ("few_stdlib_next", "acc_mutual_info,none") in rows
    assert set(record["scores"]["sha256"]) == {"few_stdlib_cloze", "few_stdlib_next"}
    for shown in ("report.html", "README.md"):
        assert f"{cloze['difference']:+.4f}" in (compressed / shown).read_text()
    AutoModelForCausalLM.from_pretrained(compressed)


def test_error_of_the_difference_is_that_of_the_samples_on_disk(compressed):
    score_dir = compressed.with_name("small-score")
    record = json.loads((compressed / "sp3llm.json").read_text())
    row = next(r for r in record["scores"]["rows"] if r["task"] == "few_stdlib_cloze")
    answers = []
    for model in (compressed, bundled_model()):
        (file,) = (score_dir / str(model).replace("/", "__")).glob("samples_few_stdlib_cloze_*")
        lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"])
        answers.append([line["acc"] for line in lines])
    differences = [small - dense for small, dense in zip(*answers, strict=True)]
    assert row["difference"] == pytest.approx(statistics.mean(differences))
    assert row["paired_standard_error"] == pytest.approx(
        statistics.stdev(differences) / math.sqrt(QUESTIONS)
    )


@pytest.mark.parametrize("which", ["dense", "small"])
def test_stock_lm_eval_gives_the_same_figures(which, compressed, few_tasks, tmp_path, monkeypatch):
    from lm_eval.__main__ import cli_evaluate

    model = bundled_model() if which == "dense" else compressed
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}"]
    words += ["--tasks", ",".join(few_tasks), "--device", "cpu", "--batch_size", "8"]
    monkeypatch.setattr(sys, "argv", [*words, "--output_path", str(tmp_path)])
    cli_evaluate()
    stock = results_of(tmp_path, model)
    ours = results_of(compressed.with_name("small-score"), model)
    assert ours["results"] == stock["results"]
    assert ours["n-samples"] == stock["n-samples"]
    assert ours["config"]["model"] == stock["config"]["model"] == "hf"
    assert set(ours) - set(stock) <= {"upper_git_hash"}


def test_tokenizer_without_a_chat_template_is_refused(few_tasks, tmp_path):
    settings = ScoreConfig(
        str(bundled_model()), few_tasks[0], apply_chat_template=True, output=tmp_path
    )
    with pytest.raises(UserError, match="chat template"):
        score(settings, QUIET)


def test_a_model_that_lacks_weights_is_not_scored_with_random_ones(few_tasks, tmp_path):
    """Stock draws them, and says so in a log that nobody sees."""
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), tmp_path, tokenizer=True)
    whole = weights(tmp_path)
    del whole["lm_head.weight"]
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"found none for 'lm_head.weight'.*at random"):
        score(ScoreConfig(str(tmp_path), few_tasks[0], output=tmp_path / "scores"), QUIET)
    with pytest.raises(UserError, match=r"found none for 'lm_head.weight'.*at random"):
        load(str(tmp_path), "float32", torch.device("cpu"))


@pytest.mark.slow
def test_processes_share_the_questions(compressed, few_tasks, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(stdlib_documents()[:3]))
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        json.dumps({"tasks": few_tasks, "token_perplexity": {"text": str(text), "seq_lens": [64]}})
    )
    words = ["-m", "sp3llm", "score", str(compressed), "--against", str(bundled_model())]
    words += ["--tasks", str(preset), "--batch-size", "1", "--device", "cpu"]
    found = []
    for launch in (["-m", "torch.distributed.run", "--nproc_per_node", "2"], []):
        output = tmp_path / f"with-{len(launch)}"
        subprocess.run(
            [sys.executable, *launch, *words, "--output", str(output)],
            check=True, capture_output=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        (file,) = output.glob("comparison_*.json")
        found.append(json.loads(file.read_text())["rows"])
    assert found[0] == found[1]
