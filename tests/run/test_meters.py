"""Averages of a log window, and that a checkpoint can hold them."""

import json

from minirlhf.run.meters import AverageMeter, Meters, Stopwatch


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


def test_stopwatch_laps_add_up_to_its_total(monkeypatch):
    now = iter([10.0, 11.0, 13.5, 13.5])
    monkeypatch.setattr("minirlhf.run.meters.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    watch.lap("sample")
    watch.lap("learn")
    clock = watch.clock("step", {"rows": 7})
    assert clock == {"sample": 1.0, "learn": 2.5, "step": 3.5, "rows": 2.0}


def test_stopwatch_without_laps_tells_what_has_passed(monkeypatch):
    now = iter([10.0, 12.0])
    monkeypatch.setattr("minirlhf.run.meters.time.perf_counter", lambda: next(now))
    assert Stopwatch().clock("step", {"tokens": 8}) == {"step": 2.0, "tokens": 4.0}
