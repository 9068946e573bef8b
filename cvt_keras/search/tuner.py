"""What runs the trials, one after the other: each is a run of its own."""

import csv
import time

import keras

from cvt_keras import runs
from cvt_keras.errors import DifferentRunError, RecipeError
from cvt_keras.search import oracles
from cvt_keras.search.oracles import TrialStatus, keras_tuner
from cvt_keras.training import run

IDLE_SECONDS = 1.0  # before the oracle is asked again, when it waits for others


class RecipeTuner(keras_tuner.Tuner):
    """Trains what an oracle asks for.

    Args:
        oracle: of `oracles.make`.
        candidates: what it may ask for.
        search_dir: where the trials' runs are written, in its folder `TRIALS`.
        refresh: called after each trial.
        directory: where the oracle's folder lies, if not in `search_dir`.
    """

    def __init__(self, oracle, candidates, search_dir, refresh=lambda: None, directory=None):
        self.candidates, self.trials_dir, self._refresh = candidates, search_dir / oracles.TRIALS, refresh
        self._pause = 0.0
        super().__init__(oracle, directory=str(directory or search_dir), project_name=oracles.FOLDER)

    def run_trial(self, trial):
        """Trains a trial, or goes on with it, as a run; the test images are left alone.

        Returns:
            A list of `history.csv`'s rows, numbers as text.

        Raises:
            What `cvt_keras.training.run` raises.
        """
        keras.backend.clear_session()  # of the trial before
        run_dir = self.trials_dir / trial.trial_id
        recipe = self.candidates.of(trial.hyperparameters.values)
        run(recipe, run_dir, resume=(run_dir / runs.RECIPE).exists(), evaluate_test=False)
        with open(run_dir / runs.HISTORY, newline="") as file:
            return list(csv.DictReader(file))

    # === keras-tuner's methods ===

    def pre_create_trial(self):
        time.sleep(self._pause)
        self._pause = IDLE_SECONDS

    def _try_run_and_update_trial(self, trial):
        """A candidate that can't be trained is a failed trial. Anything else ends the search, and the trial is run again."""
        try:
            history = self.run_trial(trial)
        except DifferentRunError as error:  # a worker's own disk, with the runs of an earlier search
            way_out = "Name another folder, or remove its trials"
            raise RecipeError(f"`--search-dir` holds runs of a different search: {error.differences}. {way_out}") from error
        except (FloatingPointError, MemoryError, RecipeError) as error:
            if isinstance(error, RecipeError) and self.candidates.is_own(trial.hyperparameters.values):
                raise  # then it is none of a candidate's
            # What an exception of the training says after the colon is for one who trains by hand.
            said = str(error) if isinstance(error, RecipeError) else str(error).partition(": ")[0]
            trial.status, trial.message = TrialStatus.FAILED, said
            return
        for row in history:
            seen = {oracles.OBJECTIVE: float(row["val_accuracy"]), "seconds": float(row["seconds"])}
            self.oracle.update_trial(trial.trial_id, seen, step=int(row["epoch"]))
        trial.status = TrialStatus.COMPLETED

    def on_trial_end(self, trial):
        self.oracle.end_trial(trial)
        self._refresh()
        self.go_on()

    def go_on(self):
        """Asks for the next trial at once: this worker was not the one that waits."""
        self._pause = 0.0

    def save(self):
        """The oracle holds all there is to go on from."""

    def reload(self):
        """The same."""
