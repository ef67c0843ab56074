"""Questions for lm-eval from the held-out documentation of the running Python: no network needed.

`stdlib_cloze` asks for the next word, the true one among three others; `stdlib_next` for the next
sentence, the true one among three from elsewhere. The documents are those of `sp3llm.text`'s
`evaluation` part, which neither the bundled models nor any calibration saw; only prose is taken.
The same Python gives the same questions.

python eval/tasks/questions.py DIR writes them to DIR as JSON lines, to be read.
"""

import json
import random
import re
import sys
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import Any

from sp3llm.text.split import content_hash, part_of
from sp3llm.text.stdlib import stdlib_documents

UNIT_SELECTIONS = 4
# Where the gap of a cloze question may be: this many words come before it.
_GAP = range(10, 80)
# A next sentence: how many words it has, how many sentences of context come before it and how many
# words these have at least, and how many questions a document gives at most.
_WORDS = range(6, 33)
_SENTENCES = 3
_FEWEST_CONTEXT_WORDS = 12
_A_DOCUMENT = 4

_ABBREVIATED = re.compile(r"(e\.g|i\.e|etc|vs|cf)\.$")


def paragraphs(document: str) -> list[str]:
    """The prose paragraphs of a document, white space collapsed; code, lists and tables are not."""
    found = []
    for block in re.split(r"\n\s*\n", document):
        lines = block.splitlines()
        text = " ".join(block.split())
        plain = sum(c.isalpha() or c in " ,.'-" for c in text)
        starts_well = re.match(r"[A-Z][a-z]* [a-z]", text)
        indented = any(line.startswith(" ") for line in lines)
        if starts_well and text.endswith(".") and not indented and plain >= 0.94 * len(text):
            found.append(text)
    return found


def sentences(paragraph: str) -> list[str]:
    """Its sentences."""
    found: list[str] = []
    for piece in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph):
        if found and _ABBREVIATED.search(found[-1]):
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


def prose() -> list[list[str]]:
    """Held-out documents as prose paragraphs, in an order of their own that no file name sets."""
    documents = sorted(
        (d for d in stdlib_documents() if part_of(d) == "evaluation"), key=content_hash
    )
    unique: dict[str, None] = {}
    found = []
    for document in documents:
        new = [p for p in paragraphs(document) if p not in unique]
        unique |= dict.fromkeys(new)
        if new:
            found.append(new)
    return found


def cloze_questions() -> list[dict[str, Any]]:
    """`context`, `choices` (words), `answer` (the index of the true one)."""
    texts = [paragraph for document in prose() for paragraph in document]
    counts = Counter(w for text in texts for w in re.findall(r"\b[a-z]{4,}\b", text))
    common = [word for word, count in counts.most_common() if count >= 3]
    rank = {word: at for at, word in enumerate(common)}
    alike: dict[str, list[str]] = {}
    for word in common:
        alike.setdefault(_form(word), []).append(word)
    questions = []
    for text in texts:
        rng = random.Random(content_hash(text))
        words = text.split()
        gaps = [at for at in range(len(words)) if at in _GAP and words[at] in rank]
        if not gaps:
            continue
        at = rng.choice(gaps)
        answer = words[at]
        # Words of the same form, and about as common.
        peers = [w for w in alike[_form(answer)] if w != answer]
        near = bisect_left([rank[w] for w in peers], rank[answer])
        peers = peers[max(0, near - 15) : near + 15]
        if len(peers) >= UNIT_SELECTIONS - 1:
            context = " ".join(words[:at])
            questions.append(
                _question(rng, context, answer, rng.sample(peers, UNIT_SELECTIONS - 1))
            )
    return questions


def next_sentence_questions() -> list[dict[str, Any]]:
    """`context`, `choices` (sentences), `answer` (the index of the true one)."""
    documents = [[s for p in document for s in sentences(p)] for document in prose()]
    documents = [d for d in documents if len(d) > 1]
    # By length, then by text: a set has another order in every process.
    pool = sorted(
        {s for d in documents for s in d if len(s.split()) in _WORDS}, key=lambda s: (len(s), s)
    )
    questions = []
    for document in documents:
        rng = random.Random(content_hash("\n".join(document)))
        ends = [at for at in range(1, len(document)) if len(document[at].split()) in _WORDS]
        for at in sorted(rng.sample(ends, min(_A_DOCUMENT, len(ends)))):
            context = " ".join(document[max(0, at - _SENTENCES) : at])
            if len(context.split()) < _FEWEST_CONTEXT_WORDS:
                continue
            answer = document[at]
            near = bisect_left(pool, len(answer), key=len)
            own = set(document)
            peers = [s for s in pool[max(0, near - 30) : near + 30] if s not in own]
            questions.append(
                _question(rng, context, answer, rng.sample(peers, UNIT_SELECTIONS - 1))
            )
    return questions


def _form(word: str) -> str:
    """A word's ending, as far as it says what part of speech it may be."""
    for ending in ("ing", "ed", "ly", "tion", "able", "ss", "s"):
        if word.endswith(ending):
            return ending
    return ""


def _question(rng: random.Random, context: str, answer: str, others: list[str]) -> dict[str, Any]:
    choices = [answer, *others]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(answer)}


def cloze(most: int | None = None, **_: Any) -> dict[str, Any]:
    """What `stdlib_cloze.yaml` asks for; `most` questions where its `dataset_kwargs` say so.

    lm-eval passes the task's metadata along.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(cloze_questions()[:most])}


def next_sentence(most: int | None = None, **_: Any) -> dict[str, Any]:
    """What `stdlib_next.yaml` asks for, likewise."""
    from datasets import Dataset

    return {"test": Dataset.from_list(next_sentence_questions()[:most])}


def main() -> None:
    """Write the questions to the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in (
        ("stdlib_cloze", cloze_questions()),
        ("stdlib_next", next_sentence_questions()),
    ):
        lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{len(questions)} questions in {folder / name}.jsonl")


if __name__ == "__main__":
    main()
