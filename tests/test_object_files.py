"""Objects as files, by parts and over a way that breaks."""

import gzip
import os

import pytest

from ip2p_ray import object_files, objects
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.testing import FaultyWay, WayFaults


def test_an_object_reads_as_a_file(bucket):
    objects.write(f"{bucket}/folder/a.txt.gz", gzip.compress(b"a cat\na dog\n"))
    file = object_files.ObjectFile(f"{bucket}/folder/a.txt.gz")
    assert (file.name, str(file)) == ("a.txt.gz", f"{bucket}/folder/a.txt.gz")
    for _ in range(2):
        with file.open() as stream, gzip.open(stream, "rt") as text:
            assert text.read() == "a cat\na dog\n"
    with pytest.raises(DatasetError, match="there is no such object"):
        object_files.ObjectFile(f"{bucket}/folder/b").open()
    with pytest.raises(ConfigError, match="opened as rb, got w"):
        file.open("w")


def test_a_small_part_that_was_refused_is_asked_for_again(bucket, bucket_endpoint, monkeypatch):
    data = os.urandom(100)
    objects.write(f"{bucket}/a", data)
    faults = WayFaults(slow_down=0.3, cut=0.2, methods=("GET",))
    with FaultyWay(bucket_endpoint, faults) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with object_files.ObjectFile(f"{bucket}/a").open() as stream:
            assert stream.seek(-10, os.SEEK_END) == 90
            assert stream.read() == data[-10:]
            assert stream.read(1) == b""
            for start in range(0, 100, 8):
                stream.seek(start)
                assert stream.read(8) == data[start : start + 8]
    assert min(way.counts["slow_down"], way.counts["cut"]) > 0
