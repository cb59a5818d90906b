"""Plots show what they are given."""

from util.metrics.plots import write_search


def test_the_heat_map_has_the_scales_across_and_temperatures_up(tmp_path):
    from matplotlib.figure import Figure

    from util.metrics.plots import heat_map

    rows = [
        {"cfg": c, "temperature": t, "frechet_inception_distance": 10 * c + t}
        for c in (1, 2, 3)
        for t in (0.5, 1)
    ]
    axes = Figure().subplots()
    heat_map(rows, "frechet_inception_distance", axes)
    assert axes.images[0].get_array().tolist() == [[10.5, 20.5, 30.5], [11, 21, 31]]
    write_search(rows, tmp_path)
    assert (tmp_path / "search.png").stat().st_size > 5000
