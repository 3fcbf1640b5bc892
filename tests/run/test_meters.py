"""Averages of a log window, and that a checkpoint can hold them."""

import json

from minirlhf.run.meters import AverageMeter, Meters


def test_average_meter_weighs_by_n():
    meter = AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0)
    assert (meter.val, meter.sum, meter.count) == (5.0, 8.0, 4)  # 3 * 1 + 5
    assert meter.avg == 2.0


def test_average_meter_is_0_before_anything_and_after_reset():
    meter = AverageMeter()
    assert meter.avg == 0.0
    meter.update(7.0)
    meter.reset()
    assert (meter.val, meter.sum, meter.count, meter.avg) == (0.0, 0.0, 0, 0.0)


def test_meters_flush_gives_the_averages_and_empties_the_window():
    meters = Meters()
    meters.update({"loss": 1.0, "margin": 2.0}, 2)
    meters.update({"loss": 4.0}, 1)
    assert meters.flush() == {"loss": 2.0, "margin": 2.0}  # (2 * 1 + 4) / 3
    assert meters.flush() == {}


def test_meters_round_trip_through_json_to_the_last_bit():
    meters, other = Meters(), Meters()
    for value in (0.1, 0.2, 1e-300, 1 / 3):
        meters.update({"loss": value}, 7)
    other.update({"stale": 1.0})
    other.load(json.loads(json.dumps(meters.as_dict())))
    assert other.as_dict() == meters.as_dict()
    for window in (meters, other):
        window.update({"loss": 0.7}, 3)
    assert other.flush() == meters.flush()
