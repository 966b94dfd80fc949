"""What a run takes beside time, as a meter tells it."""

import time

import numpy as np
import pytest

from minference_jax.bench import meters


class Device:
    """A device whose memory in use is first little, then much, then little; its own peak is of a run before."""

    def __init__(self, peak):
        self.used, self.peak = iter([1, 10, 1000, 10]), peak

    def memory_stats(self):
        return {"bytes_in_use": next(self.used, 10), "peak_bytes_in_use": self.peak}


@pytest.fixture
def device(monkeypatch):
    device = Device(5000)
    monkeypatch.setattr(meters.jax, "devices", lambda: [device])
    return device


def test_a_meter_tells_the_peak_and_the_joules_of_its_own_runs(device):
    counter = iter([100.0, 130.0, 200.0, 250.0])
    meter, other = meters.Meter(lambda: next(counter)), meters.Meter(lambda: None)
    for _ in range(2):
        with meter.running():
            time.sleep(0.1)
    with other.running():
        time.sleep(0.1)
    assert (meter.joules, meter.peak_bytes) == ([30.0, 50.0], 1000)
    assert (other.joules, other.peak_bytes) == ([None], 10)
    assert meter.host_peak_bytes > 2**20


def test_a_run_that_raises_the_peak_of_the_device_took_so_much(device):
    meter = meters.Meter(lambda: None)
    with meter.running():
        device.peak = 6000
    assert meter.peak_bytes == 6000


def test_a_peak_of_host_memory_begins_anew_where_the_system_lets_it():
    def peak(size):
        meter = meters.Meter(lambda: None)
        with meter.running():
            np.ones(size, np.uint8)
        return meter

    large, small = peak(2**28), peak(1)
    if small.host_peak_of == "process":
        pytest.skip("this system does not let a process begin its peak anew")
    assert large.host_peak_bytes > small.host_peak_bytes + 2**27
