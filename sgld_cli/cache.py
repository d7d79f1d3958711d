"""`sgld cache`: what is kept between starts, listed and removed."""

import argparse
import time
from collections.abc import Sequence

import msgspec

from sgld.models.cache import CacheItem, Pruned, cache_items, chosen, prune
from sgld_cli.info import size_text, table
from sgld_cli.options import UsageError
from sgld_cli.progress import print_result

_DAY_S = 86400.0


def run(args: argparse.Namespace) -> int:
    """List or prune.

    :raises UsageError: it is neither, or the days aren't a number.
    :raises InvalidRequest: there is nothing of a name.
    :raises ModelError: the cache can't be read, or not be written to.
    """
    if args.cache_command == "list":
        items = cache_items()
        print_result(_as_json(items) if args.json else as_text(items))
        return 0
    if args.cache_command != "prune":
        raise UsageError("give one of: sgld cache list, sgld cache prune")
    days = _days(args.older_than)
    items = chosen(
        cache_items(), names=args.names, older_than_s=None if days is None else days * _DAY_S, takes_all=args.all
    )
    done = Pruned(tuple(items), ()) if args.dry_run else prune(items)
    if args.json:
        print_result(_as_json(done.removed))
        return 0
    verb = "would remove" if args.dry_run else "removed"
    lines = [f"{verb} {item.name} ({size_text(item.size_bytes)})" for item in done.removed]
    lines += [f"left {item.name}: another process makes it" for item in done.in_use]
    print_result("\n".join(lines or ["nothing to remove"]))
    return 0


def as_text(items: Sequence[CacheItem]) -> str:
    """The items as a table."""
    if not items:
        return "nothing is kept"
    rows = [("name", "state", "size", "last used", "made of, or about")]
    for item in items:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used_at))
        parts = " and ".join(filter(None, [item.overlay, item.source]))
        state = "learned" if item.kind == "learned" else item.state
        rows.append((item.name, state, size_text(item.size_bytes), used, parts))
    return "\n".join(table(rows))


def _as_json(items: Sequence[CacheItem]) -> str:
    return msgspec.json.encode(list(items)).decode()


def _days(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        days = float(text)
    except ValueError:
        days = -1
    if not 0 <= days < 1e6:
        raise UsageError(f"--older-than is {text!r}: it is a number of days")
    return days
