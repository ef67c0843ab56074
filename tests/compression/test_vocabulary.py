"""A vocabulary that a text uses: what is exact is exact, and the rest is told of the same text."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sp3llm.compression import story
from sp3llm.compression import vocabulary_losses as vocabulary_losses_module
from sp3llm.compression.expected_tokens import _next_tokens, _texts, with_expected_tokens
from sp3llm.compression.job import Job
from sp3llm.compression.preparing import prepare
from sp3llm.compression.texts import read_texts, tokenizer_of
from sp3llm.compression.vocabulary_losses import _readings, text_of_losses, vocabulary_losses
from sp3llm.evaluation import perplexity
from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.models.checkpoint import open_model
from sp3llm.models.families import count_parameters
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.source import bundled_model
from sp3llm.options import CompressConfig
from sp3llm.recovery.teacher import LiveTeacher
from sp3llm.reporting.origins import held_out_text
from sp3llm.reporting.record import read_record
from sp3llm.reporting.tables import vocabulary_share
from sp3llm.runtime.journal import NOTHING_KEPT
from sp3llm.runtime.processes import Ranks
from sp3llm.runtime.progress import progress_bars
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.vocabulary.restricting import dense_rows, shared_rows
from sp3llm.vocabulary.spelling import spelling_of
from tests.conftest import save_model, tiny_model
from tests.helpers import QUIET, compress_tiny, weights

DOCS = Path(__file__).parents[2] / "docs"


def texts(folder: Path) -> dict[str, str]:
    """Text that says which tokens stay, and text that is held out, as options."""
    for name, page in (("used", "score.md"), ("held-out", "recover.md")):
        (folder / f"{name}.txt").write_text((DOCS / page).read_text())
    used, other = (str(folder / f"{name}.txt") for name in ("used", "held-out"))
    return {"vocab_from": used, "calib": used, "eval_text": other}


def with_more_text(folder: Path) -> dict[str, str]:
    """`texts`, and more that says which tokens stay than tells what they lose."""
    options = texts(folder)
    (folder / "more.txt").write_text((DOCS / "design.md").read_text())
    return {**options, "vocab_from": f"{options['vocab_from']},{folder / 'more.txt'}"}


def plain_losses(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of plain transformers, `(windows, tokens - 1)`, nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


# Where nothing else is to be cut, and where more is.
CASES = [
    ("llama", 0.9), ("llama-tied", 0.25), ("opt", 0.9), ("opt-projected", 0.3), ("phi3", 0.25),
    ("gemma", 0.9), ("mixtral", 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "keep"), CASES)
def test_result_is_stock_and_loses_what_is_recorded(variant, keep, tmp_path):
    size = None if keep == 0.9 else 830
    result = compress_tiny(variant, tmp_path, keep=keep, vocab_size=size, **texts(tmp_path))
    small, dense = tmp_path / "small", tmp_path / "dense"
    record, config = read_record(small), json.loads((small / "config.json").read_text())
    tokenizer, whole = (AutoTokenizer.from_pretrained(folder) for folder in (small, dense))

    # What was kept, and what it is called.
    assert record.vocabulary.tokens == len(tokenizer) < len(whole) == record.vocabulary.dense_tokens
    assert config["vocab_size"] == record.plan.shape.vocab_size >= len(tokenizer)
    assert config["vocab_size"] % 64 == 0
    for name in ("bos", "eos"):
        token = whole.convert_ids_to_tokens(
            tiny_model(variant).config.to_dict()[f"{name}_token_id"]
        )
        assert config[f"{name}_token_id"] == tokenizer.convert_tokens_to_ids(token)
    text = (tmp_path / "held-out.txt").read_text()
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == whole.decode(
        whole(text)["input_ids"], skip_special_tokens=True
    )

    # The budget is that of all of the dense model.
    before, family = open_model(dense)
    assert record.plan.dense_parameters == count_parameters(family, before.config)
    stored = sum(tensor.numel() for tensor in weights(small).values())
    assert record.plan.parameters == stored <= keep * record.plan.dense_parameters
    assert 0 < vocabulary_share(record) < 1
    assert record.plan.parameters <= record.vocabulary.parameters
    assert bool(record.trials or record.fits) == (keep < 0.9)
    if keep == 0.9:  # the dense model's own rows
        assert record.plan.parameters == record.vocabulary.parameters
        rows = shared_rows(whole.get_vocab(), tokenizer.get_vocab(), config["vocab_size"], 4096)
        table = weights(dense)[family.embedding]
        assert torch.equal(weights(small)[family.embedding], table[torch.tensor(rows)])
        assert weights(small).keys() == weights(dense).keys()

    # Losses of the same text, as plain transformers has them.
    held_out = held_out_text(record, small, dense)
    dense_sum = (plain_losses(dense, held_out.tokens) * held_out.same.dense_counted_WS).sum()
    small_sum = (plain_losses(small, held_out.small_tokens) * held_out.same.counted_WR).sum()
    counts, said = held_out.same.dense_tokens, record.same_text
    assert (said.dense_tokens, said.tokens) == (counts, held_out.same.tokens)
    assert (dense_sum / counts).exp().item() == pytest.approx(record.dense_perplexity, rel=1e-4)
    assert (small_sum / counts).exp().item() == pytest.approx(record.perplexity, rel=1e-4)
    excess = ((small_sum - dense_sum) / counts).item()
    assert record.excess_log_perplexity.mean == pytest.approx(excess, abs=1e-4)
    bits = small_sum.item() / torch.tensor(2.0).log().item() / said.bytes
    assert said.bits_a_byte["small"] == pytest.approx(bits, rel=1e-4)
    assert result.excess.mean == record.excess_log_perplexity.mean


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt"])
def test_tokens_that_are_all_kept_cost_what_renormalising_gains(variant, tmp_path):
    options = texts(tmp_path)
    both = "".join(Path(options[name]).read_text() for name in ("calib", "eval_text"))
    (tmp_path / "both.txt").write_text(both)
    options["vocab_from"] = str(tmp_path / "both.txt")
    compress_tiny(variant, tmp_path, keep=0.9, **options)
    small, dense = tmp_path / "small", tmp_path / "dense"
    record = read_record(small)
    held_out = held_out_text(record, small, dense)
    ids = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (dense, small)]
    rows = torch.tensor(shared_rows(*ids, record.plan.shape.vocab_size, 4096))
    kept = rows[held_out.small_tokens]
    assert torch.equal(kept, held_out.tokens)
    assert record.same_text.tokens == record.same_text.dense_tokens

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=kept).logits.double()
    gained = (logits[..., rows].logsumexp(-1) - logits.logsumexp(-1))[:, :-1].mean()
    assert record.excess_log_perplexity.mean == pytest.approx(gained.item(), abs=1e-5)
    assert record.excess_log_perplexity.mean < 0


def test_room_that_a_budget_has_is_for_tokens_that_the_text_might_have_used(tmp_path, capsys):
    """All that it uses stay, so many more as there is room for, and nothing else is cut."""
    from sp3llm.cli import main

    compress_tiny("llama", tmp_path, keep=0.9, **texts(tmp_path))
    record = read_record(tmp_path / "small")
    assert record.vocabulary.covered == 1
    assert record.vocabulary.tokens == record.plan.shape.vocab_size
    a_row = 2 * record.plan.shape.hidden_size  # untied
    room = 0.9 * record.plan.dense_parameters - record.plan.parameters
    assert 0 <= room < 64 * a_row
    assert not record.fits
    options = texts(tmp_path)
    main(["plan", str(tmp_path / "dense"), "--keep", "0.9", "--vocab-from", options["vocab_from"]])
    tokens = f"{record.vocabulary.dense_tokens:,} -> {record.vocabulary.tokens:,} tokens"
    assert tokens in " ".join(capsys.readouterr().out.split())


def test_size_is_what_was_asked_for_and_more_text_becomes_more_tokens(tmp_path):
    compress_tiny("llama", tmp_path, keep=0.9, vocab_size=520, **texts(tmp_path))
    record = read_record(tmp_path / "small")
    assert 500 < record.vocabulary.tokens <= 520
    assert record.vocabulary.covered < 1
    assert record.same_text.tokens > record.same_text.dense_tokens


def settled(model: Path, out: Path, options: dict[str, Any]) -> Job:
    settings = CompressConfig(
        model=str(model), out=out, keep=0.3, samples=6, seq_len=32, eval_samples=2, **options
    )
    return prepare(settings, Ranks(), "cpu", QUIET)


def test_what_fewer_tokens_lose_is_what_those_models_lose_of_other_text(tmp_path):
    model = tiny_model("opt", torch.float32, vocab_size=4096)
    save_model(model, tmp_path / "dense", tokenizer=True)
    job = settled(tmp_path / "dense", tmp_path / "out", texts(tmp_path))
    sizes = [one.kept.rows for one in job.vocabularies]
    assert len(sizes) > 2
    assert sizes == sorted(sizes, reverse=True)
    found = vocabulary_losses(job, NOTHING_KEPT, None)
    assert list(found) == sizes
    readings = _readings(job)
    nats = []
    for one, vocabulary in zip(readings, job.vocabularies, strict=True):
        tokens = one.text.small_tokens
        losses = measure_losses(one.dense, job.family, tokens, job.execution)
        nats.append(one.text.small_nats(losses).mean().item())
        # As many, and not chosen by the documents that are read.
        assert one.dense.config["vocab_size"] == vocabulary.kept.rows
        ids = vocabulary.kept.old_ids
        assert one.rows[: len(ids)].tolist() != list(ids)
    assert list(found.values()) == pytest.approx([loss - nats[0] for loss in nats], abs=1e-5)


class Journal:
    """A journal in memory."""

    def __init__(self) -> None:
        self.saved = {}

    def latest(self, stage):
        return self.saved.get(stage)

    def save(self, stage, step, tensors=(), facts=()):
        self.saved[stage] = SimpleNamespace(tensors=dict(tensors), facts=dict(facts))


def shown_nowhere() -> SimpleNamespace:
    """Of progress bars what a stage that needs no forward asks for."""
    return SimpleNamespace(console=QUIET)


def test_what_is_expected_next_is_what_plain_transformers_expects(tmp_path):
    for variant in ("llama", "opt-projected", "gemma"):
        folder = tmp_path / variant
        save_model(tiny_model(variant, torch.float32, vocab_size=4096), folder, tokenizer=True)
        job = settled(folder, tmp_path / "out", with_more_text(tmp_path))
        (text,) = _texts(job, searched=True)
        assert text.documents.isdisjoint(text_of_losses(job).documents)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(input_ids=text.tokens).logits.double().softmax(-1).sum(1)
        found = _next_tokens(job, text.tokens, None)
        torch.testing.assert_close(found.float(), expected.float())


def test_tokens_that_the_model_expects_stay_in_place_of_those_that_are_rare(tmp_path):
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), tmp_path / "dense", True)
    job = settled(tmp_path / "dense", tmp_path / "out", with_more_text(tmp_path))
    journal = Journal()
    with progress_bars(QUIET) as progress:
        asked = with_expected_tokens(job, journal, progress)
    wanted, before = asked.vocabularies[0].wanted, job.vocabularies[0].wanted
    assert torch.equal(wanted.shares, (before.shares + wanted.expected_V) / 2)
    assert wanted.expected_V.sum().item() == pytest.approx(1)
    assert asked.vocabulary is asked.vocabularies[0]
    for one, counted in zip(asked.vocabularies, job.vocabularies, strict=True):
        assert one.kept.rows == counted.kept.rows
        assert len(one.kept.old_ids) == len(counted.kept.old_ids)
        ours, theirs = (wanted.shares[list(v.kept.old_ids)].sum() for v in (one, counted))
        assert ours > theirs
    again = with_expected_tokens(job, journal, shown_nowhere())
    assert again.vocabularies == asked.vocabularies


def test_a_text_that_fills_no_window_is_counted_alone(tmp_path):
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), tmp_path / "dense", True)
    options = texts(tmp_path)
    (tmp_path / "few.txt").write_text("Twenty words are not enough.")
    few = {**options, "vocab_from": str(tmp_path / "few.txt"), "vocab_size": 600}
    job = settled(tmp_path / "dense", tmp_path / "out", few)
    assert with_expected_tokens(job, Journal(), shown_nowhere()) is job
    both = {**few, "vocab_from": f"{few['vocab_from']},{options['vocab_from']}"}
    job = settled(tmp_path / "dense", tmp_path / "out", both)
    with progress_bars(QUIET) as progress:
        assert with_expected_tokens(job, Journal(), progress).vocabulary.wanted.expected_V.any()


def test_fewer_tokens_are_taken_where_they_lose_less(tmp_path, monkeypatch):
    def favourable(job, *_):
        return {one.kept.rows: place * -9.0 for place, one in enumerate(job.vocabularies)}

    monkeypatch.setattr(vocabulary_losses_module, "vocabulary_losses", favourable)
    options = texts(tmp_path)
    compress_tiny("llama", tmp_path, keep=0.22, **options)
    small, dense = tmp_path / "small", tmp_path / "dense"
    record, tokenizer = read_record(small), AutoTokenizer.from_pretrained(small)
    rows = sorted({one.vocab_size for one in record.predictions})
    assert len(rows) > 2
    assert record.plan.shape.vocab_size == rows[0]
    assert record.plan.parameters <= 0.22 * record.plan.dense_parameters
    assert record.vocabulary.tokens == len(tokenizer) <= rows[0]
    held_out = held_out_text(record, small, dense)
    nats = held_out.small_nats(plain_losses(small, held_out.small_tokens))
    assert nats.mean().exp().item() == pytest.approx(record.perplexity, rel=1e-4)
    assert record.same_text.tokens == held_out.same.tokens


def content(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(files.pop("sp3llm.json"))
    for name in ("seconds", "peak_memory_bytes"):
        record.pop(name)
    return {**files, "record": json.dumps(record).encode()}


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    options = {"keep": 0.25, "vocab_size": 830, **texts(tmp_path)}
    compress_tiny("llama-tied", tmp_path, **options)
    expected = content(tmp_path / "small")
    shutil.rmtree(tmp_path / "small")
    measure = perplexity.measure_losses

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(perplexity, "measure_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        compress_tiny("llama-tied", tmp_path, **options)
    assert (tmp_path / "small.partial").is_dir()
    monkeypatch.setattr(perplexity, "measure_losses", measure)
    monkeypatch.setattr(story, "draw_texts", once_drawn(story.draw_texts))
    compress_tiny("llama-tied", tmp_path, **options)
    assert content(tmp_path / "small") == expected


def once_drawn(draw):
    """What draws text, which must find it in the journal."""

    def drawn(job, journal):
        assert journal.latest("text") is not None
        return draw(job, journal)

    return drawn


def test_a_teacher_answers_in_the_tokens_of_the_model_it_teaches(tokens):
    model = tiny_model("llama", torch.float32)
    rows = torch.randperm(96, generator=torch.Generator().manual_seed(2))[:40]
    objective = objective_of("LlamaForCausalLM")
    whole = LiveTeacher(model, objective, None, torch.device("cpu"))
    restricted = LiveTeacher(model, objective, None, torch.device("cpu"), rows)
    ids = tokens % 40
    expected, _ = whole.answers(rows[ids])
    found, _ = restricted.answers(ids)
    assert torch.equal(found, expected[..., rows])
    same, _ = restricted.divergence(expected[:, :-1, rows], ids[:, 0], ids, 2.0)
    assert same.item() == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_gives_a_word_to_the_pieces_that_spell_it(tmp_path):
    """On text with words that the vocabulary has lost it is a better model of fewer tokens than
    one that never begins such a word.
    """
    settings = CompressConfig(
        **texts(tmp_path),
        out=tmp_path / "out",
        keep=0.9,
        samples=4,
        seq_len=64,
        eval_samples=8,
        vocab_size=1000,
    )
    job = prepare(settings, Ranks(), "cpu", QUIET)
    _, held_out = read_texts(job)
    tokens, small = held_out.small_tokens, tokenizer_of(job, job.vocabulary)
    kept = job.vocabulary.kept
    whole = load_tokenizer(job.folder)
    rows = dense_rows(kept, job.original.config["vocab_size"])
    spelling = spelling_of(whole, small, rows)
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32).eval()
    answers = (model, job.objective, None, torch.device("cpu"), torch.tensor(rows))
    nats = []
    for teacher in (LiveTeacher(*answers), LiveTeacher(*answers, spelling)):
        logits = teacher.answers(tokens)[0][:, :-1].double().log_softmax(-1)
        losses = -logits.gather(-1, tokens[:, 1:, None])[..., 0]
        nats.append(held_out.small_nats(losses).mean().item())
    renormalised, spelled = nats
    assert spelled < 0.95 * renormalised


def test_what_will_not_do_is_refused_in_a_sentence(refused, tmp_path):
    options = texts(tmp_path)
    used, held_out = options["vocab_from"], options["eval_text"]
    message = refused("compress", "--vocab-size", 4000)
    assert "Expected --vocab-from with --vocab-size, found 4000 alone" in message
    assert "Expected --vocab-from" in refused("plan", "--vocab-size", 4000)
    message = refused("compress", "--vocab-from", used, "--mask", "learned")
    assert "Expected --mask closed-form with --vocab-from, found learned" in message
    message = refused("compress", "--vocab-from", f"{used},{held_out}", "--eval-text", held_out)
    assert "Expected other held-out text than that of --vocab-from" in message
    message = refused("compress", "--vocab-from", used, "--vocab-size", 9)
    assert "Expected a vocabulary of at least" in message
    (tmp_path / "nothing.txt").write_text("\n")
    assert "Expected text in" in refused("plan", "--vocab-from", tmp_path / "nothing.txt")
    assert "does not exist" in refused("plan", "--vocab-from", tmp_path / "gone.txt")


def test_plan_tells_what_a_vocabulary_saves(tmp_path, capsys):
    from sp3llm import plan
    from sp3llm.cli import main

    used = texts(tmp_path)["vocab_from"]
    whole, cut = plan(keep=0.5), plan(keep=0.5, vocab_from=used)
    assert cut.limits.vocab_rows == cut.describe()["vocabulary"]["rows"] < 4096
    assert {shape.vocab_size for shape in cut.shapes} == {cut.limits.vocab_rows}
    assert {shape.vocab_size for shape in whole.shapes} == {4096}
    widest = max(shape.hidden_size for shape in whole.shapes if shape.intermediate_size == 688)
    assert max(s.hidden_size for s in cut.shapes if s.intermediate_size == 688) > widest
    main(["plan", "--keep", "0.5"])
    line = " ".join(capsys.readouterr().out.split())
    assert "27 % of the dense model's parameters are the vocabulary; --vocab-from TEXT" in line
    main(["plan", "--keep", "0.5", "--vocab-from", used])
    line = " ".join(capsys.readouterr().out.split())
    assert "Vocabulary: 4,096 -> " in line
    assert "are the vocabulary" not in line


def test_recovery_learns_from_the_dense_model_and_is_told_of_the_same_text(tmp_path):
    from sp3llm import recover

    compress_tiny("llama", tmp_path, keep=0.25, **texts(tmp_path))
    before = read_record(tmp_path / "small")
    stored = tmp_path / "logits"
    options = {"steps": 2, "batch": 2, "seq_len": 16, "eval_samples": 4, "stop_windows": 2}
    options |= {"device": "cpu", "out": tmp_path / "tuned", "teacher_logits": stored, "top_k": 64}
    recover(tmp_path / "small", tmp_path / "dense", **options)
    assert json.loads((stored / "teacher.json").read_text())["rows"]
    (entry,) = read_record(tmp_path / "tuned").recoveries
    assert entry.dense_perplexity == pytest.approx(before.dense_perplexity, rel=1e-6)
    assert entry.perplexity_before == pytest.approx(before.perplexity, rel=1e-6)
    assert entry.same_text.dense_tokens == before.same_text.dense_tokens
    assert entry.same_text.bits_a_byte["before"] == pytest.approx(
        before.same_text.bits_a_byte["small"], rel=1e-6
    )


def test_a_teacher_with_fewer_tokens_is_refused(refused, tmp_path):
    compress_tiny("llama", tmp_path, keep=0.9, **texts(tmp_path))
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), tmp_path / "other")
    for file in bundled_model().glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    message = refused(
        "recover", tmp_path / "other", "--teacher", tmp_path / "small", "--out", tmp_path / "out"
    )
    assert "Expected a teacher with the vocabulary of 'other'" in message
