"""A volume in a bucket that is dumped and loaded: the objects stay where they are."""

from __future__ import annotations

import os
import shutil

from tests.postgres.server import PostgresServer
from tests.s3.conftest import MakeVolume
from tests.s3.faults import FaultProxy
from tests.s3.volumes import polefs


def test_by_way_of_a_database(make_volume: MakeVolume, postgres_server: PostgresServer) -> None:
    volume = make_volume("--encrypt", "--compress", "zstd")
    volume.start()
    contents = os.urandom(2 << 20)
    (volume.root / "big").write_bytes(contents)
    (volume.root / "small").write_text("small")
    volume.stop()
    scratch, dsn = volume.path.parent, postgres_server.new_database()
    polefs("dump", volume.path, scratch / "dump")
    dump = (scratch / "dump").read_bytes()
    for secret in (volume.key_file.read_bytes(), os.environ["AWS_SECRET_ACCESS_KEY"].encode()):
        assert secret not in dump
    polefs("load", scratch / "dump", dsn, "--name", "moved")
    polefs("dump", dsn, scratch / "again", "--name", "moved")
    shutil.rmtree(volume.path)
    polefs("load", scratch / "again", volume.path)
    volume.start()
    assert (volume.root / "big").read_bytes() == contents
    assert (volume.root / "small").read_text() == "small"
    (volume.root / "more").write_bytes(contents)
    volume.stop()
    assert "clean" in volume.fsck("--data")


def test_not_while_its_objects_are_out_of_reach(proxy: FaultProxy, make_volume: MakeVolume) -> None:
    volume = make_volume(endpoint=proxy.endpoint)
    dump, new = volume.path.parent / "dump", volume.path.parent / "new"
    polefs("dump", volume.path, dump)
    proxy.refuse()
    said = polefs("load", dump, new, code=1)
    proxy.accept()
    assert said.startswith("polefs: ") and said.count("\n") == 1, said
    assert not new.exists()
    polefs("load", dump, new)
