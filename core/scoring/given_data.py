"""Data given for an evaluation: are they those of the run, other ones, or some of both?

A clip of the run is known again by its place (path, start and end) and what is in its file. Equal
paths alone say nothing: the recordings of every season may be numbered from 1.
"""
from dataclasses import dataclass

import numpy as np

from data.clip_times import check_times
from data.content import UNKNOWN, content_keys
from data.manifest import DataError, Manifest
from data.prepare import MAX_CLIPS_TO_DECODE
from data.scan import Scan, scan
from data.sound_print import SHORT, matches
from util import plural, summarize

MAX_MIXED_SHARE = 0.05  # of the given clips, that may be of the other kind
SAME_LENGTH = 0.05  # seconds that a decoder may differ by
READINGS = ("same", "other")  # of --data-is


@dataclass
class Comparison:
    """The clips of given data beside those of a run. Rows are of the manifests."""
    given: Manifest  # with the run's classes; clips without any of them are left out
    unknown: list[str]  # classes that the run does not have
    n_unknown: int  # clips left out for them
    n_relabelled: int  # of these: with the place of a run's clip
    n_bad: int  # given clips that were unreadable in training
    pairs: list[tuple[int, int]]  # (row of the run, row given) with the same content and place
    n_agree: int  # of the pairs: with the same label
    n_label: int  # of the pairs: with another label
    n_content: int  # clips with the place of a run's clip, but another content
    n_new: int  # given clips whose place is none of the run's
    n_gone: int  # the run's clips whose place is none of the given ones
    by_content: bool  # whether files were compared, not only lengths and labels

    @property
    def same_share(self) -> float:
        """Share of the given clips that are clips of the run."""
        return len(self.pairs) / max(1, len(self.given) - self.n_bad)

    def reading(self) -> str | None:
        """"same" or "other" if the data are (nearly) all of one kind, else None."""
        if self.same_share >= 1 - MAX_MIXED_SHARE:
            return "same"
        return "other" if self.same_share <= MAX_MIXED_SHARE else None

    def counts(self) -> str:
        """The numbers in words."""
        words = [f"{plural(self.n_agree, 'clip')} agree with the run's"]
        parts = (("differ in label", self.n_label), ("differ in content", self.n_content),
                 ("are new", self.n_new), ("of the run are gone", self.n_gone),
                 ("have unknown classes", self.n_unknown))
        words += [f"{number} {text}" for text, number in parts if number]
        how = "" if self.by_content else " (by length and label only: the run's files are not here)"
        return ", ".join(words) + how


def compare_with_run(run: Manifest, given: Manifest, known_bad: frozenset[str]) -> Comparison:
    """Compare given data with the clips of a run.

    known_bad: paths that were unreadable in training; they do not count as new.
    """
    unknown = [name for name in given.classes if name not in run.classes]
    is_known = given.rows_with([name in run.classes for name in given.classes])
    places = {_place(run, row) for row in range(len(run))}
    n_relabelled = sum(_place(given, row) in places for row in np.flatnonzero(~is_known).tolist())
    given = in_classes_of(given, run)
    row_at = {_place(given, row): row for row in range(len(given))}
    shared = [(row, row_at[_place(run, row)]) for row in range(len(run))
              if _place(run, row) in row_at]
    same_label = [_label(run, a) == _label(given, b) for a, b in shared]
    is_same, by_content = _same_content(run, given, shared)
    if not by_content:  # a length is weak evidence, so the label has to agree as well
        is_same &= np.array(same_label, bool)
    pairs = [pair for pair, same in zip(shared, is_same, strict=True) if same]
    n_agree = sum(same and label for same, label in zip(is_same, same_label, strict=True))
    n_bad = sum(_place(given, row) not in places and path in known_bad
                for row, path in enumerate(given.paths))
    return Comparison(
        given, unknown, n_unknown=int((~is_known).sum()), n_relabelled=n_relabelled, n_bad=n_bad,
        pairs=pairs, n_agree=int(n_agree), n_label=len(pairs) - int(n_agree),
        n_content=len(shared) - len(pairs), n_new=len(given) - len(shared) - n_bad,
        n_gone=len(run) - len(shared) - n_relabelled, by_content=by_content)


def _place(manifest, row):
    """Path, start and end of a clip; times in ms, -1 for the end of the file."""
    end = float(manifest.end[row])
    return (manifest.paths[row], round(1000 * float(manifest.start[row])),
            -1 if np.isnan(end) else round(1000 * end))


def _label(manifest, row):
    """Label and unknown classes, in a form that can be compared."""
    if not manifest.multi_label:
        return int(manifest.labels[row])
    present, unknown = manifest.label_sets[manifest.label_set[row]]
    return tuple(sorted(present)), unknown


def _same_content(run, given, shared):
    """((k,) bool of the pairs, whether files and not only lengths were compared)."""
    mine = np.array([a for a, _ in shared], np.int64)
    theirs = np.array([b for _, b in shared], np.int64)
    paths = [given.paths[row] for row in theirs]
    keys = content_keys(given.root, paths)
    own = run.content[mine] if run.content is not None else content_keys(run.root, paths)
    is_known = (own != UNKNOWN) & (keys != UNKNOWN)
    if 2 * is_known.sum() >= len(shared):
        return is_known & (own == keys), True
    found = scan(given.select(theirs), None, full=False)
    return found.ok & (np.abs(found.duration - run.duration[mine]) <= SAME_LENGTH), False


def in_classes_of(given: Manifest, run: Manifest) -> Manifest:
    """Given data with the classes of a run and its kind of labels; other clips are left out.

    Raises DataError if clips have several labels and those of the run have one.
    """
    if run.multi_label and not given.multi_label:
        given = given.with_label_sets([((int(label),), ()) for label in given.labels])
    elif not run.multi_label and given.multi_label:
        if any(len(positives) > 1 for positives, _ in given.label_sets):
            raise DataError(f"--data {given.root}: has clips with several labels, but the "
                            "checkpoint was trained on clips with one; give clips with one label, "
                            "or a checkpoint trained with several")
        given = given.single_label()
    index = [run.classes.index(name) if name in run.classes else -1 for name in given.classes]
    return given.with_classes(run.classes, index)


def choose_reading(compared: Comparison, forced: str | None) -> str:
    """"same" or "other"; raises DataError if the data are some of both and nobody chose."""
    reading = forced or compared.reading()
    root = compared.given.root
    if reading is None:
        raise DataError(
            f"--data {root}: neither the run's own data nor other data: {compared.counts()}; give "
            "--data-is same for the run's split of the clips that agree, or --data-is other to "
            "score every clip given")
    if reading == "same" and not compared.pairs:
        raise DataError(f"--data-is same: no clip in {root} is one of the run's: "
                        f"{compared.counts()}; give the run's data, or --data-is other")
    if compared.unknown and (reading == "other" or compared.n_relabelled):
        raise DataError(
            f"--data: classes that the checkpoint does not know: {summarize(compared.unknown)}; it "
            f"knows {summarize(compared.given.classes)}; rename them or leave them out")
    return reading


def own_data(run: Manifest, compared: Comparison) -> tuple[Manifest, list[str]]:
    """The run's data in another place -> (its clips that are there, with the given labels; notes).

    The split of the run stays, or training clips would be tested.
    """
    given, pairs = compared.given, compared.pairs
    mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    manifest = run.select(mine)
    manifest.root = given.root
    if run.multi_label:
        label_sets = [tuple(given.label_sets[i]) for i in given.label_set[theirs]]
        manifest = manifest.with_label_sets(label_sets)
    else:
        manifest.labels = given.labels[theirs]
    notes = [f"data: {given.root}, the run's own data: its split is used",
             f"  {compared.counts()}"]
    if compared.n_label:
        notes.append(f"  the given labels are used: {compared.n_label} changed since training")
    n_ignored = compared.n_new + compared.n_content
    if n_ignored:
        notes.append(f"  {plural(n_ignored, 'clip')} not of the run, so not scored; --data-is "
                     "other scores every clip given")
    return manifest, notes


def other_data(run: Manifest, compared: Comparison) -> tuple[Manifest, list[str]]:
    """Every readable clip of other data -> (manifest without a split, notes)."""
    given = compared.given
    found = scan(given, None, full=False)
    check_times(given, found.file_seconds, found.rate, MAX_MIXED_SHARE)
    manifest, readable = readable_part(
        given, found, f"--data {given.root}: none of the {len(given)} files")
    manifest.split = np.full(len(manifest), -1, np.int8)
    notes = [f"data: {given.root}, all {len(readable)} clips (not the run's data)"]
    if compared.pairs or compared.n_content:
        notes.append(f"  {compared.counts()}")
    if len(readable) < len(given):
        notes.append(f"  {len(given) - len(readable)} unreadable files are left out")
    n_seen = count_seen(run, manifest, np.arange(len(manifest)))
    if n_seen:
        notes.append(f"LEAK: {n_seen} of {len(manifest)} clips were used in training or "
                     "validation of this checkpoint: the results are too good")
    notes += _describe_near(run, manifest)
    return manifest, notes


def readable_part(given: Manifest, found: Scan, none_of: str) -> tuple[Manifest, np.ndarray]:
    """The readable clips with their lengths -> (manifest, their rows in `given`).

    none_of: the beginning of the line if there are none: DataError.
    """
    rows = np.flatnonzero(found.ok)
    if len(rows) == 0:
        raise DataError(f"{none_of} can be read; the first: {given.paths[0]}: {found.reasons[0]}")
    readable = given.select(rows)
    readable.duration = found.duration[rows]
    return readable, rows


def _describe_near(run, given):
    """Lines on given clips that sound like recordings of the run, in another format or rate."""
    if run.sound is None:
        return ["  copies in another format or rate are not looked for: the run has no prints of "
                "its recordings (train.py --scan full makes them)"]
    if len(given) > MAX_CLIPS_TO_DECODE:
        return [f"  copies in another format or rate are not looked for in {len(given)} clips"]
    prints = scan(given, None, full=True).prints
    if prints is None:
        return []
    used = np.concatenate([run.rows("train"), run.rows("val")])
    match = matches(prints, run.sound[used].view(SHORT))
    rows = np.flatnonzero(match >= 0)
    if len(rows) == 0:
        return []
    examples = [f"{given.paths[row]} = {run.paths[used[match[row]]]}" for row in rows[:3].tolist()]
    return [f"LEAK: {len(rows)} of {len(given)} clips sound the same as clips used in training or "
            f"validation of this checkpoint: the results are too good, e.g. {'; '.join(examples)}"]


def count_seen(run: Manifest, given: Manifest, rows: np.ndarray) -> int:
    """How many rows of `given` are in files that a run was trained or selected on.

    Files are known by their content, under any name, or without keys by path and length.
    """
    used = np.concatenate([run.rows("train"), run.rows("val")])
    if run.content is not None:
        keys = given.content
        if keys is None:
            keys = content_keys(given.root, given.paths)
        seen = np.isin(keys[rows], run.content[used][run.content[used] != UNKNOWN])
        return int(seen.sum())
    lengths = {_place(run, row): float(run.duration[row]) for row in used.tolist()}
    return sum(abs(lengths.get(_place(given, row), -1.0) - given.duration[row]) <= SAME_LENGTH
               for row in np.asarray(rows).tolist())
