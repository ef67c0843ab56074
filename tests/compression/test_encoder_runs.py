"""`sp3llm compress --task`: whole runs on tiny encoders, as users have them."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertModel

from sp3llm.cli import main
from sp3llm.compression import sentences, stages
from sp3llm.compression.story import compress
from sp3llm.models.families import count_layer_matrices, family_of
from sp3llm.options import CompressConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits
from sp3llm.reporting.origins import find_dense
from sp3llm.reporting.record import read_record
from tests.helpers import QUIET, WITHOUT_SP3LLM
from tests.tasks import opinion_folder, opinions, tiny_encoder, word_tokenizer, write_jsonl

pytest.importorskip("sklearn")

ANSWER_ELSEWHERE = (
    WITHOUT_SP3LLM
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = sys.argv[1]
model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
assert not {k: v for k, v in info.items() if v}, info
batch = AutoTokenizer.from_pretrained(folder)(["the film is good", "dull"], padding=True)
with torch.no_grad():
    logits = model(**{k: torch.tensor(v) for k, v in batch.items()}).logits
save_file({"logits": logits}, folder + "/elsewhere.safetensors")
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny encoder and a task."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_encoder(folder / "dense")
    opinion_folder(folder / "task")
    return folder


def settings(place, out, **changes):
    base = {"keep": 0.4, "of": "encoder", "report": False, "task": f"sst2={place / 'task'}"}
    return CompressConfig(model=str(place / "dense"), out=out, **{**base, **changes})


def test_a_run_gives_a_stock_encoder_within_the_budget(place, tmp_path):
    result = compress(settings(place, tmp_path / "small", report=True), QUIET)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    dense = json.loads((place / "dense" / "config.json").read_text())
    family = family_of(config)
    kept = count_layer_matrices(family, config) / count_layer_matrices(family, dense)
    assert kept <= 0.4
    assert result.plan.keep == pytest.approx(kept)
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["hidden_size"] % config["num_attention_heads"] == 0
    record = json.loads((tmp_path / "small" / "sp3llm.json").read_text())
    assert [figure["metric"] for figure in record["answers"]] == ["accuracy"]
    assert "validation rows" in (tmp_path / "small" / "README.md").read_text()
    assert "validation rows" in (tmp_path / "small" / "report.html").read_text()
    program = [sys.executable, "-c", ANSWER_ELSEWHERE, str(tmp_path / "small")]
    subprocess.run(program, check=True, env={"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"})
    elsewhere = load_file(tmp_path / "small" / "elsewhere.safetensors")["logits"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    batch = tokenizer(["the film is good", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, elsewhere)


def test_a_run_that_stopped_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    from sp3llm.runtime.journal import Journal

    monkeypatch.setattr(Journal, "due", lambda self: True)
    changes = {"hidden_size": 16, "intermediate_size": 32, "keep": 0.5}
    compress(settings(place, tmp_path / "whole", **changes), QUIET)
    built, left = stages.build, [2]

    def dies(*args, **kwargs):
        from sp3llm.models import export

        written = export._write_group

        def count(*group):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return written(*group)

        with monkeypatch.context() as patch:
            patch.setattr(export, "_write_group", count)
            return built(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("sp3llm.compression.story.build", dies)
        with pytest.raises(KeyboardInterrupt):
            compress(settings(place, tmp_path / "again", **changes), QUIET)
    compress(settings(place, tmp_path / "again", **changes), QUIET)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_plan_counts_the_encoder_from_the_config_alone(place, capsys):
    main(["plan", str(place / "dense"), "--keep", "0.4", "--of", "encoder", "--json"])
    plan = json.loads(capsys.readouterr().out)
    config = json.loads((place / "dense" / "config.json").read_text())
    dense = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert count_layer_matrices(family_of(config), config) == dense
    assert all(0 < shape["encoder"] <= 0.4 * dense for shape in plan["shapes"])
    assert all(shape["kv_cache"] == 0 for shape in plan["shapes"])


def test_bert_base_at_six_percent_has_a_shape():
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    shapes = candidates(family_of(config), config, Limits(0.06, of="encoder"))
    assert all(s.hidden_size == s.num_attention_heads * s.head_dim for s in shapes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--of", "encoder"], "Expected --task for a BertForSequenceClassification"),
        (["--task", "{task}", "--of", "kv-cache"], "which has no KV cache"),
        (["--task", "{task}", "--calib", "stdlib"], "Expected no --calib with --task"),
        (["--task", "{task}", "--turn", "hadamard"], "Expected --turn none with --task"),
        (["--task", "{task}", "--vocab-from", "stdlib"], "Expected no --vocab-from with --task"),
        (["--task", "nothing"], "Unknown task 'nothing'"),
        (["--task", "squad"], "Expected a task of classes"),
    ],
)
def test_what_an_encoder_is_not_asked_for_is_refused(words, said, place, refused, tmp_path):
    words = [word.format(task=f"sst2={place / 'task'}") for word in words]
    told = refused("compress", place / "dense", "--out", tmp_path / "out", *words)
    assert said in told


def test_too_few_rows_to_try_shapes_on_are_refused(place, refused, tmp_path):
    opinion_folder(tmp_path / "task", train=3)
    words = ("--task", f"sst2={tmp_path / 'task'}", "--keep", "0.4", "--of", "encoder")
    told = refused("compress", place / "dense", "--out", tmp_path / "out", *words)
    assert "Expected at least 4 training rows to calibrate on in 'sst2=" in told


def test_rows_to_be_reported_on_with_tokens_of_another_model_are_refused(refused, tmp_path):
    tiny_encoder(tmp_path / "dense", vocab_size=len(word_tokenizer()) - 1)  # none for "59"
    write_jsonl(tmp_path / "task" / "train.jsonl", opinions(50, 1))
    write_jsonl(tmp_path / "task" / "validation.jsonl", opinions(60, 2))
    words = ("--task", f"sst2={tmp_path / 'task'}", "--keep", "0.4", "--of", "encoder")
    told = refused("compress", tmp_path / "dense", "--out", tmp_path / "out", *words)
    assert "Expected token ids below the model's vocab_size" in told


def test_a_decoder_has_no_task_and_no_encoder(refused, tmp_path):
    assert "Expected an encoder for --task" in refused(
        "compress", "--task", "sst2", "--out", tmp_path / "out"
    )
    assert "which has no encoder" in refused("plan", "--of", "encoder")


def test_a_sentence_encoder_keeps_its_pooling_and_most_of_its_cosines(place, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    dense = tmp_path / "dense"
    AutoModel.from_pretrained(place / "dense").save_pretrained(dense)
    AutoTokenizer.from_pretrained(place / "dense").save_pretrained(dense)
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (dense / "modules.json").write_text(json.dumps(modules))
    (dense / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (dense / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    words = {"keep": 0.6, "of": "encoder", "report": False, "task": f"sst2={place / 'task'}"}
    options = CompressConfig(model=str(dense), out=tmp_path / "small", hidden_size=24, **words)
    compress(options, QUIET)
    small = AutoModel.from_pretrained(tmp_path / "small")
    assert small.config.hidden_size == 24
    record = json.loads((tmp_path / "small" / "sp3llm.json").read_text())
    pearson, _ = record["answers"]
    assert (pearson["metric"], pearson["dense"]) == ("Pearson of cosines", 1.0)
    assert pearson["small"] > 0.9
    kept = json.loads((tmp_path / "small" / "1_Pooling" / "config.json").read_text())
    assert kept == {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
    assert json.loads((tmp_path / "small" / "modules.json").read_text()) == modules


def test_cosines_that_are_all_the_same_have_a_figure(monkeypatch):
    same = torch.ones(3, 3, dtype=torch.float64)
    monkeypatch.setattr(sentences, "_cosines", lambda *_: same)
    held_out = SimpleNamespace(tokens=None, sources=("sst2",))
    figures = sentences.cosine_figures(SimpleNamespace(dense=None), held_out, None, None)
    assert [figure.small for figure in figures] == [0.0, 0.0]


STATES_ELSEWHERE = (
    WITHOUT_SP3LLM
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModel

folder = sys.argv[1]
model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
assert not info["unexpected_keys"], info
assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}, info
with torch.no_grad():
    states = model(torch.tensor([[2, 5, 9, 3]])).last_hidden_state
save_file({"states": states}, folder + "/elsewhere.safetensors")
"""
)


@pytest.fixture(scope="module")
def pretrained(place):
    """A tiny encoder with a head for masked words."""
    folder = place / "pretrained"
    return folder, tiny_encoder(folder, "masked")


LEFT_OUT = "The head for masked words of this BertForMaskedLM is left out"


def test_of_a_pretrained_encoder_the_encoder_is_written(place, pretrained, tmp_path):
    folder, model = pretrained
    out = tmp_path / "small"
    told = io.StringIO()
    changes = {"report": True, "model": str(folder)}
    compress(replace(settings(place, out), **changes), Console(file=told, width=200))
    assert told.getvalue().count(LEFT_OUT) == 1
    assert "a BertModel, to fine-tune" in told.getvalue()
    program = [sys.executable, "-c", STATES_ELSEWHERE, str(out)]
    subprocess.run(program, check=True, env={"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"})
    found = load_file(out / "elsewhere.safetensors")["states"]
    small = BertModel.from_pretrained(out, add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(small(torch.tensor([[2, 5, 9, 3]])).last_hidden_state, found)
    record = read_record(out)
    assert record.architecture == "BertModel"
    assert record.plan.dense_parameters == model.base_model.num_parameters()
    assert record.plan.parameters == small.num_parameters()
    assert find_dense(record) == folder
    assert "AutoModel.from_pretrained" in (out / "README.md").read_text()


def test_the_plan_tells_of_a_head_that_is_left_out(pretrained, capsys):
    """And of a pooler, which `config.json` does not say whether there is one of."""
    folder, model = pretrained
    main(["plan", str(folder), "--keep", "0.4", "--of", "encoder"])
    told = " ".join(capsys.readouterr().out.split())
    assert told.count(LEFT_OUT) == 1
    counted = BertModel(model.config).num_parameters() - model.base_model.num_parameters()
    assert f"A pooler of {counted:,} parameters is counted" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress"], "Expected --task for a BertModel"),
        (["compress", "--task", "{task}", "--recover-steps", "9"], "BertModel, which has no head"),
        (["score", "--task", "{task}"], "fine-tune it on the task first"),
    ],
)
def test_a_pretrained_encoder_answers_nothing(words, said, place, pretrained, refused):
    words = [word.format(task=f"sst2={place / 'task'}") for word in words]
    assert said in refused(words[0], pretrained[0], *words[1:])


def test_few_bits_are_of_decoders(place, tmp_path, refused):
    compress(settings(place, tmp_path / "small"), Console(file=io.StringIO()))
    told = refused("quantize", tmp_path / "small", "--to", "int8")
    assert "Expected a decoder" in told
    assert "BertForSequenceClassification" in told


def test_modules_with_weights_of_their_own_are_refused(place, tmp_path, refused):
    from transformers import AutoModel

    AutoModel.from_pretrained(place / "dense").save_pretrained(tmp_path / "dense")
    modules = [{"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "dense" / "modules.json").write_text(json.dumps(modules))
    words = ("--task", f"sst2={place / 'task'}", "--out", tmp_path / "out")
    assert "found Dense, whose weights" in refused("compress", tmp_path / "dense", *words)
