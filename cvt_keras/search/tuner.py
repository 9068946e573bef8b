"""Trains the trials one by one, each as a run with its own folder."""

import time

import keras

from cvt_keras import runs
from cvt_keras.errors import DifferentRunError, DivergedError, RecipeError, UserError
from cvt_keras.search import folder, oracles
from cvt_keras.search.oracles import TrialStatus, keras_tuner
from cvt_keras.training import run

IDLE_SECONDS = 1.0  # before asking the oracle again while it waits for other workers


class RecipeTuner(keras_tuner.Tuner):
    """Trains the trials of an oracle.

    Args:
        oracle: an oracle made by `oracles.make`.
        candidates: the oracle's `Candidates`.
        search_dir: the search's folder. The runs of the trials are written to its folder `folder.TRIALS`.
        refresh: called after each trial.
        directory: parent of the oracle's folder; `search_dir` by default.
    """

    def __init__(self, oracle, candidates, search_dir, refresh=lambda: None, directory=None):
        self.candidates, self.trials_dir, self._refresh = candidates, search_dir / folder.TRIALS, refresh
        self._pause = 0.0
        super().__init__(oracle, directory=str(directory or search_dir), project_name=folder.ORACLE)

    def run_trial(self, trial):
        """Trains a trial as a run, or resumes it. The test images are not used.

        Returns:
            The run's history: a dict per epoch.

        Raises:
            What `cvt_keras.training.run` raises.
        """
        keras.backend.clear_session()  # frees the network of the previous trial
        run_dir = self.trials_dir / trial.trial_id
        recipe = self.candidates.of(trial.hyperparameters.values)
        return run(recipe, run_dir, resume=(run_dir / runs.RECIPE).exists(), evaluate_test=False).history

    # === Overridden methods of keras-tuner ===

    def pre_create_trial(self):
        time.sleep(self._pause)
        self._pause = IDLE_SECONDS

    def _try_run_and_update_trial(self, trial):
        """Marks a trial as failed if its candidate can't be trained. Any other error stops the search, which can be resumed."""
        try:
            history = self.run_trial(trial)
        except DifferentRunError as error:  # on a worker's own disk: runs of an earlier search
            raise RecipeError(
                f"`search_dir` holds runs of a different search: {self.trials_dir}. {error.differences_text}",
                argument="search_dir",
                hint="Choose another folder with --search-dir, or remove its trials",
            ) from error
        except (DivergedError, MemoryError, RecipeError) as error:
            if isinstance(error, RecipeError) and self.candidates.is_own(trial.hyperparameters.values):
                raise  # the recipe is at fault, not the candidate
            # Without the hint, which applies to `cvt-keras train`.
            trial.message = error.summary if isinstance(error, UserError) else str(error)
            trial.status = TrialStatus.FAILED
            return
        for row in history:
            metrics = {oracles.OBJECTIVE: row["val_accuracy"], "seconds": row["seconds"]}
            self.oracle.update_trial(trial.trial_id, metrics, step=row["epoch"] - 1)  # from 0, as in version 0.1
        trial.status = TrialStatus.COMPLETED

    def on_trial_end(self, trial):
        self.oracle.end_trial(trial)
        self._refresh()
        self.skip_pause()

    def skip_pause(self):
        """Asks for the next trial without a pause: this worker was training, not waiting."""
        self._pause = 0.0

    def save(self):
        """Does nothing: the oracle stores all that a resumed search needs."""

    def reload(self):
        """Does nothing: the oracle reloads its own state."""
