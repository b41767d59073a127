"""The examples for contributors run, and each fits on a page."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msft_store.codec.codecs import Codec
from msft_store.format.dtypes import DTYPES

FOLDER = Path(__file__).parent.parent / "examples" / "extend"


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_shorter_than_60_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_the_codec_saves_bytes_and_refuses_damage(capsys: pytest.CaptureFixture[str]) -> None:
    constant: Codec = run("codec")["Constant"](200, "constant")
    assert capsys.readouterr().out.startswith("constant takes 2 bytes, ")
    with pytest.raises(ValueError, match="wrong length"):
        constant.decode_into(b"\0", np.zeros(8, np.uint8), next(d for d in DTYPES if d.size == 2))


def test_the_policy_keeps_every_fourth_step_and_the_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("retention_policy")
    assert capsys.readouterr().out.splitlines() == [
        "step 4: step 4 is a multiple of 4",
        "step 8: step 8 is a multiple of 4",
        "step 10: one of the last 1",
    ]


def test_a_metric_of_lm_eval_finds_the_right_choices(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    run("lm_eval_metric")
    assert capsys.readouterr().out.splitlines()[-1] == "[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]"


def test_the_strategy_stops_early_with_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    kind = run("strategy")["EarlyStopping"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("epoch 1.5: Stop(checkpoint='1.1'")
    strategy = kind(sub_datasets=["arith"], mode="max", compute_budget=1.0, patience=2)
    assert strategy.first_stage().active == ("arith",)
