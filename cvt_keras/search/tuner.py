"""Runs the trials, one after the other: each is a run of its own."""

import time

import keras

from cvt_keras import runs
from cvt_keras.errors import DifferentRunError, DivergedError, RecipeError, UserError
from cvt_keras.search import folder, oracles
from cvt_keras.search.oracles import TrialStatus, keras_tuner
from cvt_keras.training import run

IDLE_SECONDS = 1.0  # before the oracle is asked again, when it waits for others


class RecipeTuner(keras_tuner.Tuner):
    """Trains what an oracle asks for.

    Args:
        oracle: of `oracles.make`.
        candidates: what it may ask for.
        search_dir: where the trials' runs are written, in its folder `folder.TRIALS`.
        refresh: called after each trial.
        directory: where the oracle's folder lies, if not in `search_dir`.
    """

    def __init__(self, oracle, candidates, search_dir, refresh=lambda: None, directory=None):
        self.candidates, self.trials_dir, self._refresh = candidates, search_dir / folder.TRIALS, refresh
        self._pause = 0.0
        super().__init__(oracle, directory=str(directory or search_dir), project_name=folder.ORACLE)

    def run_trial(self, trial):
        """Trains a trial as a run, or resumes it. The test images are not touched.

        Returns:
            The run's history: a dict per epoch.

        Raises:
            What `cvt_keras.training.run` raises.
        """
        keras.backend.clear_session()  # of the trial before
        run_dir = self.trials_dir / trial.trial_id
        recipe = self.candidates.of(trial.hyperparameters.values)
        return run(recipe, run_dir, resume=(run_dir / runs.RECIPE).exists(), evaluate_test=False).history

    # === keras-tuner's methods ===

    def pre_create_trial(self):
        time.sleep(self._pause)
        self._pause = IDLE_SECONDS

    def _try_run_and_update_trial(self, trial):
        """Makes a failed trial of a candidate that can't be trained. After any other error the search has to be resumed."""
        try:
            history = self.run_trial(trial)
        except DifferentRunError as error:  # a worker's own disk, with the runs of an earlier search
            raise RecipeError(
                f"`search_dir` holds runs of a different search: {self.trials_dir}. {error.differences_text}",
                argument="search_dir",
                hint="Name another with --search-dir, or remove its trials",
            ) from error
        except (DivergedError, MemoryError, RecipeError) as error:
            if isinstance(error, RecipeError) and self.candidates.is_own(trial.hyperparameters.values):
                raise  # the fault is not a candidate's
            # The hint is for somebody who trains by hand.
            trial.message = error.summary if isinstance(error, UserError) else str(error)
            trial.status = TrialStatus.FAILED
            return
        for row in history:
            metrics = {oracles.OBJECTIVE: row["val_accuracy"], "seconds": row["seconds"]}
            self.oracle.update_trial(trial.trial_id, metrics, step=row["epoch"] - 1)  # as version 0.1 stored them
        trial.status = TrialStatus.COMPLETED

    def on_trial_end(self, trial):
        self.oracle.end_trial(trial)
        self._refresh()
        self.go_on()

    def go_on(self):
        """Asks for the next trial at once: this worker was not the one that waits."""
        self._pause = 0.0

    def save(self):
        """Does nothing: the oracle holds all that a search is resumed from."""

    def reload(self):
        """Does nothing: the oracle is opened before."""
