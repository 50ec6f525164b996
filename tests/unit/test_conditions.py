"""What is said of the conditions, and what is left unsaid where nothing was watched."""

from typing import Any

from kvbench.conditions import of_workload

CELL: dict[str, Any] = {
    "status": "ok",
    "variant": "baseline",
    "interval_share": 0.01,
    "tpot_noise": 0.002,
    "settled": True,
}


def said(*cells: dict[str, Any]) -> dict[str, str]:
    return {finding.about: finding.text for finding in of_workload([CELL | cell for cell in cells])}


def test_noise_is_said_with_the_precision_that_was_asked() -> None:
    assert said({}, {"tpot_noise": 0.004})["Noise"] == "the median TPOT is known to within 0.20 to 0.40%; asked: 1%."
    late = said({}, {"variant": "knorm", "settled": False, "tpot_noise": 0.03})["Noise"]
    assert late.endswith("not reached before the cap on repeats: knorm.")


def test_a_cpu_says_nothing_of_clocks() -> None:
    assert said({}).keys() == {"Noise"}


def test_throttled_runs_are_named() -> None:
    watched = {"sm_clock_mhz": 1980.0, "temperature_c": 51.0, "power_w": 640.0, "slowed_by": None}
    assert said(watched)["Throttling"] == "no run was slowed by heat or by the hardware."
    assert said(watched | {"slowed_by": "power cap"})["Throttling"].endswith("power cap was reached.")
    hot = said(watched | {"throttled_repeats": 2, "slowed_by": "hardware thermal slowdown"})["Throttling"]
    assert "left out: 2 of baseline (hardware thermal slowdown)" in hot
    never = said(watched | {"throttled_repeats": 6, "throttled": True, "slowed_by": "power brake"})["Throttling"]
    assert never == "heat or the hardware slowed every run of baseline, and the figures are of such runs (power brake)."
    assert said(watched)["Device"] == "SM clock 1,980 MHz, 51 °C, 640 W during the runs, prefill and decode."


def test_the_time_around_a_measurement_is_told() -> None:
    cell = {"import_s": 2.0, "load_s": 0.31, "work_s": 12.0, "load_state": "warm", "tokenization_s": 0.004}
    text = said(cell)["Time of a job"]
    assert text == (
        "import 2.0 s, load 0.31 s, measurement 12 s (weights' files warm); tokenizing the batch 4 ms, in no TTFT here."
    )


def test_failed_cells_have_no_conditions() -> None:
    assert of_workload([CELL | {"status": "oom"}]) == []
