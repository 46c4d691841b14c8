"""Which clips train, which validate, which test: no recording, and no copy of one, in two of them."""
import csv
import hashlib
import io
import os

import numpy as np

from .manifest import SPLITS, DataError
from .scan import codes, printable, unite, write_atomic

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
        return manifest.classes[manifest.labels[row]]

    order = np.argsort(manifest.group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(manifest.group[order])) + 1)
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
    smaller = manifest.take(np.isin(manifest.labels, kept))
    smaller.labels = np.searchsorted(kept, smaller.labels).astype(np.int32)
    smaller.classes = [manifest.classes[i] for i in kept]
    rare = [f"{manifest.classes[i]} ({counts[i]})" for i in np.flatnonzero(counts < minimum)]
    return smaller, [f"left out: {len(rare)} classes with fewer than {minimum} clips, {len(manifest) - len(smaller)} "
                     f"clips in all: {_some(rare)}"]


def write_split(manifest, path):
    """Write `path,label,split,group,start,end`, one clip a row; empty where there is no split or end."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC)  # quotes keep blanks and line breaks in names
    writer.writerow(COLUMNS)
    writer.writerows(_fields(manifest))
    write_atomic(path, os.fsencode(text.getvalue()))


def split_hash(manifest):
    """SHA-256 (hex) of every clip's path, label, split, start and end, whatever the order of the rows."""
    lines = sorted(os.fsencode("\0".join([path, label, split, str(start), str(end)]))
                   for path, label, split, _, start, end in _fields(manifest))
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _fields(manifest):
    for row, path in enumerate(manifest.paths):
        split, end = manifest.split[row], manifest.end[row]
        yield (path, manifest.classes[manifest.labels[row]], SPLITS[split] if split >= 0 else "",
               int(manifest.group[row]), manifest.start[row], "" if np.isnan(end) else end)


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
    known = set(manifest.labels[manifest.rows("train")].tolist())
    for name in ("test", "val"):
        unknown = sorted(set(manifest.labels[manifest.rows(name)].tolist()) - known)
        if unknown:
            raise DataError(f"label in {name} that is not in train: {_some([manifest.classes[i] for i in unknown])}; "
                            "move some of its clips to train, or take the class out")


def _make(manifest, duplicates, shares, wanted, seed):
    """Move clips from train to the wanted splits; `shares` are of the clips now in train. Returns lines."""
    rows = manifest.rows("train")
    copies = np.arange(len(manifest))
    for alike in duplicates:
        copies[alike] = alike[0]
    unit = codes(unite(manifest.group, copies)[rows].tolist())  # (k,) what must stay together
    (units, labels), counts = np.unique(np.stack([unit, manifest.labels[rows]]), axis=1, return_counts=True)
    content = [[] for _ in range(unit.max() + 1)]  # unit -> its classes and their clips
    members = {}  # class -> its units and their clips
    for u, c, k in zip(units.tolist(), labels.tolist(), counts.tolist()):
        content[u].append((c, k))
        members.setdefault(c, []).append((u, k))
    first = {}
    for u, row in zip(unit.tolist(), rows.tolist()):
        first[u] = min(first.get(u, manifest.paths[row]), manifest.paths[row])
    chance = {u: hashlib.blake2b(os.fsencode(f"{seed} {path}"), digest_size=8).digest() for u, path in first.items()}

    places = [i for i in (TRAIN, TEST, VAL) if i == TRAIN or i in wanted]  # in the order that a class needs them
    share = {i: shares[i] if i in wanted else 1 - sum(shares[w] for w in wanted) for i in places}
    place = _deal(content, members, chance, places, share)
    manifest.split[rows] = np.array(place, np.int8)[unit]
    return _shortfalls(manifest, members, place, wanted)


def _deal(content, members, chance, places, share):
    """Split of every unit: class by class from the one with the fewest units, largest unit first, to the
    split that is furthest below its share of the class (K. Sechidis et al., "On the stratification of
    multi-label data", 2011), while each class gets train, test and val in this order if it has the units."""
    size = {c: sum(k for _, k in units) for c, units in members.items()}
    short = {c: {i: share[i] * size[c] for i in places} for c in members}  # clips still to come
    short_all = {i: share[i] * sum(size.values()) for i in places}
    have = {c: dict.fromkeys(places, 0) for c in members}  # units
    need = {c: [i for i in (TRAIN, TEST, VAL)[:len(units)] if i in places] for c, units in members.items()}
    place = [None] * len(content)

    def put(u, i, sign=1):
        for c, k in content[u]:
            short[c][i] -= sign * k
            short_all[i] -= sign * k
            have[c][i] += sign
        place[u] = i

    for c in sorted(members, key=lambda c: (len(members[c]), c)):
        queue = sorted((-k, chance[u], u) for u, k in members[c] if place[u] is None)
        for waiting, (_, _, u) in zip(range(len(queue), 0, -1), queue):
            lacking = [i for i in need[c] if not have[c][i]]
            put(u, max(lacking if len(lacking) >= waiting else places,
                       key=lambda i: (round(short[c][i], 6), round(short_all[i], 6))))

    # Units of several classes can have left one without train or test: move what nobody else needs there.
    for i in places:
        for c in sorted(members):
            if i in need[c] and not have[c][i]:
                units = sorted((k, chance[u], u) for u, k in members[c])
                spare = [u for _, _, u in units if all(
                    have[d][place[u]] > 1 or place[u] not in need[d] for d, _ in content[u])]
                for u in spare[:1] or ([units[0][2]] if i == TRAIN else []):
                    put(u, place[u], -1)
                    put(u, i)
    return place


def _shortfalls(manifest, members, place, wanted):
    """Lines on classes that are not in every split; raises DataError where nothing can be tested."""
    lines = []
    for i in sorted(wanted, reverse=True):
        if not (manifest.split == i).any():
            problem = f"no clips for {SPLITS[i]}: no class has enough groups ({manifest.group_source}) to spare one"
            if i == TEST:
                raise DataError(f"{problem}; add recordings, or give a CSV with a column group")
            lines.append(problem)
    whole = [manifest.classes[c] for c in sorted(members) if len(members[c]) == 1]
    if whole:
        lines.append(f"in train only, since all their clips lie in one group: {_some(whole)}")
    tested = {c for c, units in members.items() if any(place[u] == TEST for u, _ in units)}
    rest = [manifest.classes[c] for c in sorted(members) if len(members[c]) > 1 and c not in tested]
    if rest and TEST in wanted:
        lines.append(f"not in test, since their groups hold other classes too: {_some(rest)}")
    return lines
