"""``msft-store check`` and ``repair``.

Example::

    document, text = repair(options)
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from msft_store._util import check_path, format_bytes, format_count
from msft_store.cli.output import UNCHANGED, format_missing_base
from msft_store.cli.remote import store_path
from msft_store.maintenance.check import Finding, Report
from msft_store.maintenance.repair.plan import RepairPlan, plan_repair
from msft_store.objects.bases import Base, has_missing_files
from msft_store.storage.backend import LocalBackend
from msft_store.store import Store


def check(store: Store, options: argparse.Namespace) -> tuple[Report, str]:
    """Check a store for damage; return the report, and its text for people.

    The text has one line for all findings in the files of a base.
    """
    report = store.examine(options.read_data)
    scope = "all data read" if options.read_data else "structure only; --read-data reads all data"
    if not report.findings:
        return report, f"no errors ({scope})"
    bases = {base.id: base for base in store.bases()}
    base_of = {checkpoint.id: checkpoint.base for checkpoint in store.log()}
    of_bases: dict[str, list[Finding]] = {}
    others: list[Finding] = []
    for finding in report.findings:
        base = bases.get(finding.base or base_of.get(finding.checkpoint or "") or "")
        if base is not None and finding.file in dict(base.files):
            of_bases.setdefault(base.id, []).append(finding)
        else:
            others.append(finding)
    damaged = {finding.checkpoint for finding in others}
    waiting = [identity for identity in report.damaged if identity not in damaged]
    lines = [str(finding) for finding in others]
    for identity, found in of_bases.items():
        dependent = {f.checkpoint for f in found if f.checkpoint}
        lines.append(_format_base_findings(bases[identity], found, len(dependent), options))
    lines.append(f"{_format_verdict(report, waiting)} ({scope})")
    if others:
        lines.append("msft-store repair --dry-run shows what can be kept, and how")
    return report, "\n".join(lines)


def _format_base_findings(
    base: Base, found: list[Finding], dependent: int, options: argparse.Namespace
) -> str:
    consequence = (
        f"{format_count(dependent, 'checkpoint')} cannot be restored without it"
        if dependent
        else ""
    )
    if has_missing_files(base):
        return format_missing_base(base, consequence)
    tensors = f", {len({f.tensor for f in found})} of {format_count(len(base.tensors), 'tensor')}"
    text = f"base {base.id[:12]}{tensors if options.read_data else ''}: {found[0].what}"
    return f"{text}; {consequence}" if consequence else text


def _format_verdict(report: Report, waiting: list[str]) -> str:
    if not waiting:
        return str(report)
    text = f"{len(report.sound)} of {len(report.sound) + len(report.damaged)} checkpoints are sound"
    text += f", {len(waiting)} as soon as the original files of their base are back"
    damaged = [identity[:12] for identity in report.damaged if identity not in waiting]
    return text + (f"; damaged: {', '.join(damaged)}" if damaged else "")


def repair(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Repair a store, even one that a damaged ``store.json`` prevents from opening."""
    plan = plan_repair(LocalBackend(check_path(store_path(options))))
    document = _document(plan)
    if options.dry_run:
        return document, f"{plan}\n{UNCHANGED}"
    result = plan.execute()
    text = str(plan)
    if result.folder is not None:
        text += (
            f"\n{result.files} files ({format_bytes(result.bytes)}) are in {result.folder} now; "
            "nothing was deleted. No checkpoint needs that directory, so you may delete it"
        )
    return {**document, **dataclasses.asdict(result)}, text


def _document(plan: RepairPlan) -> dict[str, Any]:
    return {
        "sound": plan.sound,
        "waiting": [{"id": c.checkpoint, "reasons": c.reasons} for c in plan.waiting],
        "lost": [{"id": c.checkpoint, "reasons": c.reasons} for c in plan.lost],
        "mend": plan.recovered,
        "packs": [
            {
                "pack": pack.path,
                "why": pack.why,
                "chunks": pack.records,
                "kept": len(pack.usable) if pack.damaged else pack.records,
            }
            for pack in plan.packs
        ],
        "aside": plan.quarantined,
    }
