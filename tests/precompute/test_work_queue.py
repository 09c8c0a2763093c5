"""Claims: one owner at a time, heartbeat, heirs of the dead; on a disk and behind a URL."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from repcon.precompute import claim_files, work_queue
from repcon.precompute.claim_files import open_claims
from repcon.precompute.work_queue import Leases
from repcon.runtime.errors import UserError

SLOW = {"beat_seconds": 100.0, "stale_seconds": 0.5}
"""It does not beat in the time of a test, as if the process had been stopped."""
FAST = {"beat_seconds": 0.05, "stale_seconds": 0.5}
HOLDER = """
import sys, time
from repcon.precompute.work_queue import Leases
leases = Leases(sys.argv[1], beat_seconds=0.05, stale_seconds=0.5)
leases.__enter__()
print(leases.claim("unit"), flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["disk", "url"])
def folder(request, tmp_path):
    return str(tmp_path / "leases") if request.param == "disk" else f"memory://leases-{uuid.uuid4().hex}"


def test_a_claim_has_one_owner_until_it_is_released(folder):
    with Leases(folder, **FAST) as ours, Leases(folder, **FAST) as theirs:
        assert ours.claim("unit") and not theirs.claim("unit")
        assert theirs.claim("other") and not ours.claim("other")
        ours.release("unit")
        assert theirs.claim("unit")


def test_a_beating_claim_is_never_taken_over(folder):
    with Leases(folder, **FAST) as ours, Leases(folder, **FAST) as theirs:
        assert ours.claim("unit")
        limit = time.monotonic() + 1.5
        while time.monotonic() < limit:
            assert not theirs.claim("unit")
            time.sleep(0.05)


def test_a_claim_that_stopped_beating_is_inherited_once(folder):
    claims = open_claims(folder)
    claims.create("unit", json.dumps({"place": "elsewhere", "pid": 1, "born": "1", "token": "x", "beat": 0}).encode())
    heirs = [Leases(folder, **FAST) for _ in range(4)]
    for heir in heirs:
        heir.__enter__()
    wins = []
    limit = time.monotonic() + 10
    while not wins and time.monotonic() < limit:
        with ThreadPoolExecutor(4) as pool:
            wins += [
                heir for heir, won in zip(heirs, pool.map(lambda heir: heir.claim("unit"), heirs), strict=True) if won
            ]
        time.sleep(0.02)
    assert len(wins) == 1
    for heir in heirs:
        heir.__exit__(None, None, None)


def test_leaving_gives_all_claims_back(tmp_path):
    folder = tmp_path / "leases"
    with Leases(str(folder), **FAST) as ours:
        assert ours.claim("a") and ours.claim("b")
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert not folder.exists()


def test_a_killed_process_s_claim_is_taken_over_at_once(tmp_path):
    folder = str(tmp_path / "leases")
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "True"
        with Leases(folder, beat_seconds=0.05, stale_seconds=1000) as ours:
            assert not ours.claim("unit")
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert ours.claim("unit")


def test_a_process_that_slept_loses_its_claim_and_does_not_take_it_back(tmp_path):
    folder = str(tmp_path / "leases")
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "True"
        holder.send_signal(signal.SIGSTOP)
        with Leases(folder, **FAST) as ours:
            limit = time.monotonic() + 10
            while not ours.claim("unit") and time.monotonic() < limit:
                time.sleep(0.05)
            holder.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            held = json.loads((tmp_path / "leases" / "unit").read_bytes())
            assert held["pid"] == os.getpid()
        holder.kill()


def test_many_claimants_never_share(tmp_path):
    folder, owners, lock = str(tmp_path / "leases"), {}, threading.Lock()

    def claim_all(number):
        with Leases(folder, **FAST) as mine:
            for unit in range(40):
                if mine.claim(f"unit-{unit}"):
                    with lock:
                        owners.setdefault(unit, []).append(number)
            barrier.wait()

    barrier = threading.Barrier(6)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(claim_all, range(6)))
    assert sorted(owners) == list(range(40)) and all(len(each) == 1 for each in owners.values())


def test_hold_waits_for_its_turn(tmp_path):
    order = []
    with Leases(str(tmp_path / "leases"), **FAST) as first, Leases(str(tmp_path / "leases"), **FAST) as second:

        def later():
            with second.hold("store"):
                order.append("second")

        thread = threading.Thread(target=later)
        with first.hold("store"):
            thread.start()
            time.sleep(0.2)
            order.append("first")
        thread.join()
    assert order == ["first", "second"]


def test_the_heart_outlives_whatever_a_file_system_raises(tmp_path, monkeypatch):
    with Leases(str(tmp_path / "leases"), **FAST) as leases:
        assert leases.claim("unit")
        monkeypatch.setattr(leases._files, "read", lambda name: 1 / 0)
        time.sleep(0.2)
        monkeypatch.undo()
        before = leases._files.read("unit")
        time.sleep(0.3)
        assert leases._files.read("unit") != before


def test_a_beat_that_could_not_be_written_costs_nothing(tmp_path, monkeypatch):
    def full(name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with Leases(str(tmp_path / "leases"), **FAST) as leases, Leases(str(tmp_path / "leases"), **FAST) as other:
        assert leases.claim("unit")
        before = leases._files.read("unit")
        monkeypatch.setattr(leases._files, "write", full)
        time.sleep(0.2)
        monkeypatch.undo()
        time.sleep(0.3)
        assert leases._files.read("unit") != before and not other.claim("unit")
        leases.release("unit")
        assert other.claim("unit")


def test_a_claim_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    with Leases(str(tmp_path / "leases"), **FAST) as owner, Leases(str(tmp_path / "leases"), **FAST) as other:
        assert owner.claim("unit")
        stale, plain = [OSError(errno.ESTALE, "stale file handle")], claim_files.read_file

        def once(path: Path) -> bytes:
            if stale:
                raise stale.pop()
            return plain(path)

        monkeypatch.setattr(claim_files, "read_file", once)
        assert not other.claim("unit")
        assert not stale


@pytest.mark.parametrize("how", ["create", "replace_dead"])
def test_a_claim_whose_answer_was_lost_is_held_at_once(folder, monkeypatch, how):
    """As where a server writes the object and answers with an error: the repeated request finds the object there."""
    with Leases(folder, beat_seconds=0.05, stale_seconds=0.5) as ours, Leases(folder, **FAST) as theirs:
        if how == "replace_dead":
            foreign = {"place": "elsewhere", "pid": 1, "born": "1", "token": "x", "beat": 0}
            open_claims(folder).create("unit", json.dumps(foreign).encode())
            assert not ours.claim("unit")
            time.sleep(0.6)
        plain = getattr(ours._files, how)
        monkeypatch.setattr(ours._files, how, lambda *given: plain(*given) and False)
        assert ours.claim("unit") and ours.get("unit").is_held() and not theirs.claim("unit")
        assert ours.get("unit").inherited == (how == "replace_dead")
        assert not ours.claim("unit") and not ours.is_free("unit") and ours.get("unit").is_held()


def test_claims_need_no_hard_links(tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with Leases(str(tmp_path / "leases"), **FAST) as ours, Leases(str(tmp_path / "leases"), **FAST) as theirs:
        assert ours.claim("unit") and not theirs.claim("unit")
        ours.release("unit")
        assert theirs.claim("unit")


def test_whoever_was_taken_for_dead_does_not_hold_its_claim(folder):
    with Leases(folder, **SLOW) as ours, Leases(folder, **SLOW) as theirs:
        assert ours.claim("unit")
        claim = ours.get("unit")
        assert claim.is_held() and not claim.inherited and not theirs.get("unit").is_held()
        limit = time.monotonic() + 10
        while not theirs.claim("unit") and time.monotonic() < limit:  # it does not beat: it stands still
            time.sleep(0.02)
        assert theirs.get("unit").is_held() and theirs.get("unit").inherited
        assert not claim.is_held()
        ours.release("unit")
        theirs.release("unit")
        assert not claim.is_held() and ours.claim("unit") and claim.is_held()


def test_a_silent_owner_gives_a_sign_of_life_before_it_goes_on(folder):
    with Leases(folder, **SLOW) as ours, Leases(folder, **SLOW) as theirs:
        assert ours.claim("unit") and not theirs.claim("unit")
        for _ in range(6):
            time.sleep(0.2)
            assert ours.is_held("unit") and not theirs.claim("unit")


def test_a_beat_during_which_the_process_stood_still_counts_for_nothing(folder, monkeypatch):
    """Between its look and its writing another may have taken the claim over: then it is over."""
    with Leases(folder, **SLOW) as ours:
        assert ours.claim("unit")
        plain = ours._files.write
        monkeypatch.setattr(ours._files, "write", lambda *given: (time.sleep(0.3), plain(*given)))
        time.sleep(0.3)
        assert not ours.is_held("unit")


def test_a_claim_that_cannot_be_read_is_not_taken_for_held(tmp_path, monkeypatch):
    with Leases(str(tmp_path / "leases"), **SLOW) as ours:
        assert ours.claim("unit")

        def broken(path):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(claim_files, "read_file", broken)
        with pytest.raises(UserError, match="leases/unit: whether this process still has its claim cannot be read"):
            ours.is_held("unit")
        monkeypatch.undo()


def test_a_claim_on_a_full_disk_names_its_file(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Leases(str(tmp_path / "leases"), **FAST) as ours:
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"leases/unit: the claim cannot be written \(No space left"):
            ours.claim("unit")
        monkeypatch.undo()


def test_a_long_wait_says_for_whom(tmp_path, monkeypatch):
    monkeypatch.setattr(work_queue, "_QUIET_SECONDS", 0.1)
    folder, told = str(tmp_path / "leases"), []
    foreign = {"place": "node7 boot ns", "pid": 4711, "born": "1", "token": "x", "beat": 0}
    open_claims(folder).create("store", json.dumps(foreign).encode())
    with Leases(folder, beat_seconds=0.05, stale_seconds=1.0, on_wait=told.append) as leases, leases.hold("store"):
        pass
    (line,) = told
    assert f"waiting for {folder}/store, which is held by process 4711 on node7" in line and "after 1 s" in line


@pytest.mark.timeout(30)
def test_a_pipe_in_a_claims_place_is_an_error_and_no_wait(tmp_path):
    (tmp_path / "leases").mkdir()
    os.mkfifo(tmp_path / "leases" / "unit")
    with Leases(str(tmp_path / "leases"), **FAST) as leases, pytest.raises(UserError, match="not a plain file"):
        leases.claim("unit")
