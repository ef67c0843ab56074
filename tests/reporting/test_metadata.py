"""The metadata of model cards: the hub's own library reads from it what the record says."""

import json
import math
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from sp3llm.cli import main
from sp3llm.models.source import bundled_model
from sp3llm.reporting.card import model_card, write_card
from sp3llm.reporting.metadata import compressed_metadata, tuned_again
from sp3llm.reporting.record import Record, ScoreRow, Scores, add_to_record, read_record
from sp3llm.reporting.recovery import card_section, tuned_card
from sp3llm.text.sources import manifest
from tests.reporting.test_record import (
    VERSION_1,
    folder_with,
    raw,
    recovery_entry,
    with_config,
)

SCORES = Scores(
    rows=(
        ScoreRow("cloze", "acc,none", 400, small=0.58, dense=0.61),
        ScoreRow("gsm8k", "exact_match,strict-match", 10, small=1e-05),
        ScoreRow("gsm8k", "exact_match,flexible-extract", 10, small=0.25),
        ScoreRow("text", "token_perplexity", 9, small=None),
        ScoreRow("text", "word_perplexity,none", 9, small=math.inf),
    ),
    command="sp3llm score small --against dense --tasks 'cloze,gsm8k'",
)


@pytest.fixture(params=VERSION_1)
def record(request, tmp_path) -> Record:
    """A record: compressed; that and recovered; and quantized."""
    return read_record(folder_with(raw(request.param), tmp_path))


def loaded(card: str) -> ModelCardData:
    """Metadata of a card, as the hub's library reads it, which must lose nothing on the way."""
    data = ModelCard(card).data
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict() == data.to_dict()
    return data


def latest_perplexity(record: Record) -> float:
    if record.quantization:
        return record.quantization.models.small_quantized.perplexity
    return record.recoveries[-1].perplexity if record.recoveries else record.perplexity


def test_the_card_loads_as_the_hub_loads_it(record, tmp_path):
    record = replace(record, scores=SCORES, base_model="owner/name")
    write_card(tmp_path, record, None)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == loaded(model_card(record, {})).to_dict()
    index = metadata_load(tmp_path / "README.md")["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name.startswith(record.model)
    assert results == card.data.eval_results
    assert card.text.lstrip().startswith(f"# {record.model}")


def test_relation_is_quantized_exactly_for_few_bits(record):
    data = loaded(model_card(replace(record, base_model="owner/name"), {}))
    is_quantized = record.quantization is not None
    assert data.base_model == "owner/name"
    assert data.base_model_relation == ("quantized" if is_quantized else "finetune")
    assert ("bitsandbytes" in data.tags) == is_quantized
    assert {"sp3llm", "pruned"} <= set(data.tags)


def test_without_a_base_model_there_is_no_relation(record):
    assert record.base_model is None
    metadata = loaded(model_card(record, {})).to_dict()
    assert not {"base_model", "base_model_relation"} & set(metadata)


def test_model_index_holds_the_numbers_of_the_record(record):
    perplexity, *scores = loaded(model_card(replace(record, scores=SCORES), {})).eval_results
    assert perplexity.metric_type == "perplexity"
    assert perplexity.metric_value == latest_perplexity(record)
    text = record.recoveries[-1].evaluation if record.recoveries else record.evaluation
    assert perplexity.metric_name == f"perplexity (sp3llm, windows of {text.seq_len} tokens)"
    assert (perplexity.dataset_type, perplexity.dataset_split) == ("stdlib", "evaluation")
    assert {result.task_type for result in (perplexity, *scores)} == {"text-generation"}
    assert [(s.dataset_type, s.metric_type, s.metric_name, s.metric_value) for s in scores] == [
        ("cloze", "acc", "acc", 0.58),
        ("gsm8k", "exact_match", "exact_match,strict-match", 1e-05),
        ("gsm8k", "exact_match", "exact_match,flexible-extract", 0.25),
    ]  # what has no number is left out
    assert {score.source_name for score in scores} == {SCORES.command}


def test_scores_of_an_unknown_command_have_no_source(record):
    scores = replace(SCORES, command=None)
    *_, last = loaded(model_card(replace(record, scores=scores), {})).eval_results
    assert last.source_name is last.source_url is None


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["c4"], ("c4", "allenai/c4", "en", "validation", manifest()["c4"].revision)),
        (["alpaca"], ("alpaca", "tatsu-lab/alpaca", None, "train", manifest()["alpaca"].revision)),
        (["me/set:small"], ("me/set:small", "me/set", "small", "train", None)),
        (["/home/me/own.jsonl"], ("own.jsonl", "own.jsonl", None, None, None)),
        (["my/own.jsonl:body"], ("own.jsonl:body", "own.jsonl:body", None, None, None)),
        (["c4", "stdlib"], ("c4, stdlib", "allenai/c4, stdlib", None, None, None)),
    ],
)
def test_held_out_text_is_named_as_the_hub_names_it(sources, expected, tmp_path):
    record = read_record(folder_with(raw("record_v1"), tmp_path))
    record = replace(record, evaluation=replace(record.evaluation, sources=tuple(sources)))
    (result,) = loaded(compressed_metadata(record, {})).eval_results
    assert expected == (
        result.dataset_name,
        result.dataset_type,
        result.dataset_config,
        result.dataset_split,
        result.dataset_revision,
    )


def test_a_perplexity_that_is_no_number_is_left_out(tmp_path):
    record = read_record(folder_with(raw("record_v1"), tmp_path))
    metadata = loaded(model_card(replace(record, perplexity=math.inf), {})).to_dict()
    assert not {"model-index", "model_name"} & set(metadata)


def test_report_writes_the_same_metadata_and_adds_scores(record, tmp_path):
    folder = with_config(tmp_path)
    finite = tuple(row for row in SCORES.rows if row.small != math.inf)  # as JSON has it
    scores = replace(SCORES, rows=finite)
    record = add_to_record(folder, base_model="owner/name", scores=scores)
    write_card(folder, record, bundled_model())
    before = metadata_load(folder / "README.md")
    main(["report", str(folder)])
    assert metadata_load(folder / "README.md") == before
    assert before["license"] == metadata_load(bundled_model() / "README.md")["license"]
    comparison = folder / "comparison.json"
    row = {"task": "cloze", "metric": "acc,none", "samples": 4, "small": 0.75}
    content = {"command": "sp3llm score x", "model": folder.name, "rows": [row]}
    comparison.write_text(json.dumps(content))
    main(["report", str(folder), "--add", str(comparison)])
    perplexity, score = ModelCard.load(folder / "README.md").data.eval_results
    assert perplexity.metric_value == latest_perplexity(record)
    assert (score.metric_value, score.source_name) == (0.75, "sp3llm score x")


@pytest.mark.parametrize("base_model", [None, "owner/name"])
def test_a_card_of_a_tuned_model_follows_its_latest_recovery(base_model):
    entry, later = recovery_entry(), recovery_entry(perplexity=20.5)
    card = tuned_card("it", entry, base_model, {"license": "mit"})
    again = tuned_again(card, "it", later) + card_section(later)
    for text, value in ((card, entry.perplexity), (again, 20.5)):
        data = loaded(text)
        assert [result.metric_value for result in data.eval_results] == [value]
        assert data.license == "mit"
        assert data.tags == ["sp3llm"]  # nothing was pruned
        assert data.get("base_model") == base_model
        assert data.get("base_model_relation") == ("finetune" if base_model else None)
    assert again.count("## Recovered") == 2
