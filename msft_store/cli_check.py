"""``msft-store check`` and ``repair``: what they print.

Example::

    document, text = repair("run/store", dry_run=True)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from msft_store.backend import LocalBackend
from msft_store.check import Report
from msft_store.paths import local_path
from msft_store.render import human
from msft_store.repair import RepairPlan, plan_repair
from msft_store.store import Store


def examine(store: Store, *, read_data: bool) -> tuple[Report, str]:
    """Look for damage; return what there is to say, for ``--json`` and for people."""
    report = store.examine(read_data=read_data)
    how = "all data read" if read_data else "structure only; --read-data reads all data"
    if not report.findings:
        return report, f"no errors ({how})"
    advice = "msft-store repair --dry-run shows what can be kept, and how"
    return report, "\n".join([*map(str, report.findings), f"{report} ({how})", advice])


def repair(path: str, *, dry_run: bool) -> tuple[dict[str, Any], str]:
    """Repair the store at a path; return what there is to say, for ``--json`` and for people.

    Of a store whose ``store.json`` is damaged, too, which cannot be opened.
    """
    plan = plan_repair(LocalBackend(local_path(path)))
    document = _document(plan)
    if dry_run:
        return document, f"{plan}\nnothing was changed (--dry-run)"
    result = plan.execute()
    text = str(plan)
    if result.folder is not None:
        text += (
            f"\n{result.files} files ({human(result.bytes)}) are in {result.folder} now; "
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
