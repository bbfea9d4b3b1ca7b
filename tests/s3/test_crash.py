"""The death of the daemon, and of the S3 server with it, at any moment: nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polefs.node import control
from rawfuse.testing.peer import Peer
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.crashload import (
    Outcome,
    State,
    assert_survived,
    assert_synced_survived,
    differences,
    empty_state,
    read_state,
    run_load,
)
from tests.mounted.targets import STRESS
from tests.s3.conftest import MakeVolume, volumes
from tests.s3.server import BUCKET, SeaweedServer
from tests.s3.volumes import S3Volume

WORKERS = 3

CONFIGURATIONS = {
    "s3-plain": ("--durability", "s3"),
    "s3-zstd-encrypted": ("--durability", "s3", "--compress", "zstd", "--encrypt"),
    "local-lz4": ("--durability", "local", "--compress", "lz4"),
    "local-encrypted": ("--durability", "local", "--encrypt"),
}

ROUNDS = dict.fromkeys(CONFIGURATIONS, 25) if STRESS else {"s3-zstd-encrypted": 2, "local-lz4": 1}
"""Deaths of each configuration."""


@pytest.fixture(scope="module")
def mortal_server(s3_server: SeaweedServer) -> Iterator[SeaweedServer]:
    """An S3 server for the volumes of this module alone, to be killed. Its credentials are those in the environment."""
    server = SeaweedServer(Path(tempfile.mkdtemp(prefix="polefs-s3-", dir=os.environ.get("POLEFS_TEST_DIR"))))
    try:
        server.start()
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.discard()


@pytest.fixture
def make_mortal(
    mortal_server: SeaweedServer, watchdog: Watchdog, request: pytest.FixtureRequest
) -> Iterator[MakeVolume]:
    with volumes(mortal_server, watchdog, request) as make:
        yield make


def flush(path: str) -> None:
    """Ask the daemon for a write-back, which may be its last request."""
    with contextlib.suppress(OSError):
        client = control.ControlClient.connect(path)
        if client is not None:
            with client:
                for _ in client.request(control.Flush()):
                    pass


class Crashes:
    """Loads in several directories of a volume, whose daemon and S3 server are killed under them again and again."""

    def __init__(self, volume: S3Volume, server: SeaweedServer, seed: int) -> None:
        self.volume = volume
        self.server = server
        self.rng = random.Random(seed)
        self.places = [volume.root / f"worker{number}" for number in range(WORKERS)]
        self.states: list[State] = [empty_state() for _ in self.places]
        for place in self.places:
            place.mkdir()

    def round(self, seconds: float, *, server: bool, local: bool) -> int:
        """Load for so long, kill the daemon (and the server), lose all that is kept locally if ``local``, mount,
        compare with what was acknowledged, or with what was synced. Returns the number of acknowledged operations."""
        outcomes = self._load(seconds, server)
        if not local and self.rng.random() < 0.3:
            self._start_and_kill()
        if self.rng.random() < 0.3:
            self.volume.fsck("--data")
        if local:
            self.volume.lose_local()
        self.volume.start()
        survived = assert_synced_survived if local else assert_survived
        self.states = [survived(str(place), outcome) for place, outcome in zip(self.places, outcomes, strict=True)]
        return sum(outcome.count for outcome in outcomes)

    def compare(self) -> None:
        """What is in the bucket is all of it."""
        self.volume.stop()
        self.volume.fsck("--data")
        self.volume.lose_local()
        self.volume.start()
        for place, state in zip(self.places, self.states, strict=True):
            assert differences(state, read_state(str(place))) == []
            for files in state.values():
                for file in files.values():
                    file.mtime = None  # where the clock gave it, it is no part of a model

    def _load(self, seconds: float, server: bool) -> list[Outcome]:
        peers = [Peer() for _ in self.places]
        flushing = Peer()
        try:
            for peer, place, state in zip(peers, self.places, self.states, strict=True):
                peer.start(run_load, str(place), state, self.rng.randrange(1 << 30))
            time.sleep(seconds)
            if self.rng.random() < 0.5:
                flushing.start(flush, str(self.volume.path))
                time.sleep(self.rng.random() * 0.2)
            busy = [not peer.finished() for peer in peers]
            if server:
                self._kill_both()
            else:
                self.volume.kill()
            outcomes: list[Outcome] = [peer.result() for peer in peers]
        finally:
            for peer in (*peers, flushing):
                peer.close(kill=True)
        assert all(busy), f"a load ended before the daemon did: {outcomes}"
        return outcomes

    def _kill_both(self) -> None:
        """In either order; or the daemon only when it has gone on with the server that came back."""
        match self.rng.randrange(3):
            case 0:
                self.volume.kill()
                self.server.kill()
                self.server.start()
            case 1:
                self.server.kill()
                time.sleep(self.rng.random() * 0.5)
                self.volume.kill()
                self.server.start()
            case _:
                self.server.kill()
                self.server.start()
                time.sleep(self.rng.random())
                self.volume.kill()

    def _start_and_kill(self) -> None:
        """Kill a daemon while it starts and recovers."""
        self.volume.start(wait=False)
        time.sleep(self.rng.random() * 1.2)
        self.volume.kill()


@pytest.mark.deadline(1800 if STRESS else 180)
@pytest.mark.parametrize("configuration", ROUNDS)
def test_kill_under_load(make_mortal: MakeVolume, mortal_server: SeaweedServer, configuration: str) -> None:
    """Rounds of random length: some longer than the time after which data is written back."""
    # Garbage is collected all the time, and at once.
    volume = make_mortal(*CONFIGURATIONS[configuration], "--grace", "0", mount=("-o", "gc_interval=0.3s"))
    volume.start()
    seed = random.randrange(1 << 30) if STRESS else 1
    print(f"seed {seed}")
    crashes = Crashes(volume, mortal_server, seed)
    total = 0
    for number in range(ROUNDS[configuration]):
        seconds = 7.0 if number % 6 == 5 else 0.3 + crashes.rng.random() * 1.5
        local = configuration.startswith("s3") and number % 4 == 1
        total += crashes.round(seconds, server=number % 2 == 0, local=local)
        if STRESS and number % 3 == 1:
            crashes.compare()
    assert total > ROUNDS[configuration] * 10
