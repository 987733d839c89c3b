"""The dataset of replies: what its rows say, which of them are final, and which are asked again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b

import pyarrow as pa

from ip2p_ray import errors, storage
from ip2p_ray.captions import surely_fits
from ip2p_ray.errors import BudgetError, StageError
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import plan, run
from ip2p_ray.triplets.reply import NO_REPLY, Triplet, parse_reply

REPLIES = pa.schema(
    [
        *CAPTIONS,
        ("reply", pa.string()),  # or what went wrong instead
        ("status", pa.string()),  # "ok", or why the reply is no triplet
        ("instruction", pa.string()),  # null unless the status is "ok"
        ("edited_caption", pa.string()),  # null unless the status is "ok"
    ]
)

AFTER_TRIPLETS = ("candidates", "scores", "pairs", "latents", "checkpoints", "editor")
"""What is made of triplets, as it is named in their folder."""

STOPPED = "stopped"
"""Begins the status, "stopped ConfigError", of a caption that was not asked about any more."""


def drop_unanswered(folder: str) -> int:
    """How many captions of `<folder>/replies` have no reply.

    If any has none, that dataset and those made from it are dropped, so that they are asked again.

    Raises:
        StageError: the folder has what was made of the triplets, which would no longer match.
    """
    replies = storage.join(folder, "replies")
    if not storage.exists(storage.join(replies, storage.MANIFEST)):
        return 0  # not whole yet: what has no reply there is asked for again anyway
    count = sum(1 for _ in _unfinished(replies))
    if not count:
        return 0
    made = [name for name in AFTER_TRIPLETS if storage.any_there(storage.join(folder, name))]
    if made:
        raise StageError(
            f"{count:,} captions have no reply, but asking again would change the triplets that "
            f"{', '.join(made)} in {folder} were made of: delete these, or copy {folder}/journal "
            "to another --out and write the triplets there, which asks for nothing that it has"
        )
    for name in ("triplets", "rejects/triplets", "replies"):
        storage.remove_all(storage.join(folder, name))
    return count


def unanswered(uri: str) -> str | None:
    """A digest of which captions of the replies at `uri` have none; None where all have one."""
    keys = [
        key
        for shard in storage.list_shards(uri)
        for key, status in _columns(shard, "caption_key", "status")
        if status == NO_REPLY
    ]
    return blake2b("\n".join(sorted(keys)).encode(), digest_size=8).hexdigest() if keys else None


def row_of_reply(caption: str, reply: str, fits: Callable[[str], bool]) -> dict[str, str | None]:
    """The columns that REPLIES adds to CAPTIONS, of a reply in the paper's text form."""
    found = parse_reply(caption, reply, fits=fits)
    if isinstance(found, Triplet):
        texts = {"instruction": found.instruction, "edited_caption": found.edited_caption}
        return {"reply": reply, "status": "ok", **texts}
    return {"reply": reply, "status": found, "instruction": None, "edited_caption": None}


def fits_openai(text: str) -> bool:
    """Whether OpenAI's CLIP reads the whole text; its vocabulary is loaded once one is long."""
    if surely_fits(text):
        return True
    from ip2p_ray.clip import openai_fits

    return openai_fits(text)


def _unfinished(uri: str) -> Iterator[tuple[str, str]]:
    """(status, what was said) of each row that is not final, in whatever lies there."""
    for shard in storage.list_shards(uri):
        if any(_is_open(status) for (status,) in _columns(shard, "status")):
            for status, text in _columns(shard, "status", "reply"):
                if _is_open(status):
                    yield status, text


def is_to_be_asked_again(uri: str) -> bool:
    """Whether what an earlier attempt left has rows that are not final, or cannot be read."""
    try:
        return any(_unfinished(uri))
    except (OSError, pa.ArrowException):
        return True  # a kill cut a shard; the journal has all that is in it


def drop(uri: str) -> None:
    """The notes of what was written, then the shards.

    After a kill in between some rows come twice, of which one is kept, but none is missing.
    """
    storage.remove_all(run.resume_folder(uri))
    storage.remove_shards(uri)


def judge(uri: str, rows: int, max_no_reply: float) -> None:
    """Returns if the replies are what they should be.

    Raises:
        Ip2pError: whatever stopped the actors.
        StageError: too many captions have no reply.
    """
    lacking = 0
    said = ""
    for status, text in _unfinished(uri):
        if status.startswith(STOPPED):
            kind = getattr(errors, status.removeprefix(STOPPED).strip(), StageError)
            if kind is BudgetError:
                text += "; once there is more, the same command goes on, and asks for nothing twice"
            raise kind(text)
        lacking += 1
        said = said or text
    if lacking > max_no_reply * rows:
        raise StageError(
            f"replies: {lacking:,} of {rows:,} captions got none, more than the {max_no_reply:.0%} "
            f"allowed, for example: {said}; the same command asks for those again and for no other"
        )


def _columns(shard: str, *names: str) -> Iterator[tuple[str, ...]]:
    table = storage.read_table(shard, columns=list(names))
    yield from zip(*(table[name].to_pylist() for name in names), strict=True)


def _is_open(status: str) -> bool:
    return status == NO_REPLY or status.startswith(STOPPED)


def verdicts(statuses: Iterable[str | None]) -> Counter[str | None]:
    """By reason, and None for what can be used; of what is to be asked again, none."""
    found = Counter[str | None]()
    for status, count in Counter(map(str, statuses)).items():
        if not _is_open(status):
            found[None if status == "ok" else status] += count
    return found


def _verdicts_in(table: pa.Table) -> Counter[str | None]:
    return verdicts(table["status"].to_pylist())


JUDGED = plan.Judged(columns=["status"], verdicts=_verdicts_in)
"""Of rows of REPLIES."""
