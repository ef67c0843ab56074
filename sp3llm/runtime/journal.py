"""What survives a killed run: every finished stage and layer, on disk, with its hash.

A journal is a folder of safetensors files and a manifest that names them. A file is written under
another name, brought to the disk, renamed, and only then named in the manifest, which is replaced
the same way: at every moment the manifest speaks of whole files only. What is damaged afterwards
shows by its hash and counts as never written.

Every process of a run has a journal of its own; a stage continues from the last step that all of
them have.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sp3llm.errors import ResumableError
from sp3llm.runtime.files import (
    file_hash,
    read_tensors,
    rename_durably,
    write_durably,
    write_tensors,
)
from sp3llm.runtime.processes import Ranks

MANIFEST = "manifest.json"
REPLACING = "next-"
"""What the name of a file begins with that is to take another's place."""
# Time spent on keeping what may be needed again, as a share of the time spent on everything: a run
# that is never killed loses a sixtieth, one that is killed repeats sixty times what a save takes.
_SHARE_OF_TIME = 1 / 60
# Steps of a stage that are kept: the last, and the one before in case the last is damaged or
# another process has not come as far.
_STEPS_KEPT = 2


@dataclass(frozen=True)
class Saved:
    """A step of a stage that was finished before."""

    step: int
    facts: dict[str, Any]
    """Whatever was saved beside the tensors, from JSON."""
    tensors: Mapping[str, Tensor]
    """Mapped from their file: nothing is read before it is looked at."""


@dataclass
class _Clock:
    """When saving pays."""

    started: float = field(default_factory=time.monotonic)
    saving: float = 0.0


@dataclass(frozen=True)
class Journal:
    """The durable state of one process of a run; without a folder it keeps nothing."""

    folder: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By `stage@step`: file, hash and facts. The manifest's content."""
    whole: set[Path] = field(default_factory=set)
    """Files whose hash was looked at, or that this process wrote."""
    say: Callable[[str], None] = print
    clock: _Clock = field(default_factory=_Clock)

    def due(self) -> bool:
        """Whether less than a sixtieth of the time since the run began was spent on saving.

        All processes get the first one's answer. What has to be done again after a kill is so
        never more than some sixty times what saving takes.
        """
        if self.folder is None:
            return False
        clock = self.clock
        spent = time.monotonic() - clock.started
        return self.ranks.from_first(lambda: clock.saving <= _SHARE_OF_TIME * spent)

    def save(
        self,
        stage: str,
        step: int,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a step durable; of the stage's earlier ones only the last is kept.

        `facts` is whatever JSON can hold. The tensors may lie on any device; nothing is copied as
        a whole.
        """
        if self.folder is None:
            return
        started = time.monotonic()
        name = f"{stage}@{step}"
        self.entries[name] = self._written(self._file(stage, step), tensors, facts)
        outdated = self.steps(stage)[:-_STEPS_KEPT]
        # Also where nothing is outdated: this is what names the new step.
        self._forget([f"{stage}@{earlier}" for earlier in outdated])
        self.clock.saving += time.monotonic() - started

    def add(
        self, stage: str, step: int, tensors: Mapping[str, Tensor], path: Path | None = None
    ) -> None:
        """Make a step durable beside all others of its stage, as part of the result.

        The tensors go to a file in the journal's folder, or to `path`. It is written once, whatever
        is due, so the time that it takes does not count as spent on saving.
        """
        if self.folder is None:
            return
        name, path = f"{stage}@{step}", path or self._file(stage, step)
        if name in self.entries:
            self._replace(name, path, tensors)
            return
        self.entries[name] = self._written(path, tensors, None)
        self._write_manifest()

    def _replace(self, name: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Put a file in the place of an entry's: while it is renamed the manifest knows both, so
        that whichever is there counts as whole.
        """
        aside = path.with_name(f"{REPLACING}{path.name}")
        entry, digest = self.entries[name], write_tensors(aside, tensors)
        self.entries[name] = {**entry, "next": digest}
        self._write_manifest()
        rename_durably(aside, path)
        self.entries[name] = {"facts": entry["facts"], "file": entry["file"], "sha256": digest}
        self.whole.add(path)
        self._write_manifest()

    def _file(self, stage: str, step: int) -> Path:
        return self.folder / f"{stage}-{step:05d}.safetensors"

    def _written(
        self,
        path: Path,
        tensors: Mapping[str, Tensor] | None,
        facts: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The manifest's entry for a step whose tensors this writes to `path`."""
        # As they are now: the caller's lists may grow before the manifest is written again.
        entry: dict[str, Any] = {"facts": json.loads(json.dumps(dict(facts or {})))}
        if tensors is not None:
            entry["file"] = os.path.relpath(path, self.folder)
            entry["sha256"] = write_tensors(path, tensors)
            self.whole.add(self.folder / entry["file"])
        return entry

    def keep(self, stage: str, step: int, tensor: Tensor) -> Tensor:
        """Make a tensor durable and return it as mapped from its file, where it takes no memory."""
        if self.folder is None:
            return tensor.clone()
        self.add(stage, step, {"kept": tensor})
        return self.kept(stage, step)

    def kept(self, stage: str, step: int) -> Tensor:
        """What `keep` kept."""
        return read_tensors(self.folder / self.entries[f"{stage}@{step}"]["file"])["kept"]

    def leading(self, stage: str) -> int:
        """How many steps of a stage, from 0 on without a gap, every process has whole."""
        count = 0
        while self.load(stage, count) is not None:
            count += 1
        return min(self.ranks.all_gather(count))

    def steps(self, stage: str) -> list[int]:
        """Steps of a stage that the manifest names, rising."""
        names = (name.split("@") for name in self.entries)
        return sorted(int(step) for named, step in names if named == stage)

    def load(self, stage: str, step: int) -> Saved | None:
        """A step, if it was saved and is whole."""
        entry = self.entries.get(f"{stage}@{step}")
        if entry is None:
            return None
        if "file" not in entry:
            return Saved(step, entry["facts"], {})
        path = self.folder / entry["file"]
        known = (entry["sha256"], entry.get("next"))
        if path not in self.whole and file_hash(path) not in known:
            self.say(f"{entry['file']}, saved by the run before, is damaged; its work is redone.")
            self._forget([f"{stage}@{step}"])
            return None
        self.whole.add(path)
        return Saved(step, entry["facts"], read_tensors(path))

    def latest(self, stage: str, most: int | None = None) -> Saved | None:
        """The last step of a stage that every process has whole, none beyond `most`."""
        if self.folder is None:
            return None
        whole = [
            step
            for step in self.steps(stage)
            if (most is None or step <= most) and self.load(stage, step) is not None
        ]
        common = set(whole).intersection(*self.ranks.all_gather(whole))
        return self.load(stage, max(common)) if common else None

    def drop(self, *stages: str) -> None:
        """Forget stages that are no longer needed."""
        names = [name for name in self.entries if name.split("@")[0] in stages]
        if names:
            self._forget(names)

    def drop_steps(self, stage: str, steps: Iterable[int]) -> None:
        """Forget steps of a stage that are no longer needed."""
        names = [name for step in steps if (name := f"{stage}@{step}") in self.entries]
        if names:
            self._forget(names)

    def _forget(self, names: list[str]) -> None:
        """Take entries from the manifest, write it, and only then remove their files."""
        gone = [self.entries.pop(name) for name in names]
        self._write_manifest()
        for entry in gone:
            if "file" in entry:
                self.whole.discard(self.folder / entry["file"])
                (self.folder / entry["file"]).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        text = json.dumps(self.entries)
        write_durably(self.folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


NOTHING_KEPT = Journal()
"""For whoever has no run to continue."""


def open_journal(
    folder: Path, identity: Mapping[str, Any], ranks: Ranks, say: Callable[[str], None]
) -> Journal:
    """Continue what is in `folder`, or begin it.

    `identity` is everything that the result depends on, as JSON has it. Where one of several
    processes has nothing to continue, as on a host that was not there before, all begin.

    Raises ResumableError, naming what differs, if the run in `folder` was begun with another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, ranks, _entries(folder / MANIFEST, say), say=say)

    def continues() -> bool:
        began = journal.load("identity", 0)
        if began is not None and began.facts != identity:
            raise ResumableError(_difference(began.facts, identity))
        return began is not None

    all_continue = ranks.all_gather(ranks.in_all(continues))
    if all(all_continue):
        if ranks.is_first:
            say("Continuing the run that was begun with this command (--fresh starts over).")
        return journal
    if ranks.is_first and any(all_continue):
        say("Not every process finds what the run before has saved; starting over.")
    for path in folder.iterdir():
        path.unlink()
    journal.entries.clear()
    journal.save("identity", 0, facts=identity)
    return journal


def _entries(manifest: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """What a manifest holds; nothing, and a line that says so, where it is damaged."""
    if not manifest.exists():
        return {}
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        if isinstance(entries, dict) and all("facts" in entry for entry in entries.values()):
            return entries
    except (ValueError, TypeError):
        pass
    say("What the run before has saved is damaged (its manifest is torn); starting over.")
    return {}


def _difference(began: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The sentence that names the first setting in which two runs differ."""
    key = next(
        key for key in (*began, *asked) if began.get(key, "nothing") != asked.get(key, "nothing")
    )
    return (
        f"An unfinished run stands in the way, begun with {key} {began.get(key)}, found "
        f"{asked.get(key)}: give its own command to continue it, or --fresh to start over."
    )
