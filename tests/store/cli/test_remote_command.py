"""msft-store push, pull and clone: their output, errors and exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from msft_store import Base, Store
from msft_store.cli.main import main
from tests.support.states import State, make_state, same_bits, train_step


@pytest.fixture
def url(store: Store, base: Base, state: State) -> str:
    """Return an empty place; the store has something to push."""
    store.pin(store.save(train_step(state, 0.05, 1), parent=base, step=7), "best")
    return f"memory://{uuid.uuid4().hex}/run"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command; return exit code, stdout and stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command with ``--json``; return its output."""
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_push_clone_and_pull(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "--store", store.path, "push", url, "--with-base")
    assert (code, err) == (0, "")
    assert out.startswith("1 checkpoint in 1 pack, ")
    assert f"best -> {store.refs()['best'][:12]}" in out
    assert run(capsys, "push", url, "--store", store.path)[:2] == (0, "nothing to do\n")
    Path(store.bases()[0].path).unlink()
    found = document(capsys, "clone", url, tmp_path / "clone", "--with-base")
    assert found["checkpoints"] == [store.refs()["best"]]
    assert found["refs"] == [{"name": "best", "before": None, "after": store.refs()["best"]}]
    assert found["base_bytes"] > 0
    assert found["unverified"] == 0
    copy = Store.open(tmp_path / "clone")
    assert copy.check() == []
    copy.pin(copy.save(make_state(3), step=9), "new")
    assert document(capsys, "push", url, "--store", copy.path)["packs"] == 1
    assert document(capsys, "pull", url, "--store", store.path)["packs"] == 1
    assert same_bits(store.load("new"), make_state(3))


def test_bases_go_to_the_given_directory(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    run(capsys, "--store", store.path, "push", url, "--with-base")
    Path(store.bases()[0].path).unlink()
    at = ("--with-base", "--base-directory", tmp_path / "models")
    assert document(capsys, "clone", url, tmp_path / "clone", *at)["base_bytes"] > 0
    assert Store.open(tmp_path / "clone").bases()[0].path.startswith(str(tmp_path / "models"))


def test_a_store_at_a_url_can_be_read_but_not_changed(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    run(capsys, "--store", store.path, "push", url)
    assert document(capsys, "--store", url, "log")[0]["step"] == 7
    assert "best" in run(capsys, "--store", url, "inspect")[1]
    assert run(capsys, "--store", url, "check", "--read-data")[0] == 0
    assert run(capsys, "--store", url, "export", "best", tmp_path / "model")[0] == 0
    assert document(capsys, "--store", url, "gc", "--dry-run")["delete"] == []
    for command in (("forget", "best"), ("pin", "best", "b"), ("gc",), ("unpin", "best")):
        code, out, err = run(capsys, "--store", url, *command)
        assert (code, out) == (1, "")
        assert err.startswith("msft-store: cannot ")
        assert "only read in place" in err
    for command in (("repair",), ("init", url), ("push", tmp_path / "x"), ("pull", tmp_path)):
        code, out, err = run(capsys, "--store", url, *command)
        assert (code, out) == (1, "")
        assert "Traceback" not in err
    assert not Path("memory:").exists()


def test_a_single_place_is_refused_with_the_complete_command(
    capsys: pytest.CaptureFixture[str],
    store: Store,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for command in ("push", "pull"):
        for place, right in ((store.path, f"{store.path} URL"), (url, f"STORE {url}")):
            code, out, err = run(capsys, command, place)
            assert (code, out) == (1, "")
            assert err.endswith(f": msft-store {command} {right}\n")


def test_refusals_are_one_sentence(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    for arguments, part in (
        (("clone", url, tmp_path / "clone"), "no store at memory://"),
        (("pull", url, "--store", store.path), "no store at memory://"),
        (("push", "nonsense://x", "--store", store.path), "cannot hold a store"),
        (("push", url, "--store", tmp_path / "nothing"), "no store at"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "")
        assert part in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "clone").exists()


def test_a_conflict_names_the_ref_and_force_moves_it(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    run(capsys, "--store", store.path, "push", url)
    run(capsys, "clone", url, tmp_path / "clone")
    copy = Store.open(tmp_path / "clone")
    copy.pin(copy.save(make_state(3)), "best")
    run(capsys, "--store", copy.path, "push", url)
    store.pin(store.save(make_state(4)), "best")
    for command in ("push", "pull"):
        code, _, err = run(capsys, "--store", store.path, command, url)
        assert code == 1
        assert "'best'" in err
        assert "--force" in err
    moved = document(capsys, "--store", store.path, "push", url, "--force")["refs"]
    assert moved[0]["after"] == store.refs()["best"]
    copy.pin(copy.save(make_state(5)), "best")
    assert run(capsys, "--store", copy.path, "pull", url, "--force")[0] == 0
    assert copy.refs() == store.refs()


@pytest.mark.parametrize(("package", "place"), [("obstore", "s3://b/x"), ("fsspec", "memory://b")])
def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    place: str,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, "--store", store.path, "push", place)
    assert code == 1
    assert f"{package}: pip install 'msft-store[remote]'" in err


def test_the_store_may_come_before_the_url(
    capsys: pytest.CaptureFixture[str], store: Store, url: str, tmp_path: Path
) -> None:
    assert run(capsys, "push", store.path, url, "--with-base")[0] == 0
    assert run(capsys, "clone", tmp_path / "one", url)[0] == 0
    assert run(capsys, "clone", url, tmp_path / "two")[0] == 0
    copy = Store.open(tmp_path / "two")
    copy.pin(copy.save(make_state(3), step=9), "new")
    assert run(capsys, "--json", "push", copy.path, url)[0] == 0
    assert document(capsys, "pull", tmp_path / "one", url)["packs"] == 1
    assert Store.open(tmp_path / "one").refs() == copy.refs()
    for arguments, part in (
        (("push", url, store.path), "the store comes first"),
        (("pull", store.path, url, "--store", tmp_path / "one"), "two stores are given"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "")
        assert part in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_progress_and_erases_it(
    capsys: pytest.CaptureFixture[str],
    store: Store,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments, steps in (
        (("push", store.path, url, "--with-base"), ("read the base", "send the base", "send")),
        (("clone", url, tmp_path / "clone"), ("fetch", "verify")),
    ):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main([str(argument) for argument in arguments]) == 0
        for step in steps:
            assert f"\r{step}: " in terminal.getvalue()
        assert "B/s]" in terminal.getvalue()
        assert terminal.getvalue().rpartition("]")[2].strip(" \r") == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["pull", store.path, url, "--json"]) == 0
    assert terminal.getvalue() == ""


_STARTED = """
import signal, sys
from msft_store.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def test_ctrl_c_ends_at_once_with_one_sentence(store: Store) -> None:
    """Ctrl-C also ends a library that waits for a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        waiting = subprocess.Popen(
            [sys.executable, "-c", _STARTED, "push", store.path, "s3://bucket/run"],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
                "NO_PROXY": "127.0.0.1",
            },
        )
        with waiting:
            silent.accept()
            begun = time.monotonic()
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=60)
    # The library itself waits for ten seconds.
    assert time.monotonic() - begun < 9
    assert waiting.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
