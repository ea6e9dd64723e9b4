"""The README's figure: right places, valid XML, a refusal where there is nothing to draw."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.reporting.figure import (
    BOTTOM,
    LABEL_HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    _spread,
    draw,
    main,
    validation_points,
    write_figure,
)
from prorl_nemo.reporting.run import read_run
from prorl_nemo.training.metrics import RunLog

SVG = "{http://www.w3.org/2000/svg}"


def run_with(run_dir: Path, points: list[tuple[int, float | None, float]]) -> Path:
    with RunLog(run_dir) as log:
        log.metrics({"kind": "train", "step": 1})
        for step, mean, error in points:
            log.metrics(
                {
                    "kind": "validation",
                    "step": step,
                    "validation/mean": mean,
                    "validation/stderr": error,
                }
            )
    return run_dir


def path_of(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = element.attrib["d"].strip("MZ").split("L")
    return [(float(x), float(y)) for x, y in (pair.split() for pair in pairs)]


def test_curve_and_band_by_hand() -> None:
    """Scores 0.2 to 0.8 with bands of 0.1 each side: zero is near 0.1, so the axis runs from 0 to
    0.9 + 5% of 0.9 = 0.945."""
    root = ElementTree.fromstring(
        draw([("seed 1", [(0, 0.2, 0.1, 0.3), (100, 0.8, 0.7, 0.9)])], "a < b")
    )
    height = BOTTOM - TOP
    y = {value: BOTTOM - value / 0.945 * height for value in (0.1, 0.2, 0.3, 0.7, 0.8, 0.9)}
    group = root.find(f"{SVG}g")
    assert group is not None
    band, curve = group.findall(f"{SVG}path")
    right = WIDTH - RIGHT
    flat = [c for point in path_of(curve) for c in point]
    assert flat == pytest.approx([LEFT, y[0.2], right, y[0.8]], abs=0.06)  # one decimal is kept
    flat = [c for point in path_of(band) for c in point]
    assert flat == pytest.approx(
        [LEFT, y[0.3], right, y[0.9], right, y[0.7], LEFT, y[0.1]], abs=0.06
    )
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a < b" in texts
    assert "0.800 seed 1" in texts
    assert "training step" in texts


def test_labels_do_not_overlap_and_keep_their_order() -> None:
    assert _spread([100, 10, 12]) == [100, 10, 10 + LABEL_HEIGHT]
    assert _spread([]) == []
    # Curves that end at the bottom: below it are the steps, and then the figure's edge.
    assert _spread([BOTTOM, BOTTOM - 1]) == [BOTTOM, BOTTOM - LABEL_HEIGHT]


def test_several_runs_make_one_figure(tmp_path: Path) -> None:
    dirs = [
        run_with(tmp_path / f"<seed>&{i}", [(0, 0.1 * i, 0.01), (10, None, 0.0), (20, 0.5, 0.01)])
        for i in range(3)
    ]
    flat = [value for point in validation_points(read_run(dirs[1])) for value in point]
    assert flat == pytest.approx([0, 0.1, 0.08, 0.12, 20, 0.5, 0.48, 0.52])
    out = tmp_path / "deep" / "fig.svg"
    assert main([*map(str, dirs), "--out", str(out), "--title", "Three seeds"]) == 0
    text = out.read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert len(root.findall(f"{SVG}g")) == 3
    assert "<seed>&2" in "".join(root.itertext())
    assert "<script" not in text


def test_one_point_and_equal_points_are_drawn() -> None:
    for points in ([(0, 0.0, 0.0, 0.0)], [(0, 0.3, 0.3, 0.3), (5, 0.3, 0.3, 0.3)]):
        assert "nan" not in draw([("r", points)], "t").lower()


def test_a_run_without_validation_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_with(tmp_path / "run", [])
    with pytest.raises(UserError, match="no validation yet"):
        write_figure([run_dir], tmp_path / "fig.svg")
    assert main([str(run_dir), "--out", str(tmp_path / "fig.svg")]) == 2
    assert "no validation yet" in capsys.readouterr().err
