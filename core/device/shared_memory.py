"""Room in /dev/shm, through which worker processes hand over what they have decoded.

Where it is full, a worker dies or its batch never arrives. Docker gives 64 MB by default.
"""
import os

FOLDER = "/dev/shm"
PREFETCHED = 2  # batches that each worker of a DataLoader has ready
USABLE = 0.8  # share of the free memory that is used
_told = set()


def workers_that_fit(wanted: int, batch_bytes: int, n_in_use: int) -> int:
    """How many of the wanted workers there is shared memory for; says so if they are fewer.

    batch_bytes: of one batch. n_in_use: batches that the main process has taken and still holds.
    """
    try:
        stat = os.statvfs(FOLDER)
    except OSError:  # not on Linux
        return wanted
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    free = stat.f_bavail * stat.f_frsize // ranks
    n_batches = int(USABLE * free) // max(1, batch_bytes) - n_in_use
    fitting = max(0, min(wanted, n_batches // PREFETCHED))
    if fitting < wanted and fitting not in _told:
        _told.add(fitting)
        print(f"workers: {fitting} instead of {wanted}, because {FOLDER} has only "
              f"{free / 2**20:.0f} MiB free for batches of {batch_bytes / 2**20:.1f} MiB; give it "
              "more (docker run --shm-size 2g) or lower --batch-size and --eval-batch-size")
    return fitting
