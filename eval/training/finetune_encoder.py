"""Fine-tune an encoder on a task, as dense models and teachers are made: transformers' Trainer.

    python eval/training/finetune_encoder.py --model MINILM --task sst2=FOLDER --out DIR
    python eval/training/finetune_encoder.py --model bert-base-uncased --task sst2 --out DIR \
        --epochs 3 --lr 2e-5

`--task` is that of `sp3llm score`. A sixteenth of the training rows, told by their content, is kept
apart: the epoch whose weights are written is the one that answers those best. The validation rows
are looked at once, in the end. What is printed last, `finetuning.json` in the folder holds too.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from sp3llm.evaluation.task_answers import answers_of
from sp3llm.evaluation.task_metrics import metrics_of
from sp3llm.evaluation.task_scores import reported, row_length, score_rows
from sp3llm.models.objectives.question_answering import QUESTION_ANSWERING
from sp3llm.models.objectives.sequence_classification import SEQUENCE_CLASSIFICATION
from sp3llm.runtime.machine import machine, versions
from sp3llm.text.examples import Examples
from sp3llm.text.labels import Labels, class_numbers
from sp3llm.text.task_sets import drawn
from sp3llm.text.tasks import CLASSES, SPAN, VALUE, resolve_task, task_for

_EVERY_ROW = 2**40
_ROWS_AT_ONCE = 64


class _Rows(torch.utils.data.Dataset):
    """Examples, for a Trainer: row by row."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._examples[number : number + 1]
        return {**{name: ids[0] for name, ids in row.inputs().items()}, "labels": row.labels[0]}


def _collate(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """A batch padded at the end; labels of spans under the names that the class wants."""
    fills = {"input_ids": pad_token_id}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=fills.get(name, 0)
        )
        for name in rows[0]
        if name != "labels"
    }
    labels = torch.stack([row["labels"] for row in rows])
    if labels.ndim == 2:
        return {**batch, "start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    return {**batch, "labels": labels}


def _model(options: argparse.Namespace, kind: str, names: tuple[str, ...]) -> Any:
    """The model with a head for the task, drawn at random."""
    if kind == SPAN:
        return QUESTION_ANSWERING.stock_class().from_pretrained(options.model)
    problem = "regression" if kind == VALUE else "single_label_classification"
    return SEQUENCE_CLASSIFICATION.stock_class().from_pretrained(
        options.model,
        problem_type=problem,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )


def main() -> None:
    options = parsed()
    task = resolve_task(options.task)
    kind = task.kind or (VALUE if options.value else CLASSES)
    task = task_for(options.task, kind)
    names = task.label_names or tuple(options.labels.split(","))
    if kind != CLASSES:
        names = ("LABEL_0",) if kind == VALUE else ("start", "end")
    labels, objective = Labels(kind, names), SEQUENCE_CLASSIFICATION
    if kind == SPAN:
        objective = QUESTION_ANSWERING
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = _model(options, kind, names)
    length = row_length(task, model.config.to_dict(), tokenizer, options.seq_len)
    held_out = reported(task, labels, tokenizer, length)
    shared = (tokenizer, _EVERY_ROW, length, options.seed, held_out.documents)
    training, stopping = (drawn(task, *shared, part, labels) for part in (False, True))
    (first, *_) = metrics_of(task, labels, class_numbers(task, labels)[-1])

    def figures(found: Any) -> dict[str, float]:
        answers = found.predictions.argmax(-1) if kind == CLASSES else found.predictions[:, 0]
        return {"figure": first.figure(list(zip(answers, found.label_ids, strict=True)))}

    arguments = TrainingArguments(
        str(options.out) + ".work",
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=_ROWS_AT_ONCE,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss" if kind == SPAN else "figure",
        greater_is_better=kind != SPAN,
        seed=options.seed,
        data_seed=options.seed,
        warmup_steps=options.warmup,
        weight_decay=0.01,
        logging_steps=50,
        report_to=[],
        label_names=["start_positions", "end_positions"] if kind == SPAN else None,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=_Rows(training.tokens),
        eval_dataset=_Rows(stopping.tokens),
        data_collator=lambda rows: _collate(rows, tokenizer.pad_token_id),
        compute_metrics=None if kind == SPAN else figures,
    )
    trainer.train()
    model = trainer.model.eval()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    answers = {
        name: answers_of(model, objective, questions, _ROWS_AT_ONCE)
        for name, questions in held_out.splits.items()
    }
    kept = [log for log in trainer.state.log_history if "eval_loss" in log]
    record = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "rows": {"training": training.describe(), "kept apart": stopping.describe()},
        "kept apart, by epoch": kept,
        "best checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
        "validation": [row.describe() for row in score_rows(held_out, answers, None)],
        "versions": versions(),
        "machine": machine(str(model.device)),
    }
    text = json.dumps(record, indent=2) + "\n"
    (options.out / "finetuning.json").write_text(text, encoding="utf-8")
    shutil.rmtree(arguments.output_dir)  # checkpoints, three times the model each
    print(json.dumps(record["validation"], indent=2))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--task", required=True, help="as for sp3llm score")
    parser.add_argument("--labels", default="LABEL_0,LABEL_1", help="of a file: what classes are")
    parser.add_argument("--value", action="store_true", help="of a file: its labels are values")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warmup", type=float, default=0.06, help="fraction of the steps")
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
