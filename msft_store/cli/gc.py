"""``msft-store gc``, ``forget`` and ``repack``: what goes, and why.

Example::

    document, text = forget(store, ["3fa9"], policy_of(options), dry_run=True)
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from msft_store._util import format_count
from msft_store.errors import InvalidInputError, PinnedError, UnknownCheckpointError
from msft_store.maintenance.gc import GcPlan, Verdict
from msft_store.maintenance.repack import RepackPlan
from msft_store.objects.manifest import Checkpoint
from msft_store.retention import KeepBest, KeepLast, KeepThese, Mode, Policy
from msft_store.store import Store

UNCHANGED = "nothing was changed (--dry-run)"


def add_keep_options(command: argparse.ArgumentParser) -> None:
    """Add the options that :func:`policy_of` reads."""
    command.add_argument("--dry-run", action="store_true", help="only print the plan")
    command.add_argument(
        "--keep-last", type=_count, metavar="N", help="forget all but the N newest"
    )
    command.add_argument(
        "--keep-best",
        action="append",
        default=[],
        metavar="METRIC[:min]",
        help="and the best by a metric; may be repeated. Pinned checkpoints always stay",
    )
    command.add_argument(
        "--keep-tag",
        action="append",
        default=[],
        metavar="TAG",
        help="and all with a tag; may be repeated",
    )


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"a whole number from 1 up, not {text!r}")
    return int(text)


def policy_of(store: Store, options: argparse.Namespace) -> Policy | None:
    """Return the policy that the options ask for; ``None`` if none of them does."""
    policies: list[Policy] = [KeepLast(options.keep_last)] if options.keep_last is not None else []
    for wanted in options.keep_best:
        metric, _, said = wanted.rpartition(":")
        mode: Mode | None = "min" if said == "min" else "max" if said == "max" else None
        if mode is None or not metric:
            metric, mode = wanted, None
        policies.append(KeepBest(metric, 1, mode=mode))
    if options.keep_tag:
        tags = set(options.keep_tag)
        tagged = frozenset(c.id for c in store.log() if tags & set(c.tags))
        if not tagged:
            raise InvalidInputError(f"no checkpoint has the tag {' or '.join(sorted(tags))}")
        policies.append(KeepThese(tagged))
    policy: Policy | None = None
    for part in policies:
        policy = part if policy is None else policy | part
    return policy


def gc(store: Store, policy: Policy | None, *, dry_run: bool) -> tuple[dict[str, Any], str]:
    """Free what nothing needs, and what a policy does not keep."""
    plan = store.plan_gc(policy)
    document = _gc_document(plan)
    if dry_run:
        return document, f"{plan}\n{UNCHANGED}"
    result = plan.execute()
    return {**document, **dataclasses.asdict(result)}, "\n".join([str(result), *plan.steps()])


def forget(
    store: Store, names: Sequence[str], policy: Policy | None, *, dry_run: bool
) -> tuple[dict[str, Any], str]:
    """Forget the checkpoints of some names, or all that a policy does not keep."""
    if bool(names) == (policy is not None):
        raise InvalidInputError(
            "forget takes checkpoints, or rules such as --keep-last 3 for what stays; one of them"
        )
    kept: tuple[Verdict, ...] = ()
    if policy is None:
        pinned = set(store.refs().values())
        found = {c.id: c for c in (store.get(name) for name in names)}
        # What is pinned first: it is refused before any other is forgotten.
        order = sorted(found.values(), key=lambda c: c.id not in pinned)
        dropped = tuple(Verdict(checkpoint=c, reasons=("named",)) for c in order)
    else:
        plan = store.plan_gc(policy)
        kept, dropped = plan.kept, plan.dropped
    if not dry_run and policy is None:
        for verdict in dropped:
            store.forget(verdict.checkpoint)
    elif not dry_run:
        dropped, stay = _forget_unpinned(store, dropped)
        kept += stay
    did = "would forget" if dry_run else "forgot"
    lines = [
        f"{did} {format_count(len(dropped), 'checkpoint')}" if dropped else "nothing to forget"
    ]
    lines += [f"  forget {_named(v.checkpoint)}: {', '.join(v.reasons)}" for v in dropped]
    lines += [f"  keep   {_named(v.checkpoint)}: {', '.join(v.reasons)}" for v in kept]
    if dropped:
        lines.append(UNCHANGED if dry_run else "msft-store gc frees their space")
    return {"forget": _verdicts(dropped), "keep": _verdicts(kept)}, "\n".join(lines)


def _forget_unpinned(
    store: Store, planned: Sequence[Verdict]
) -> tuple[tuple[Verdict, ...], tuple[Verdict, ...]]:
    """Forget what a plan drops; return what was, and what others have pinned since the plan."""
    forgotten, stay = [], []
    for verdict in planned:
        try:
            store.forget(verdict.checkpoint)
            forgotten.append(verdict)
        except PinnedError:
            stay.append(Verdict(checkpoint=verdict.checkpoint, reasons=("pinned meanwhile",)))
        except UnknownCheckpointError:
            # Somebody else forgot it.
            continue
    return tuple(forgotten), tuple(stay)


def repack(store: Store, *, dry_run: bool) -> tuple[dict[str, Any], str]:
    """Make few dense packs of many."""
    plan = store.plan_repack()
    document = _repack_document(plan)
    if not plan.delete and not plan.merge:
        return document, "nothing to do: no pack has anything dead in it, or is small with others"
    if dry_run:
        return document, f"{plan}\n{UNCHANGED}"
    result = plan.execute()
    text = "\n".join([f"made {plan.change()}; {result}", *plan.steps()])
    return {**document, **dataclasses.asdict(result)}, text


def _repack_document(plan: RepackPlan) -> dict[str, Any]:
    return {
        "delete": [{"pack": waste.path, "bytes": waste.size} for waste in plan.delete],
        "merge": [
            [{"pack": w.path, "bytes": w.size, "dead_bytes": w.dead_bytes} for w in group]
            for group in plan.merge
        ],
        "would_free_bytes": plan.freed_bytes,
    }


def _gc_document(plan: GcPlan) -> dict[str, Any]:
    return {
        "keep": _verdicts(plan.kept),
        "forget": _verdicts(plan.dropped),
        "delete": [{"pack": w.path, "bytes": w.size} for w in plan.delete],
        "rewrite": [
            {"pack": w.path, "dead_bytes": w.dead_bytes, "live_bytes": w.live_bytes}
            for w in plan.rewrite
        ],
        "leftovers": [{"file": path, "bytes": size} for path, size in plan.leftovers],
        "held_bytes": plan.held_bytes,
        "would_free_bytes": plan.freed_bytes,
    }


def _verdicts(which: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [{"id": v.checkpoint.id, "reasons": v.reasons} for v in which]


def _named(checkpoint: Checkpoint) -> str:
    step = "" if checkpoint.step is None else f" step {checkpoint.step}"
    return f"{checkpoint.id[:12]}{step}"
