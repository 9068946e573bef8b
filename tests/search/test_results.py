import pytest

from cvt_keras import runs
from cvt_keras.search import results
from cvt_keras.search.oracles import TrialStatus


@pytest.fixture
def searched(make_oracle):
    """Makes an oracle with one failed trial and `completed` others, with accuracies from 50% on."""

    def search(completed, **settings):
        oracle = make_oracle(trials=10, **settings)
        for i in range(completed + 1):
            trial = oracle.create_trial("tuner")
            if i == 1 or completed == 0:
                trial.status, trial.message = TrialStatus.FAILED, "the loss is <NaN>"
            else:
                for epoch in (1, 2):
                    oracle.update_trial(trial.trial_id, {"val_accuracy": 0.25 * epoch + 0.01 * i, "seconds": 60.0}, step=epoch)
                trial.status = TrialStatus.COMPLETED
            oracle.end_trial(trial)
        return oracle

    return search


def _written(oracle, search_dir):
    results.write(oracle, search_dir, {"recipe": {"dataset": "digits"}, "algorithm": "random", "max_macs": None})
    return (search_dir / runs.PAGE).read_text()


def test_the_page_of_a_search(searched, tmp_path, no_pictures):
    page = _written(searched(4, max_macs=1_300_000), tmp_path)
    for part in (
        *("<title>Search: cvt_tiny on digits, random</title>", "<b>54.00%</b><span>best top-1, validation</span>"),
        *(
            "<b>50.00%</b><span>top-1 of the recipe itself</span>",
            "<b>4 of 10</b><span>trials completed</span>",
            "<b>1</b><span>trials failed</span>",
        ),
        *("<b>1.3 M</b><span>multiply-adds per image, maximum</span>", "<b>8.0 min</b><span>training in total</span>"),
        *(
            "Parallel coordinates",
            "Best trials",
            "shown once 8 trials are completed",
            "<td>failed: the loss is &lt;NaN&gt;</td>",
        ),
        f"<code>cvt-keras train --recipe-file {tmp_path / 'best.json'}</code>",
        "<td>peak_learning_rate</td><td>0.002</td>",  # the recipe's own, beside the best
    ):
        assert part in page, part
    assert page.count("data:image/png") == 2 and "trials are grey" not in page and "was not tried" not in page
    assert page.index("<td>54.00%</td>") < page.index("<td>50.00%</td>") < page.index("<td>failed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "oracle", "plots", "report.html", "trials.csv"]


def test_the_page_shows_importance_from_eight_trials_on(searched, tmp_path):
    page = _written(searched(8), tmp_path)
    assert page.count("data:image/png") == 3 and "out-of-bag R²" in page and "The other trials are grey" in page


def test_the_page_before_a_trial_is_completed(searched, tmp_path):
    page = _written(searched(0), tmp_path)
    assert "none yet" in page and "data:image/png" not in page and "--recipe-file" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["oracle", "report.html", "trials.csv"]
