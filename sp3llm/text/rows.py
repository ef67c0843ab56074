"""The text of a row of a data set or a file: plain text, or a conversation as people keep them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sp3llm.errors import UserError, reason

Messages = list[dict[str, str]]
"""Turns of a conversation, `{"role": "user" | "assistant" | "system", "content": text}` each."""
Render = Callable[[Messages], str]
"""What makes a text of a conversation."""

_TEXT_COLUMNS = ("text", "content")
_MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
# Question and answer in columns of their own, with further input to the question in `input`.
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("instruction", "output")),
    *(("instruction", "response"), ("question", "answer"), ("query", "response")),
)
# Words in the names of columns that hold no text to read.
_LABELS = {
    *("id", "ids", "uid", "uuid", "guid", "key", "keys", "idx", "index", "no", "nr", "number"),
    *("hash", "sha", "sha1", "sha256", "md5", "digest", "checksum", "url", "urls", "uri", "link"),
    *("source", "path", "file", "filename", "filepath", "dataset", "subset", "split", "domain"),
    *("name", "label", "labels", "category", "class", "tag", "tags", "type", "kind", "topic"),
    *("lang", "language", "locale", "date", "time", "timestamp", "created", "updated", "version"),
    *("author", "user", "username", "email", "license", "licence", "image", "audio", "video"),
}
# What ShareGPT and its like call those who speak.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def plain_render(messages: Messages) -> str:
    """A conversation as lines that begin with who speaks: for tokenizers without a template."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


class RenderError(ValueError):
    """A chat template that does not take a conversation; says why."""


def chat_render(tokenizer: Any) -> Render:
    """What makes a text of a conversation in a tokenizer's chat template, where it has one.

    It raises RenderError where the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_render

    def render(messages: Messages) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates raise whatever their author wrote
            raise RenderError(f"{type(error).__name__}: {reason(error)}") from error

    return render


def text_of(row: Any, column: str | None, origin: str, render: Render = plain_render) -> str:
    """The text of a row: of the column named, or of one that is clearly meant.

    That is a column `text` or `content`; a conversation (`messages`, `conversations`); a prompt and
    its answer (`prompt` and `completion`, `instruction` and `output`, ...); or the only column of
    text, if it is not called like an identifier. A row whose text is null has none.

    `origin` says where the row stands, for refusals. Raises UserError where it is not clear which
    column is meant, or the one meant holds no text.
    """
    if isinstance(row, str):
        return _valid(row)
    if not isinstance(row, Mapping):
        raise UserError(
            f"Expected an object or a text in {origin}, found {_kind(row)}: mend it, or leave it "
            "out."
        )
    if column is not None:
        return _of_column(row, column, origin, render)
    for name in (*_TEXT_COLUMNS, *_MESSAGE_COLUMNS):
        if name in row:
            return _of_column(row, name, origin, render)
    for asked, answered in _PAIRS:
        turns = _pair(row, asked, answered)
        if turns is not None:
            return _rendered(turns, origin, render)
    strings = [name for name, value in row.items() if isinstance(value, str)]
    named = strings if len(row) > 1 else list(row)
    if len(named) == 1 and not _is_label(named[0]):
        return _of_column(row, named[0], origin, render)
    raise UserError(
        f"Expected a column that is clearly the text in {origin} (text, content, messages, "
        f"conversations, prompt and completion, ...), found columns {_listed(row)}: name the one "
        "that is meant, as file.jsonl:column."
    )


def _of_column(row: Mapping[str, Any], column: str, origin: str, render: Render) -> str:
    if column not in row:
        raise UserError(
            f"Expected a column '{column}' in {origin}, found columns {_listed(row)}: name one of "
            "these."
        )
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return _valid(value)
    turns = _turns(value)
    if turns is None:
        raise UserError(
            f"Expected text or a conversation in column '{column}' of {origin}, found "
            f"{_kind(value)}: mend it, or name another column, as file.jsonl:column."
        )
    return _rendered(turns, origin, render)


def _rendered(turns: Messages, origin: str, render: Render) -> str:
    """The text of a conversation. Raises UserError where the chat template does not take it."""
    try:
        return _valid(render(turns))
    except RenderError as error:
        raise UserError(
            f"The tokenizer's chat template does not take the conversation in {origin} ({error}): "
            "mend the row, or name a column of plain text instead, as file.jsonl:column."
        ) from error


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> Messages | None:
    """Question and answer, from columns of those names, as turns; None where they are none.

    Both may be conversations, too, of which the second goes on with the first.
    """
    question, answer, given = row.get(asked), row.get(answered), row.get("input")
    if isinstance(question, str) and isinstance(answer, str):
        if not (given is None or isinstance(given, str)):
            return None
        return [
            _turn("user", "\n\n".join(filter(None, (question, given)))),
            _turn("assistant", answer),
        ]
    before, after = _turns(question), _turns(answer)
    return None if before is None or after is None else [*before, *after]


def _is_label(column: str) -> bool:
    """Whether a column is called like what tells rows apart or where they are from."""
    words = re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", column)
    return not _LABELS.isdisjoint(word.lower() for word in words)


def _turns(value: Any) -> Messages | None:
    """The turns of a conversation, by the names of OpenAI's format or of ShareGPT's; None where it
    is none, or a turn of it has no text (an image, a call of a tool).
    """
    if not isinstance(value, list | tuple) or not value:
        return None
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        role = turn.get("role", turn.get("from"))
        content = _content(turn.get("content", turn.get("value")))
        if not (isinstance(role, str) and isinstance(content, str)):
            return None
        turns.append(_turn(_ROLES.get(role, role), content))
    return turns


def _content(content: Any) -> str | None:
    """What is said in a turn, as text or as a list of parts of text; None where it is something
    else.
    """
    if not isinstance(content, list | tuple):
        return content if isinstance(content, str) else None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    """What a value is, in words."""
    kinds: Iterable[tuple[Any, str]] = (
        (bool, "true or false"),
        ((int, float), "a number"),
        (Mapping, "an object"),
        ((list, tuple), "a list that is no conversation of text" if value else "an empty list"),
        (type(None), "null"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), type(value).__name__)


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _valid(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode(errors="replace").decode()
