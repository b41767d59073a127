"""``msft-store gc``, ``forget`` and ``repack``.

Example::

    document, text = forget(store, ["3fa9"], policy_of(store, options), dry_run=True)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

from msft_store._util import format_count
from msft_store.cli.output import UNCHANGED
from msft_store.errors import InvalidInputError, PinnedError, UnknownCheckpointError
from msft_store.maintenance.gc import GcPlan, PackWaste, Verdict
from msft_store.maintenance.repack import RepackPlan
from msft_store.retention import KeepBest, KeepLast, KeepThese, Mode, Policy
from msft_store.store import Store


def add_keep_options(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`policy_of` reads."""
    command.add_argument("--dry-run", action="store_true", help="only print the plan")
    command.add_argument(
        "--keep-last", type=_count, metavar="N", help="forget all but the N newest checkpoints"
    )
    command.add_argument(
        "--keep-best",
        action="append",
        default=[],
        metavar="METRIC[:min]",
        help="also keep the best by a metric; repeatable. Pinned checkpoints always stay",
    )
    command.add_argument(
        "--keep-tag",
        action="append",
        default=[],
        metavar="TAG",
        help="also keep all with a tag; repeatable",
    )


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"a whole number from 1 up, not {text!r}")
    return int(text)


def policy_of(store: Store, options: argparse.Namespace) -> Policy | None:
    """Return the policy that the options describe; ``None`` if there are no such options."""
    policies: list[Policy] = [KeepLast(options.keep_last)] if options.keep_last is not None else []
    for text in options.keep_best:
        metric, _, suffix = text.rpartition(":")
        mode: Mode | None = "min" if suffix == "min" else "max" if suffix == "max" else None
        known = mode is not None and metric
        policies.append(KeepBest(metric if known else text, 1, mode=mode if known else None))
    if options.keep_tag:
        tags = set(options.keep_tag)
        tagged = frozenset(c.id for c in store.log() if tags & set(c.tags))
        if not tagged:
            raise InvalidInputError(f"no checkpoint has the tag {' or '.join(sorted(tags))}")
        policies.append(KeepThese(tagged))
    return functools.reduce(operator.or_, policies) if policies else None


def gc(store: Store, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Free bytes that no checkpoint needs, and forget checkpoints that a policy drops."""
    plan = store.plan_gc(policy_of(store, options))
    document = _gc_document(plan)
    if options.dry_run:
        return document, f"{plan}\n{UNCHANGED}"
    result = plan.execute()
    return {**document, **dataclasses.asdict(result)}, "\n".join([str(result), *plan.steps()])


def forget(
    store: Store, names: Sequence[str], policy: Policy | None, *, dry_run: bool
) -> tuple[dict[str, Any], str]:
    """Forget the named checkpoints, or those that a policy drops."""
    if bool(names) == (policy is not None):
        raise InvalidInputError(
            "forget needs either names of checkpoints or rules such as --keep-last 3, one of them"
        )
    kept: tuple[Verdict, ...] = ()
    if policy is None:
        pinned = set(store.refs().values())
        found = {c.id: c for c in (store.get(name) for name in names)}
        # Try pinned checkpoints first, so that the error comes before any other is forgotten.
        order = sorted(found.values(), key=lambda c: c.id not in pinned)
        dropped = tuple(Verdict(checkpoint=c, reasons=("named",)) for c in order)
    else:
        plan = store.plan_gc(policy)
        kept, dropped = plan.kept, plan.dropped
    if not dry_run and policy is None:
        for verdict in dropped:
            store.forget(verdict.checkpoint)
    elif not dry_run:
        dropped, pinned_later = _forget_unpinned(store, dropped)
        kept += pinned_later
    verb = "would forget" if dry_run else "forgot"
    count = format_count(len(dropped), "checkpoint")
    lines = [f"{verb} {count}" if dropped else "nothing to forget"]
    lines += [f"  forget {verdict}" for verdict in dropped]
    lines += [f"  keep   {verdict}" for verdict in kept]
    if dropped:
        lines.append(UNCHANGED if dry_run else "msft-store gc frees their space")
    return {"forget": _verdicts(dropped), "keep": _verdicts(kept)}, "\n".join(lines)


def _forget_unpinned(
    store: Store, planned: Sequence[Verdict]
) -> tuple[tuple[Verdict, ...], tuple[Verdict, ...]]:
    """Forget planned checkpoints; return the forgotten ones, and those pinned since the plan."""
    forgotten, pinned = [], []
    for verdict in planned:
        try:
            store.forget(verdict.checkpoint)
            forgotten.append(verdict)
        except PinnedError:
            pinned.append(Verdict(checkpoint=verdict.checkpoint, reasons=("pinned meanwhile",)))
        except UnknownCheckpointError:
            # Another process has forgotten it already.
            continue
    return tuple(forgotten), tuple(pinned)


def repack(store: Store, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Merge packs into fewer ones without dead bytes."""
    plan = store.plan_repack()
    document = _repack_document(plan)
    if not plan.delete and not plan.merge:
        return (
            document,
            "nothing to do: no pack has dead bytes, and there are no small packs to merge",
        )
    if options.dry_run:
        return document, f"{plan}\n{UNCHANGED}"
    result = plan.execute()
    text = "\n".join([f"made {plan.change()}; {result}", *plan.steps()])
    return {**document, **dataclasses.asdict(result)}, text


def _repack_document(plan: RepackPlan) -> dict[str, Any]:
    return {
        "delete": [_pack(waste) for waste in plan.delete],
        "merge": [[_pack(waste) for waste in group] for group in plan.merge],
        "would_free_bytes": plan.freed_bytes,
    }


def _gc_document(plan: GcPlan) -> dict[str, Any]:
    return {
        "keep": _verdicts(plan.kept),
        "forget": _verdicts(plan.dropped),
        "delete": [_pack(waste) for waste in plan.delete],
        "rewrite": [_pack(waste) for waste in plan.rewrite],
        "leftovers": [{"file": path, "bytes": size} for path, size in plan.leftovers],
        "held_bytes": plan.held_bytes,
        "would_free_bytes": plan.freed_bytes,
    }


def _pack(waste: PackWaste) -> dict[str, Any]:
    sizes = {"dead_bytes": waste.dead_bytes, "live_bytes": waste.live_bytes}
    return {"pack": waste.path, "bytes": waste.size, **sizes}


def _verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [{"id": v.checkpoint.id, "reasons": v.reasons} for v in verdicts]
