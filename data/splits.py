"""Which clips train, which validate, which test: no recording, and no copy of one, in two of them."""
import csv
import hashlib
import io
import os

import numpy as np

from .manifest import SPLITS, DataError
from .scan import printable, sets_of, unite, write_atomic

TRAIN, VAL, TEST = range(3)
COLUMNS = ["path", "label", "split", "group", "start", "end"]


def assign_splits(manifest, duplicates, val=0.15, test=0.15, seed=0, fold=None):
    """Fill manifest.split in place and return lines to print.

    In this order: the fold asked for (test is that fold, val the next one), splits that the data gives,
    the first fold that the data has, else splits made here: `val` and `test` are the shares of each
    class's clips to aim at, no group and no set of byte-identical files (`duplicates`, lists of rows) is
    divided, and the result depends on the paths and the seed, not on the order of the rows. A val or test
    that is missing is made out of train.

    Raises DataError where a class could not be learnt or tested: one clip only, or none in train.
    """
    if not (0 <= val and 0 <= test and val + test < 1):
        raise DataError(f"--val {val:g} and --test {test:g} leave nothing for training; their sum must be below 1")
    split = manifest.split
    lines = []
    if fold is None and manifest.fold is not None and (split < 0).all():
        fold = int(manifest.fold.min())
        lines.append(f"the data has folds and --fold is not given: fold {fold} is the test")
    if fold is not None:
        lines.append(_by_fold(manifest, fold))
    empty = [name for name, n in zip(manifest.classes, manifest.counts()) if n == 0]
    if empty:
        lines.append(f"classes without a clip, such as all of them broken: {_some(empty)}")
    given = [name for i, name in enumerate(SPLITS) if (split == i).any()]
    if not given:
        rare = [name for name, n in zip(manifest.classes, manifest.counts()) if n == 1]
        if rare:
            raise DataError(f"classes with a single clip cannot be trained and tested: {_some(rare)}; add recordings, "
                            "or leave such classes out with --min-clips 2")
        split[:] = TRAIN
    elif "train" not in given:
        raise DataError(f"the data's splits are {', '.join(given)}, without train; mark the clips to train on as train")
    wanted = [i for i, share in ((VAL, val), (TEST, test)) if share and SPLITS[i] not in given]
    if wanted:
        lines += _make(manifest, duplicates, {VAL: val, TEST: test}, wanted, seed)
        if given:
            lines.append(f"{' and '.join(SPLITS[i] for i in wanted)} made out of train with seed {seed}")
    _need_training(manifest)
    sizes = ", ".join(f"{len(manifest.rows(name))} {name}" for name in SPLITS)
    lines.append(f"split: {sizes} clips; {manifest.group.max() + 1} groups ({manifest.group_source})")
    return [printable(line) for line in lines]


def audit(manifest, duplicates):
    """One line for each kind of leak between the splits, with the count and an example; [] if clean.

    Only splits or folds that come with the data can leak; equal files with two labels are told whatever
    the splits are.
    """
    def told(sets, kind, where):
        if not sets:
            return []
        one, other = sets[0]
        return [f"{len(sets)} {kind}, e.g. {manifest.paths[one]} ({where(one)}) and "
                f"{manifest.paths[other]} ({where(other)})"]

    def apart(sets, value):
        """The first row of each set, with the first one that differs from it in value."""
        found = []
        for rows in sets:
            other = [row for row in rows if value(row) != value(rows[0])]
            if other:
                found.append((rows[0], other[0]))
        return found

    def split(row):
        return SPLITS[manifest.split[row]]

    def label(row):
        return manifest.label_text(row)

    order = np.lexsort((manifest.split, manifest.group))
    grouped, splits = manifest.group[order], manifest.split[order]
    mixed = grouped[1:][(grouped[1:] == grouped[:-1]) & (splits[1:] != splits[:-1])]
    rows = np.flatnonzero(np.isin(manifest.group, mixed))  # of the groups that are in two splits
    groups = [rows[at] for at in sets_of(manifest.group[rows])]
    alike = {}  # the same stretch of equal files
    for i, rows in enumerate(duplicates):
        for row in rows:
            alike.setdefault((i, float(manifest.start[row]), str(manifest.end[row])), []).append(row)
    lines = (told(apart(duplicates, split), "sets of byte-identical files in two splits", split)
             + told(apart(groups, split), f"groups ({manifest.group_source}) in two splits", split)
             + told(apart(alike.values(), label), "sets of byte-identical files with two labels", label))
    return [printable(line) for line in lines]


def drop_rare(manifest, minimum):
    """The manifest without the classes that have fewer clips than `minimum`, and lines that say so."""
    counts = manifest.counts()
    kept = np.flatnonzero(counts >= minimum)
    if len(kept) == len(counts):
        return manifest, []
    if len(kept) < 2:
        raise DataError(f"--min-clips {minimum} leaves {len(kept)} of {len(counts)} classes; give a smaller number")
    smaller = manifest.relabelled([manifest.classes[i] for i in kept],
                                  np.where(counts >= minimum, np.cumsum(counts >= minimum) - 1, -1))
    rare = [f"{manifest.classes[i]} ({counts[i]})" for i in np.flatnonzero(counts < minimum)]
    return smaller, [f"left out: {len(rare)} classes with fewer than {minimum} clips, {len(manifest) - len(smaller)} "
                     f"clips in all: {_some(rare)}"]


def write_split(manifest, path):
    """Write `path,label,split,group,start,end`, one clip a row; empty where there is no split or end. Where clips may have
    several labels, label is as a; b and a column unknown follows."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC)  # quotes keep blanks and line breaks in names
    writer.writerow([*COLUMNS, "unknown"] if manifest.multi_label else COLUMNS)
    writer.writerows(_fields(manifest))
    write_atomic(path, os.fsencode(text.getvalue()))


def split_hash(manifest):
    """SHA-256 (hex) of every clip's path, labels, split, start and end, whatever the order of the rows."""
    lines = sorted(os.fsencode("\0".join([path, label, split, str(start), str(end), *unknown]))
                   for path, label, split, _, start, end, *unknown in _fields(manifest))
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _fields(manifest):
    for row, path in enumerate(manifest.paths):
        split, end = manifest.split[row], manifest.end[row]
        unsure = [manifest.label_sets[manifest.label_set[row]][1]] if manifest.multi_label else []
        yield (path, manifest.label_text(row), SPLITS[split] if split >= 0 else "",
               int(manifest.group[row]), manifest.start[row], "" if np.isnan(end) else end,
               *("; ".join(manifest.classes[c] for c in classes) for classes in unsure))


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _by_fold(manifest, fold):
    """Set the splits by fold: test is this one, val the next one that there is, train the others."""
    if manifest.fold is None:
        raise DataError(f"--fold {fold}: the data has no folds; leave --fold out, or give a CSV with a column fold")
    folds = np.unique(manifest.fold).tolist()
    if fold not in folds:
        raise DataError(f"--fold {fold}: there is no such fold; give one of {', '.join(map(str, folds))}")
    if len(folds) == 1:
        raise DataError(f"--fold {fold} is the only fold, so nothing is left to train on; leave the column fold out")
    manifest.split[:] = np.where(manifest.fold == fold, TEST, TRAIN)
    if len(folds) == 2:
        return f"fold {fold} is the test, the other one the training"
    following = folds[(folds.index(fold) + 1) % len(folds)]
    manifest.split[manifest.fold == following] = VAL
    return f"fold {fold} is the test, fold {following} the validation, the other {len(folds) - 2} the training"


def _need_training(manifest):
    known = manifest.positives(manifest.rows("train"))[1]
    for name in ("test", "val"):
        unknown = np.setdiff1d(manifest.positives(manifest.rows(name))[1], known)  # in rising order
        if len(unknown):
            raise DataError(f"label in {name} that is not in train: {_some([manifest.classes[i] for i in unknown])}; "
                            "move some of its clips to train, or take the class out")


class _Units:
    """What must stay together, in columns: a row per unit and class that it holds, by unit, then class.

    unit, label, clips: (m,) int32; begin: (units + 1,) int32, the first row of each unit; of_class: class -> its
    rows (k,); chance: (units,) uint64 that breaks ties. Columns, since objects would take ten times the memory.
    """

    def __init__(self, unit_of, labels, chance):
        """unit_of, labels: (n,) unit from 0 and class of each clip, of one with several labels once for each."""
        n_labels = int(labels.max()) + 1
        pairs, clips = np.unique(unit_of * np.int64(n_labels) + labels, return_counts=True)
        self.unit, self.label = (pairs // n_labels).astype(np.int32), (pairs % n_labels).astype(np.int32)
        self.clips = clips.astype(np.int32)
        self.begin = np.searchsorted(self.unit, np.arange(len(chance) + 1, dtype=np.int32)).astype(np.int32)
        self.of_class = {int(self.label[rows[0]]): rows for rows in sets_of(self.label)}
        self.chance = chance
        self.numbers = self.begin.data, self.label.data, self.clips.data  # as Python's, faster one by one

    def content(self, u):
        """(class, clips) pairs of the unit."""
        begin, label, clips = self.numbers
        return [(label[row], clips[row]) for row in range(begin[u], begin[u + 1])]

    def of(self, c, largest_first):
        """Units of the class, by size and then by chance."""
        rows = self.of_class[c]
        size = -self.clips[rows] if largest_first else self.clips[rows]
        return self.unit[rows[np.lexsort((self.chance[self.unit[rows]], size))]].tolist()


def _make(manifest, duplicates, shares, wanted, seed):
    """Move clips from train to the wanted splits; `shares` are of the clips now in train. Returns lines."""
    rows = manifest.rows("train")
    unit = _together(manifest, duplicates)[rows]
    unit = np.unique(unit, return_inverse=True)[1].astype(np.int32)  # (k,) from 0
    clip, labels = manifest.positives(rows)
    units = _Units(unit[clip], labels, _chances(manifest.paths, rows, unit, seed))

    places = [i for i in (TRAIN, TEST, VAL) if i == TRAIN or i in wanted]  # in the order that a class needs them
    share = {i: shares[i] if i in wanted else 1 - sum(shares[w] for w in wanted) for i in places}
    place = _deal(units, places, share)
    manifest.split[rows] = place[unit]
    return _shortfalls(manifest, units, place, wanted)


def _together(manifest, duplicates):
    """Codes (n,) of what must not be divided: groups, and those that share a file's content."""
    copies = np.arange(len(manifest), dtype=np.int32)
    for alike in duplicates:
        copies[alike] = alike[0]
    return unite(manifest.group, copies)


def _chances(paths, rows, unit, seed):
    """(units,) uint64 drawn from the seed and the first path of each unit, not from the order of the rows."""
    first = [None] * (int(unit.max()) + 1)
    for u, row in zip(unit, rows):
        if first[u] is None or paths[row] < first[u]:
            first[u] = paths[row]
    draws = (hashlib.blake2b(os.fsencode(f"{seed} {path}"), digest_size=8).digest() for path in first)
    return np.fromiter((int.from_bytes(draw, "big") for draw in draws), np.uint64, len(first))


def _deal(units, places, share):
    """Split (units,) int8 of every unit: class by class from the one with the fewest units, largest unit first,
    to the split that is furthest below its share of the class (K. Sechidis et al., "On the stratification of
    multi-label data", 2011), while each class gets train, test and val in this order if it has the units."""
    held = {c: len(rows) for c, rows in units.of_class.items()}  # units
    size = {c: int(units.clips[rows].sum()) for c, rows in units.of_class.items()}  # clips
    short = {c: {i: share[i] * size[c] for i in places} for c in size}  # clips still to come
    short_all = {i: share[i] * sum(size.values()) for i in places}
    have = {c: dict.fromkeys(places, 0) for c in size}  # units
    need = {c: [i for i in (TRAIN, TEST, VAL)[:held[c]] if i in places] for c in size}
    place = np.full(len(units.chance), -1, np.int8)

    def put(u, i, sign=1):
        for c, k in units.content(u):
            short[c][i] -= sign * k
            short_all[i] -= sign * k
            have[c][i] += sign
        place[u] = i

    for c in sorted(size, key=lambda c: (held[c], c)):
        queue = [u for u in units.of(c, largest_first=True) if place[u] < 0]
        left = short[c]
        for waiting, u in zip(range(len(queue), 0, -1), queue):
            lacking = [i for i in need[c] if not have[c][i]]
            put(u, max(lacking if len(lacking) >= waiting else places,
                       key=lambda i: (round(left[i], 6), round(short_all[i], 6))))

    # Units of several classes can have left one without train or test: move what nobody else needs there.
    for i in places:
        for c in sorted(size):
            if i in need[c] and not have[c][i]:
                candidates = units.of(c, largest_first=False)
                spare = [u for u in candidates if all(
                    have[d][place[u]] > 1 or place[u] not in need[d] for d, _ in units.content(u))]
                for u in spare[:1] or (candidates[:1] if i == TRAIN else []):
                    put(u, place[u], -1)
                    put(u, i)
    return place


def _shortfalls(manifest, units, place, wanted):
    """Lines on classes that are not in every split; raises DataError where nothing can be tested."""
    lines = []
    for i in sorted(wanted, reverse=True):
        if not (manifest.split == i).any():
            problem = f"no clips for {SPLITS[i]}: no class has enough groups ({manifest.group_source}) to spare one"
            if i == TEST:
                raise DataError(f"{problem}; add recordings, or give a CSV with a column group")
            lines.append(problem)
    held = {c: len(rows) for c, rows in sorted(units.of_class.items())}
    whole = [manifest.classes[c] for c, n in held.items() if n == 1]
    if whole:
        lines.append(f"in train only, since all their clips lie in one group: {_some(whole)}")
    tested = set(units.label[place[units.unit] == TEST].tolist())
    rest = [manifest.classes[c] for c, n in held.items() if n > 1 and c not in tested]
    if rest and TEST in wanted:
        lines.append(f"not in test, since their groups hold other classes too: {_some(rest)}")
    return lines
