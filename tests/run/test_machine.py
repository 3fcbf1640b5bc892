"""Devices and dtypes; what the process holds and what is free, as the kernel writes it."""

import resource

import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.run import machine
from minirlhf.run.machine import (
    Machine,
    cgroup_free,
    choose_device,
    choose_dtype,
    free_memory,
    peak_bytes,
    process_bytes,
)
from tests.elsewhere import Elsewhere

MEMINFO = "MemTotal:       24682416 kB\nMemFree:  5 kB\nMemAvailable:   3000 kB\n"
STATUS = "Name:\tpython\nVmPeak:\t  900 kB\nVmSize:\t     800 kB\nVmRSS:\t     700 kB\n"


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A /proc of 3,000 KiB without limits; no cgroups."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(MEMINFO)
    (folder / "self/status").write_text(STATUS)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    return folder


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize("cuda, apple, expected", [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"),
])
def test_choose_device_auto_is_the_gpu_if_there_is_one(cuda, apple, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert choose_device("auto") == expected
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["tpu", "meta", "cpu:0", "mps:0", "cuda:", "cuda:-1", "CUDA", ""])
def test_choose_device_refuses_what_is_none(name):
    with pytest.raises(UserError, match=r"neither cpu nor a GPU.*cuda, cuda:N, mps .* or cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "mps"])
def test_choose_device_refuses_what_cannot_compute(name):
    with pytest.raises(UserError, match=f"--device: '{name}' cannot be used .*: use cpu"):
        choose_device(name)


def test_choose_device_takes_an_apple_gpu_that_computes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with Elsewhere("mps"):
        assert choose_device("mps") == "mps"
    with pytest.raises(UserError, match="'mps' cannot be used"):  # and here again it does not
        choose_device("mps")


def test_choose_dtype():
    dtypes = [choose_dtype(name) for name in ("auto", "float32", "bfloat16")]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("device, wanted", [("cpu", True), ("cuda", False), ("mps", False)])
def test_make_deterministic_is_for_a_cpu(device, wanted, monkeypatch):
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(not wanted)
    try:
        machine.make_deterministic(device)
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(before)


def test_process_bytes_is_the_resident_size(proc):
    assert process_bytes("cpu", proc) == 700 * 1024
    assert process_bytes("cuda", proc) == process_bytes("mps", proc) == 0


def test_process_bytes_without_proc_is_the_largest_so_far(tmp_path):
    assert process_bytes("cpu", tmp_path) > 0


def test_peak_bytes_stay_when_memory_is_given_back():
    before, block = process_bytes(), bytearray(64 << 20)  # the kernel counts in batches
    for page in range(0, len(block), 4096):  # until it is written to, it takes nothing
        block[page] = 1
    assert peak_bytes() >= before + (60 << 20)
    del block
    assert peak_bytes() >= before + (60 << 20)


def test_free_memory_is_what_the_system_can_give(proc, tmp_path):
    assert free_memory("cpu", proc, tmp_path) == Machine(3000 * 1024, "MemAvailable")


def test_free_memory_without_proc_is_the_physical_size(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    found = free_memory("cpu", tmp_path, tmp_path)
    assert found.limit == "physical memory" and found.free > 1 << 20


def test_free_memory_is_the_least_of_the_limits(proc, tmp_path, monkeypatch):
    (proc / "self/cgroup").write_text("0::/job\n")
    put(tmp_path / "groups/job", memory__max=2_000_000, memory__current=500_000)
    assert free_memory("cpu", proc, tmp_path / "groups") == Machine(1_500_000, "the cgroup's limit")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (900 * 1024, resource.RLIM_INFINITY))
    assert free_memory("cpu", proc, tmp_path / "groups") == Machine(100 * 1024, "ulimit -v")


def test_free_memory_of_a_gpu_asks_the_driver(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert free_memory("cuda:1") == Machine(7, "cuda:1")


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_memory_of_an_apple_gpu_is_what_metal_says(device, monkeypatch):
    monkeypatch.setattr(machine.torch.mps, "recommended_max_memory", lambda: 900)
    monkeypatch.setattr(machine.torch.mps, "driver_allocated_memory", lambda: 250)
    assert free_memory(device) == Machine(650, device)
    assert peak_bytes(device) == 250


def test_free_memory_refuses_a_meminfo_without_the_line(proc, tmp_path):
    (proc / "meminfo").write_text("MemFree: 5 kB\n")
    with pytest.raises(ValueError, match="no line 'MemAvailable'"):
        free_memory("cpu", proc, tmp_path)


def test_cgroup_free_of_version_2_is_the_least_on_the_way_up(tmp_path):
    put(tmp_path / "a", memory__max=1000, memory__current=700,
        memory__stat="anon 5\nactive_file 50\ninactive_file 100")
    put(tmp_path / "a/b", memory__max="max", memory__current=600)
    assert cgroup_free("0::/a/b\n", tmp_path) == 1000 - 700 + 100
    put(tmp_path / "a/b", memory__max="650")
    assert cgroup_free("0::/a/b\n", tmp_path) == 50


def test_cgroup_free_of_version_1_reads_the_memory_controller(tmp_path):
    put(tmp_path / "memory/job", memory__limit_in_bytes=1000, memory__usage_in_bytes=900,
        memory__stat="inactive_file 1\ntotal_inactive_file 40")
    put(tmp_path / "cpu/job", memory__limit_in_bytes=1, memory__usage_in_bytes=0)
    assert cgroup_free("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n", tmp_path) == 140


def test_cgroup_free_in_a_container_sees_the_top_alone(tmp_path):
    put(tmp_path, memory__max=1000, memory__current=400)
    assert cgroup_free("0::/docker/abc\n", tmp_path) == 600


@pytest.mark.parametrize("groups", ["", "0::/\n", "3:cpu:/job\n"])
def test_cgroup_free_is_none_without_a_limit(groups, tmp_path):
    put(tmp_path, memory__max="max", memory__current=400)
    assert cgroup_free(groups, tmp_path) is None
