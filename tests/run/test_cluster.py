"""Workers on a real Ray: the same rows as alone, whatever becomes of the workers."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import PATIENCE, tiny_zoo
from support.tiny_images import check_images
from support.tiny_zoo import BRIEF, own_models, sweep_refused

from rft_fast import results, sweep
from rft_fast.run.cluster import connection, dispatch, workers
from rft_fast.run.cluster.actor import Answer
from rft_fast.run.pieces import Piece

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def alone(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The rows of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert sweep.main([*own_models(zoo, "abc"), *BRIEF, "--out", str(out)]) == 0
    return rows_of(out)


def rows_of(out: Path) -> pd.DataFrame:
    return results.load(out).drop(columns="seconds")


def started() -> Callable[[str], bool]:
    """Whether a process was started by this one, or by one that was."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal():
                parents[folder.name] = (folder / "stat").read_text().rpartition(")")[2].split()[1]

    def ours(process: str) -> bool:
        while process not in ("", str(os.getpid())):
            process = parents.get(process, "")
        return process != ""

    return ours


def worker_processes(loaded: bool = False) -> list[int]:
    """The processes of this test's workers: Ray names them after what they do."""
    ours, found = started(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and ours(folder.name):
            try:
                name = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::Actor") and not (loaded and b"__init__" in name):
                found.append(int(folder.name))
    return found


def listening() -> set[str]:
    """The addresses at which this process, and those that it has started, take connections."""
    ours, sockets = started(), {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal():
                for handle in (folder / "fd").iterdir():
                    sockets[os.readlink(handle)] = folder.name
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and ours(sockets.get(f"socket:[{inode}]", "")):
                words = [local[i : i + 8] for i in range(0, len(local.partition(":")[0]), 8)]
                packed = b"".join(bytes.fromhex(word)[::-1] for word in words)
                address = ipaddress.ip_address(packed)
                found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def arguments(zoo: Path, out: Path, workers: str = "2") -> list[str]:
    return [*own_models(zoo, "abc"), *BRIEF, "--workers", workers, "--out", str(out)]


def on_each_row(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object], workers: int = 2) -> None:
    """Calls act(how many measurements there are) after each that is kept, once all workers have loaded."""
    add, count = results.Run.add, 0

    def then(run: results.Run, *measurement: Any) -> None:
        nonlocal count
        add(run, *measurement)
        count += 1
        if count == 1:
            deadline = time.monotonic() + PATIENCE
            while len(worker_processes(loaded=True)) < workers:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        act(count)

    monkeypatch.setattr(results.Run, "add", then)


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_one_killed_in_mid_run(
    zoo: Path, tmp_path: Path, alone: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def act(count: int) -> None:
        if count == 40:
            processes = worker_processes()
            assert len(processes) == 2
            assert listening() == {"127.0.0.1"}
            killed.append(processes[0])
            os.kill(processes[0], signal.SIGKILL)

    on_each_row(monkeypatch, act)
    out = tmp_path / "run"
    assert sweep.main(arguments(zoo, out)) == 0
    assert len(killed) == 1
    pd.testing.assert_frame_equal(rows_of(out), alone, check_exact=True)
    check_images(out)
    assert "a worker died" in (out / "run.log").read_text()
    assert not worker_processes()
    costs = pd.read_csv(out / "cost.csv")
    assert (costs["seconds"] > 0).all() and (costs["peak_memory"] > 1e6).all()


@pytest.mark.parametrize("told", [[0], [0, 1], [0, 1, 2]])
def test_what_a_dead_worker_has_told_is_not_made_again(
    told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all is told, and it dies before it says that it is done."""

    class Lost(Exception):
        pass

    def answer(numbers: Sequence[int], done: bool) -> Answer:
        found = Answer()
        found.measured, found.spent = [(number, [], ()) for number in numbers], (1.0, 1) if done else None
        return found

    class Fake:
        """A worker whose answers are known, or that makes all that it is asked for."""

        def __init__(self, *answers: Answer | Exception) -> None:
            self.answers = deque(answers)
            self.begin = self.more = self
            self.asked: list[tuple[int, ...]] = []

        def remote(self, piece: Piece | None = None, known: object = None) -> object:
            if piece is not None:
                self.asked.append(piece.numbers)
            return self.answers.popleft() if self.answers else answer(self.asked[-1], True)

    def get(reference: Any) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    first, second = Fake(answer(told, False), Lost()), Fake()
    ready, mourned = deque([first]), []

    def mourn(place: str, error: Exception) -> None:
        mourned.append(place)
        ready.append(second)

    crew: Any = SimpleNamespace(
        **{"size": 1, "ready": ready, "loading": False, "models": {}, "record_death": mourn},
        start_up_to=lambda wanted: None,
        request=SimpleNamespace(zoo=SimpleNamespace(own_heads=False)),
    )
    ray = SimpleNamespace(
        wait=lambda references, **_: (references[:1], references[1:]),
        get=get,
        exceptions=SimpleNamespace(RayError=Lost),
    )
    monkeypatch.setattr(dispatch, "client", lambda: ray)
    kept: list[int] = []
    watch: Any = SimpleNamespace(
        begun=lambda piece: None,
        measured=lambda piece, number, rows, images: kept.append(number),
        spent=lambda piece, seconds, peak: None,
    )
    piece = Piece("layers", "a", (0, 1, 2), (1.0, 1.0, 1.0))
    shared: Any = SimpleNamespace(scores=lambda of: {})
    dispatch.Dispatch(crew, [piece], shared, watch).run()
    assert kept == [0, 1, 2] and len(mourned) == 1
    assert second.asked == ([tuple(n for n in (0, 1, 2) if n not in told)] if len(told) < 3 else [])


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_run_of_workers_goes_on_alone_and_the_reverse(
    zoo: Path, tmp_path: Path, alone: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_each_row(patch, lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 30 else None)
        assert sweep.main(arguments(zoo, out)) == 130
    assert "to resume:" in capfd.readouterr().err
    some = len(rows_of(out))
    assert 30 <= some < len(alone)
    # Alone for a while, stopped again, and then by three workers.
    with monkeypatch.context() as patch:
        on_each_row(patch, lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 20 else None, 0)
        assert sweep.main([*own_models(zoo, "abc"), *BRIEF, "--out", str(out)]) == 130
    assert some < len(rows_of(out)) < len(alone)
    assert sweep.main(arguments(zoo, out, "3")) == 0
    pd.testing.assert_frame_equal(rows_of(out), alone, check_exact=True)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_without_the_data_are_told(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "zoo").mkdir()
    own = tiny_zoo.make(tmp_path / "zoo")
    out = tmp_path / "run"
    made = results.Run.__init__

    def then(run: results.Run, *rest: Any, **more: Any) -> None:
        made(run, *rest, **more)  # the first worker has loaded by now, the second has not
        shutil.move(own / "far.npz", own / "away.npz")

    with monkeypatch.context() as patch:
        on_each_row(patch, lambda _: None)
        patch.setattr(results.Run, "__init__", then)
        assert sweep.main(arguments(own, out)) == 1
    errors = capfd.readouterr().err
    assert f"worker on {socket.gethostname()}" in errors and "far.npz" in errors
    assert "every machine needs the same files" in errors

    shutil.move(own / "away.npz", own / "far.npz")

    def change(run: results.Run, *rest: Any, **more: Any) -> None:
        made(run, *rest, **more)
        data = dict(np.load(own / "far.npz"))
        np.savez(own / "far.npz", **(data | {"labels": data["labels"][::-1]}))

    with monkeypatch.context() as patch:
        on_each_row(patch, lambda _: None)
        patch.setattr(results.Run, "__init__", change)
        assert sweep.main(arguments(own, out)) == 1
    errors = capfd.readouterr().err
    assert "the workers differ" in errors and "data.far.sha256" in errors


@pytest.mark.slow
@pytest.mark.ray
def test_a_measurement_that_kills_every_worker_ends_the_run(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    on_each_row(monkeypatch, lambda count: [os.kill(p, signal.SIGKILL) for p in worker_processes()])
    record = workers.Workers.record_death
    monkeypatch.setattr(
        workers.Workers, "record_death", lambda self, _, error: record(self, "one place", error)
    )
    out = tmp_path / "run"
    assert sweep.main(arguments(zoo, out)) == 1
    errors = capfd.readouterr().err
    assert "3 workers died at the same place (one place" in errors and "fewer workers" in errors
    assert len(results.load(out)) >= 1


@pytest.mark.slow
def test_refusals(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*own_models(zoo), "--out", str(tmp_path / "run")]
    sweep_refused([*own, "--workers", "none"], "ray://HOST:PORT")
    sweep_refused([*own, "--workers", "2", "--device", "cuda:1"])
    sweep_refused([*own, "--workers", "2", "--arch", "ViT-B-32"])  # as alone, by the first worker
    with monkeypatch.context() as patch:
        patch.setattr(connection, "find_spec", lambda name: None)
        sweep_refused([*own, "--workers", "2"], "rft-fast[cluster]")
    with monkeypatch.context() as patch:
        patch.setattr(connection, "version", lambda name: "2.58.1")
        sweep_refused([*own, "--workers", "2"], "2.59")
    assert not (tmp_path / "run").exists() and not worker_processes()


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_is_named(
    zoo: Path, tmp_path: Path, alone: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its address, and through Ray's client; and one that is not there."""
    ports = [free_port() for _ in range(2)]
    command = [
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--port={ports[0]}",
        "--include-dashboard=false",
    ]
    command += [f"--ray-client-server-port={ports[1]}", "--disable-usage-stats"]
    ray = Path(sys.executable).with_name("ray")
    # Newer versions of Ray want a token, which other clusters of this machine have, too.
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    # The head starts a process for each client, and gives up on it after 30 s: too little on a busy machine.
    env["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "240"
    head = subprocess.Popen([ray, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    try:
        wait_for(ports, head)
        for number, address in enumerate((f"127.0.0.1:{ports[0]}", f"ray://127.0.0.1:{ports[1]}")):
            out = tmp_path / f"run-{number}"
            asked = [*own_models(zoo, "abc"), *BRIEF, "--workers", address, "--out", str(out)]
            command = [sys.executable, "-m", "rft_fast.sweep", *asked, "--quiet"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
            assert done.returncode == 0, done.stderr
            assert done.stdout == ""
            pd.testing.assert_frame_equal(rows_of(out), alone, check_exact=True)
    finally:
        head.terminate()
        head.wait(PATIENCE)
    for wait in ("INITIAL_TIMEOUT_SEC", "MAX_TIMEOUT_SEC"):  # 30 s in all, else
        monkeypatch.setattr(f"ray.util.client.worker.{wait}", 1)
    gone = [*own_models(zoo), "--workers", f"ray://127.0.0.1:{ports[1]}", "--out", str(tmp_path / "gone")]
    sweep_refused(gone)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "ValueError"),
        ("\n  it is gone \nat line 3\n", "it is gone"),
        (
            "Initialization failure from server:\nTraceback (most recent call last):\n  ...\nOSError: busy\n",
            "Initialization failure from server: OSError: busy",
        ),
        ("nothing follows:\n", "nothing follows:"),
    ],
)
def test_the_reason_of_an_error_is_told_in_one_line(text: str, told: str) -> None:
    assert connection.reason(ValueError(text)) == told


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(ports: list[int], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    for port in ports:
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
