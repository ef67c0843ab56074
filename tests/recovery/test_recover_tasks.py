"""Recovery of encoders: rows, masks and layers in the right places; stock, resumed, refused."""

import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from sp3llm.cli import main
from sp3llm.errors import UserError
from sp3llm.maths.losses import stream_error
from sp3llm.models.basis_file import BASIS, write_basis
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.objectives.sequence_classification import SEQUENCE_CLASSIFICATION
from sp3llm.options import RecoverConfig
from sp3llm.recovery import training
from sp3llm.recovery.inputs import Pair, open_pair, resolved
from sp3llm.recovery.setup import stream_places
from sp3llm.recovery.story import recover
from sp3llm.recovery.teacher import StatesTap
from sp3llm.recovery.training import _step
from sp3llm.runtime.folders import RECORD
from sp3llm.text.encoding import encoded
from sp3llm.text.task_rows import Row
from tests.helpers import QUIET
from tests.tasks import opinion_folder, tiny_encoder, word_tokenizer, write_jsonl

pytest.importorskip("sklearn")


def cut_neurons(model, folder, kept: int = 24) -> None:
    """The model with the first neurons of every FFN alone, as a folder with its basis."""
    config = model.config.__class__(**{**model.config.to_dict(), "intermediate_size": kept})
    small, tensors = type(model)(config), model.state_dict()
    for name, tensor in tensors.items():
        if name.endswith(("intermediate.dense.weight", "intermediate.dense.bias")):
            tensors[name] = tensor[:kept]
        elif name.endswith("output.dense.weight") and "attention" not in name:
            tensors[name] = tensor[:, :kept]
    small.load_state_dict(tensors)
    small.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    write_basis(folder, torch.eye(config.hidden_size))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, a model that was cut from it, and a task."""
    folder = tmp_path_factory.mktemp("encoders")
    cut_neurons(tiny_encoder(folder / "dense"), folder / "small")
    opinion_folder(folder / "task")
    return folder


@pytest.fixture
def run(place, tmp_path):
    def recovered(out: str = "out", **changes):
        settings = {
            "model": str(place / "small"),
            "teacher": str(place / "dense"),
            "task": f"sst2={place / 'task'}",
            "out": tmp_path / out,
            "steps": 6,
            "batch": 8,
            "micro_batch": 4,
            "lr": 3e-3,
            "warmup": 0.0,
            "check_every": 2,
            "checkpoint_every": 2,
            "device": "cpu",
            **changes,
        }
        return recover(RecoverConfig(**settings), QUIET)

    return recovered


# --------------------------------------------------------------------------- what is learned


def test_padding_and_the_rest_of_a_batch_change_no_stream_and_no_error(tmp_path):
    tokenizer = word_tokenizer()
    rows = [Row((text,), 0, "") for text in ("good film", "the plot was very " * 4)]
    together = encoded(rows, tokenizer, 32)
    model = tiny_encoder(tmp_path)
    tap = StatesTap(model)
    mixed = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    with torch.no_grad():
        for batch in (together, together[:1], together[1:]):
            model(**batch.inputs())
            streams = tap.take()
            assert len(streams) == model.config.num_hidden_layers + 1
            noisy = [stream @ mixed for stream in streams]
            real = SEQUENCE_CLASSIFICATION.real_tokens(batch)
            errors.append((float(stream_error(noisy, streams, torch.eye(32), real)), batch.tokens))
    assert tap.take() == []
    (both, tokens), *alone = errors
    assert both == pytest.approx(sum(error * count for error, count in alone) / tokens, rel=1e-4)


def test_the_objective_decides_what_was_not_asked_for(place):
    config = RecoverConfig(str(place / "small"), str(place / "dense"))
    found = resolved(config, SEQUENCE_CLASSIFICATION)
    recipe = SEQUENCE_CLASSIFICATION.recipe
    for name in ("temperature", "kl_weight", "hidden_weight"):
        assert getattr(found, name) == getattr(recipe, name) > 0
    assert found.lm_weight == 0
    asked = RecoverConfig("a", "b", temperature=1.5, hidden_weight=0.0)
    assert resolved(asked, SEQUENCE_CLASSIFICATION).temperature == 1.5
    assert resolved(asked, SEQUENCE_CLASSIFICATION).hidden_weight == 0


@pytest.mark.parametrize("name", ["train", "stop_text", "eval_text", "teacher_logits"])
def test_what_is_of_text_is_refused_where_the_record_names_the_task(name):
    config = RecoverConfig("a", "b", **{name: "x"})
    with pytest.raises(UserError, match=f"Expected no --{name.replace('_', '-')} for an encoder"):
        resolved(config, SEQUENCE_CLASSIFICATION)
    assert getattr(resolved(config, CAUSAL_LM), name) == "x"
    with pytest.raises(UserError, match="Expected an encoder for --task"):
        resolved(RecoverConfig("a", "b", task="sst2"), CAUSAL_LM)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.7])
def test_output_is_stock_nearer_to_the_teacher_and_says_how_it_answers(
    hidden_weight, run, place, tmp_path
):
    result = run(hidden_weight=hidden_weight)
    assert result.state.best_loss < result.state.held_out[0][1]
    out = tmp_path / "out"
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (out / BASIS).is_file()
    found, before = (json.loads((f / "config.json").read_text()) for f in (out, place / "small"))
    assert found == before
    (score,) = result.scores
    tokenizer, correct = word_tokenizer(), 0
    rows = (place / "task" / "validation.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        with torch.no_grad():
            logits = model(**tokenizer(row["sentence"], return_tensors="pt")).logits
        correct += int(logits.argmax()) == row["label"]
    assert score.small == pytest.approx(correct / len(rows))
    entry = json.loads((out / RECORD).read_text())["recoveries"][-1]
    assert entry["scores"][0]["small"] == score.small
    assert entry["evaluation"]["samples"] == len(rows)
    assert entry["settings"]["task"].startswith("sst2=")
    assert "perplexity" not in entry
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.eval_results[0].metric_type == "accuracy"


def test_sets_share_no_row(run):
    result = run(steps=None, lm_weight=0.1)
    training, stopping = result.training.documents, result.stopping.documents
    assert not training & stopping
    assert not (training | stopping) & result.held_out.documents
    assert result.training.tokens.labels is not None
    epochs = SEQUENCE_CLASSIFICATION.recipe.epochs
    assert result.state.step == -(-epochs * len(result.training.tokens) // 8)


def test_a_killed_run_continues_and_gives_the_same_bytes(run, tmp_path, monkeypatch):
    run(out="whole")
    step = _step

    def killed(setup, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(setup, number)

    monkeypatch.setattr(training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out="killed")
    monkeypatch.setattr(training, "_step", step)
    run(out="killed")
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_adapters_and_spans_are_recovered_too(tmp_path, run, monkeypatch):
    peft = pytest.importorskip("peft")
    with monkeypatch.context() as patch:  # as in the releases from 0.15 on
        called = peft.tuners.tuners_utils.BaseTuner
        patch.setattr(called, "forward", lambda self, *a, **k: self.model.forward(*a, **k))
        run(out="adapters", lora=2, steps=2)
    rows = [
        {"question": f"is {n} ?", "context": f"the film was {n} very", "answers": {
            "text": [str(n)], "answer_start": [13]}} for n in range(40)
    ]  # fmt: skip
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "spans" / f"{split}.jsonl", rows[:: 1 if split == "train" else 3])
    cut_neurons(tiny_encoder(tmp_path / "dense", "answers"), tmp_path / "small")
    result = run(
        model=str(tmp_path / "small"), teacher=str(tmp_path / "dense"),
        task=f"squad={tmp_path / 'spans'}", seq_len=24,
    )  # fmt: skip
    assert [score.metric for score in result.scores] == ["exact match", "F1"]
    assert result.state.best_loss < result.state.held_out[0][1]


def test_streams_are_compared_where_the_layers_that_stayed_were(place):
    pair = open_pair(RecoverConfig(str(place / "small"), str(place / "dense")), QUIET)
    assert stream_places(pair) == (0, 1, 2)
    config = {**pair.small.config, "num_hidden_layers": 1}
    shallow = replace(pair, small=replace(pair.small, config=config))
    with pytest.raises(UserError, match="or a record of those that stayed"):
        stream_places(shallow)
    record = SimpleNamespace(layers=(1,))
    with_record = type("Known", (Pair,), {"compression": record})
    known = with_record(**{f.name: getattr(shallow, f.name) for f in fields(Pair)})
    assert stream_places(known) == (0, 2)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Expected --task for 'small'"),
        (["--task", "sst3"], "Unknown task"),
        (["--task", "{task}", "--train", "stdlib"], "Expected no --train with --task"),
        (["--task", "{task}", "--teacher-logits", "x"], "Expected no --teacher-logits with --task"),
        (["--task", "{task}", "--seq-len", "64"], "Expected --seq-len of at most 32"),
        (["--task", "squad"], "Expected a task of classes, which the model predicts"),
        (["--task", "{task}", "--teacher", "{spans}"], "Expected a teacher that is for the same"),
        (["--task", "{task}", "--teacher", "{three}"], "Expected a teacher that predicts what"),
        (["--task", "{task}", "--kl-weight", "0", "--hidden-weight", "0"], "something to learn"),
    ],
)
def test_bad_input_is_one_sentence(words, expected, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_encoder(tmp_path / "spans", "answers")
    tiny_encoder(tmp_path / "three", num_labels=3)
    names = {"task": f"sst2={place / 'task'}"}
    names |= {name: tmp_path / name for name in ("spans", "three")}
    given = [word.format(**names) for word in words]
    teacher = [] if "--teacher" in given else ["--teacher", str(place / "dense")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["recover", str(place / "small"), *teacher, *given])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*recovered*"))


def test_what_the_layers_are_compared_through_must_be_there(place, run, tmp_path):
    shutil.copytree(place / "small", tmp_path / "small")
    (tmp_path / "small" / BASIS).unlink()
    with pytest.raises(UserError, match="give --hidden-weight 0"):
        run(model=str(tmp_path / "small"))
    run(model=str(tmp_path / "small"), hidden_weight=0.0, steps=1)
