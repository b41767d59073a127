"""The generations of every evaluation are written, and the wrong ones are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from tests.support.tiny_runs import make_config
from trainer.cli.main import main
from trainer.data.load import load_mixture
from trainer.journal import effective, read
from trainer.model.load import load_model
from trainer.training.directory import PREDICTIONS

METRIC = """
def length(generations, references, rows):
    return [float(len(text)) for text in generations]


length.mode = "min"
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("trainer.training.run.write_report", lambda directory: None)


def make(directory, **changes):
    """Return a configuration whose last evaluation has right answers, and wrong ones."""
    settings = {
        "msft__compute_budget": 20.0,
        "msft__max_stages": 1,
        "evaluation__eval_every": 10.0,
        "evaluation__metric": "exact_match",
        **changes,
    }
    return make_config(directory, **settings)


def run(directory, *overrides):
    return main(["run", str(directory / "config.yaml"), "--quiet", *overrides])


def show(capsys, *arguments):
    """Return exit code, stdout and stderr of the command."""
    code = main(["predictions", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def lines(path):
    content = zstandard.ZstdDecompressor().decompress(path.read_bytes())
    return [json.loads(line) for line in content.splitlines()]


def test_each_evaluation_has_its_generations_beside_the_references(tmp_path):
    config = make(tmp_path)
    assert run(tmp_path) == 0
    folder = Path(config.output_dir)
    records = effective(read(folder / "journal.jsonl"))
    evaluated = [r for r in records if r["event"] == "evaluated" and not r["reused"]]
    names = {f"{r['stage']}-{r['epoch']:.6g}.jsonl.zst": r for r in evaluated}
    assert {path.name for path in (folder / PREDICTIONS).iterdir()} == set(names)
    loaded = load_model(config.model)
    mixture = load_mixture(config.data, loaded.tokenizer)
    for file, record in names.items():
        rows = lines(folder / PREDICTIONS / file)
        for name, sub in mixture.items():
            own = [row for row in rows if row["sub_dataset"] == name]
            examples = {loaded.tokenizer.decode(e.prompt): e for e in sub.validation.examples}
            assert [row["right"] for row in own] == sorted(row["right"] for row in own)
            assert {row["prompt"] for row in own} == set(examples)
            assert sum(row["right"] for row in own) / len(own) == record["metrics"][name]
            for row in own:
                assert row["reference"] == row["expected"] == examples[row["prompt"]].reference
                assert row["right"] == (row["complete"] and row["answer"] == row["expected"])
                assert row["answer"] == row["generation"].strip()


def test_the_command_shows_the_wrong_ones_of_the_result(tmp_path, capsys):
    config = make(tmp_path, evaluation__max_examples=4)
    assert run(tmp_path, "evaluation.predictions=3") == 0
    capsys.readouterr()
    code, out, err = show(capsys, config.output_dir, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    summary = [r for r in read(Path(config.output_dir) / "journal.jsonl") if "decision" in r][-1]
    result = next(
        r
        for r in read(Path(config.output_dir) / "journal.jsonl")
        if r["event"] == "evaluated" and r["checkpoint"] == summary["checkpoint"]
    )
    assert (found["stage"], found["epoch"]) == (result["stage"], pytest.approx(result["epoch"]))
    assert found["written"] == {"copy": 3, "same": 3, "sum": 3}
    assert found["examples"]
    assert not any(row["right"] for row in found["examples"])
    code, out, _ = show(capsys, config.output_dir, "--at", "1-0", "--sub-dataset", "sum")
    assert code == 0
    assert out.startswith("stage 1, epoch 0\n\nsum: 3 of 3 written generations are wrong\n\n")
    assert out.count("  prompt     ") == 3
    assert "'4+0='" in out
    assert "(cut off: it is wrong already)" in out
    code, out, _ = show(capsys, config.output_dir, "--at", "1-0", "--limit", "1", "--all")
    assert out.count("  prompt     ") == 3
    assert "the first 1 of them are below" in out


def test_scores_of_a_function_are_shown_from_the_worst(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(METRIC, encoding="utf-8")
    config = make(tmp_path)
    run(tmp_path, f"evaluation.metric={tmp_path / 'mine.py'}:length")
    capsys.readouterr()
    code, out, _ = show(capsys, config.output_dir, "--json", "--sub-dataset", "copy")
    scores = [row["score"] for row in json.loads(out)["examples"]]
    assert code == 0
    assert scores == sorted(scores, reverse=True) != []
    assert {row["right"] for row in json.loads(out)["examples"]} == {None}


def test_what_is_missing_is_named(tmp_path, capsys):
    config = make(tmp_path)
    assert run(tmp_path, "evaluation.metric=loss") == 0
    assert not (Path(config.output_dir) / PREDICTIONS).exists()
    code, _, err = show(capsys, config.output_dir)
    assert code == 1
    assert "the metrics of the run need none" in err
    other = tmp_path / "none"
    run(tmp_path, "evaluation.predictions=0", f"output_dir={other}")
    assert not (other / PREDICTIONS).exists()
    third = tmp_path / "third"
    run(tmp_path, f"output_dir={third}")
    capsys.readouterr()
    for arguments, message in (
        (("--at", "9-9"), "there are no generations of evaluation '9-9' in"),
        (("--sub-dataset", "sums"), "no generations of 'sums', only of copy, same, sum; did you"),
    ):
        code, _, err = show(capsys, third, *arguments)
        assert code == 1
        assert message in err
        assert err.count("\n") == 1
    (third / PREDICTIONS / "1-0.jsonl.zst").write_bytes(b"torn")
    code, _, err = show(capsys, third, "--at", "1-0")
    assert code == 1
    assert "is damaged" in err


def test_long_texts_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.training.predictions._LONGEST", 2)
    config = make(tmp_path)
    run(tmp_path)
    for row in lines(Path(config.output_dir) / PREDICTIONS / "1-0.jsonl.zst"):
        assert len(row["prompt"]) == 3
        assert row["prompt"].endswith("…")
