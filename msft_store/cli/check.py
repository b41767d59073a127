"""``msft-store check`` and ``repair``: what they print.

Example::

    document, text = repair("run/store", dry_run=True)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from msft_store._util import check_path, format_bytes, format_count
from msft_store.cli.output import missing
from msft_store.maintenance.check import Finding, Report
from msft_store.maintenance.repair.plan import RepairPlan, plan_repair
from msft_store.objects.bases import Base, has_missing_files
from msft_store.storage.backend import LocalBackend
from msft_store.store import Store


def examine(store: Store, *, read_data: bool) -> tuple[Report, str]:
    """Look for damage; return what there is to say, for ``--json`` and for people.

    What is wrong with the files of a base is one line for people, not one for each tensor.
    """
    report = store.examine(read_data=read_data)
    how = "all data read" if read_data else "structure only; --read-data reads all data"
    if not report.findings:
        return report, f"no errors ({how})"
    bases = {base.id: base for base in store.bases()}
    bases_of = {checkpoint.id: checkpoint.base for checkpoint in store.log()}
    groups: dict[str, list[Finding]] = {}
    others: list[Finding] = []
    for finding in report.findings:
        base = bases.get(finding.base or bases_of.get(finding.checkpoint or "") or "")
        if base is not None and finding.file in dict(base.files):
            groups.setdefault(base.id, []).append(finding)
        else:
            others.append(finding)
    hurt = {finding.checkpoint for finding in others}
    waiting = [i for i in report.damaged if i not in hurt]
    lines = [str(finding) for finding in others]
    for identity, found in groups.items():
        # Where no data was read, nobody knows what a checkpoint needs of its base: all of it.
        need = {f.checkpoint for f in found if f.checkpoint} or {
            i for i in waiting if bases_of.get(i) == identity and not read_data
        }
        lines.append(_line_of(bases[identity], found, len(need), read_data=read_data))
    lines.append(f"{_verdict(report, waiting)} ({how})")
    if others:
        lines.append("msft-store repair --dry-run shows what can be kept, and how")
    return report, "\n".join(lines)


def _line_of(base: Base, found: list[Finding], need: int, *, read_data: bool) -> str:
    needed = f"{format_count(need, 'checkpoint')} cannot be restored without it" if need else ""
    if has_missing_files(base):
        return missing(base, needed)
    tensors = f", {len({f.tensor for f in found})} of {format_count(len(base.tensors), 'tensor')}"
    text = f"base {base.id[:12]}{tensors if read_data else ''}: {found[0].what}"
    return f"{text}; {needed}" if needed else text


def _verdict(report: Report, waiting: list[str]) -> str:
    if not waiting:
        return str(report)
    text = f"{len(report.sound)} of {len(report.sound) + len(report.damaged)} checkpoints are sound"
    text += f", {len(waiting)} as soon as their base is there as it was"
    damaged = [identity[:12] for identity in report.damaged if identity not in waiting]
    return text + (f"; damaged: {', '.join(damaged)}" if damaged else "")


def repair(path: str, *, dry_run: bool) -> tuple[dict[str, Any], str]:
    """Repair the store at a path; return what there is to say, for ``--json`` and for people.

    Of a store whose ``store.json`` is damaged, too, which cannot be opened.
    """
    plan = plan_repair(LocalBackend(check_path(path)))
    document = _document(plan)
    if dry_run:
        return document, f"{plan}\nnothing was changed (--dry-run)"
    result = plan.execute()
    text = str(plan)
    if result.folder is not None:
        text += (
            f"\n{result.files} files ({format_bytes(result.bytes)}) are in {result.folder} now; "
            "nothing was deleted. No checkpoint needs that directory: remove it when you like"
        )
    return {**document, **dataclasses.asdict(result)}, text


def _document(plan: RepairPlan) -> dict[str, Any]:
    return {
        "sound": plan.sound,
        "waiting": [{"id": c.checkpoint, "reasons": c.reasons} for c in plan.waiting],
        "lost": [{"id": c.checkpoint, "reasons": c.reasons} for c in plan.lost],
        "mend": plan.mended,
        "packs": [
            {
                "pack": pack.path,
                "why": pack.why,
                "chunks": pack.records,
                "kept": len(pack.usable) if pack.damaged else pack.records,
            }
            for pack in plan.packs
        ],
        "aside": plan.aside,
    }
