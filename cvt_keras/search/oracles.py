"""Three algorithms of keras-tuner, within a budget of MACs and safe to resume after a kill.

keras-tuner has no budget and, killed at the wrong moment, repeats or loses a trial. Its public methods can't change that, so
this module and `distributed` use private ones. No other module does.
"""

import json
import re
import time
import warnings
from pathlib import Path

import numpy as np

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError, RecipeError, RunError
from cvt_keras.preprocessing import Preprocessing, size_text
from cvt_keras.search import space as spaces
from cvt_keras.training.recipes import Recipe
from cvt_keras.training.resume import same_weights
from cvt_keras.variants import get_variant

try:
    import keras_tuner
    from keras_tuner.engine.trial import Trial, TrialStatus
    from sklearn.exceptions import ConvergenceWarning
except ImportError as error:
    raise MissingPackageError(
        f"a search needs keras-tuner and scikit-learn: {error}", hint="Install them: pip install keras-tuner scikit-learn"
    ) from error

OBJECTIVE = "val_accuracy"
SETTINGS = "search"  # key of the search's settings in the values of each trial, which a worker compares with its own
DRAWS = 1_000  # refused in a row; further candidates are shrunk until they are within the budget
SAMPLE_DRAWS = 10  # the same, for each of the `SAMPLES`
MAX_REFUSED = 2_000  # in a row, shrunk or not, before the search gives up
MAX_DUPLICATES = 20  # keras-tuner's limit: after as many, the space counts as used up
SAMPLES = 100  # candidates within the budget to choose from if the Bayesian search proposes one over it


def _hyperparameters(candidates, settings):
    hyperparameters = keras_tuner.HyperParameters()
    for name, axis in candidates.space.items():
        if isinstance(axis, spaces.Choice):
            hyperparameters.Choice(name, [axis.kind(value) for value in axis.values], ordered=axis.kind is not str)
        else:
            hyperparameters.Float(name, axis.low, axis.high, sampling="log" if axis.log else "linear")
    hyperparameters.Fixed(SETTINGS, json.dumps(settings, sort_keys=True))
    return hyperparameters


def make(algorithm, candidates, trials, settings):
    """Makes an oracle of keras-tuner: it chooses the values of each trial.

    Args:
        algorithm: "hyperband", "bayesian" or "random".
        candidates: the `Candidates` to choose from.
        trials: maximum number of trials.
        settings: the settings of the search, a dict for JSON. They are stored with every trial.
    """
    common = {
        "objective": keras_tuner.Objective(OBJECTIVE, "max"),
        "hyperparameters": _hyperparameters(candidates, settings),
        "seed": candidates.recipe.seed + 1,  # keras-tuner takes 0 for no seed
    }
    if algorithm == "hyperband":
        # Unlimited iterations: `max_trials` ends the search.
        oracle = Hyperband(max_epochs=candidates.recipe.epochs, hyperband_iterations=None, **common)
    elif algorithm == "bayesian":
        # By default three trials per dimension are random. Most searches have no more than that.
        oracle = Bayesian(num_initial_points=max(3, trials // 3), **common)
    else:
        oracle = Random(**common)
    oracle.max_trials = trials
    oracle.candidates = candidates
    oracle.verbose = 0
    return oracle


class _Oracle:
    """Shared by the three oracles; overrides methods of keras-tuner's class, the second base.

    Attributes:
        candidates: the `Candidates` to choose from.
        exhausted: the reason why there are no more trials, or `None`.
        failing: whether that reason is failed trials.
        hold: until this time (`time.monotonic`) a resumed chief keeps unfinished trials for the workers that still train them.
    """

    candidates = None
    exhausted = None
    failing = False
    hold = 0.0
    _no_candidate = None  # the reason why the last draw found no candidate

    def listener(self, trial):
        """Called with each trial when it starts and when it ends."""

    def open(self, folder):
        """Stores the state in a folder, and resumes the state that is already there. Unfinished trials come first.

        Raises:
            RunError: if a file of the state is damaged.
        """
        self._set_project_dir(str(folder.parent), folder.name)
        if not (folder / "oracle.json").exists():
            return
        for part in (folder, *folder.glob("trial_*")):
            runs.remove_unfinished(part)
        try:
            self.reload()
        except (KeyError, OSError, TypeError, ValueError, RunError) as error:
            raise RunError(f"{folder} is damaged: {error}", hint="Start over with --fresh") from error
        # keras-tuner would also repeat a trial that ended just before a kill.
        self._retry_queue = [name for name, trial in self.trials.items() if not is_over(trial)][::-1]

    def require_one(self):
        """Raises unless there is a candidate to try.

        Raises:
            RecipeError: if no candidate is within the budget, or none is a valid network.
        """
        candidates = self.candidates
        if candidates.own is not None and candidates.fits(candidates.own):
            return
        cost = candidates.macs({name: axis.ends[0] for name, axis in candidates.space.items()} | candidates.smallest)
        if cost is not None and candidates.max_macs is not None and cost > candidates.max_macs:
            raise RecipeError(
                f"`max_macs` is too small: the smallest network of the space needs {cost:,} MACs per image. "
                f"Received: max_macs={candidates.max_macs:,}",
                argument="max_macs",
                hint=f"Use --max-macs {cost} or more",
            )
        state = self._seed_state
        if self._random_values() is None:
            raise RecipeError(f"`space` has no candidate to try: {self._no_candidate}", argument="space")
        self._seed_state = state

    # === Lost and returning workers ===

    @keras_tuner.synchronized
    def take_back(self, tuner_id):
        """Takes the trial of a lost worker back, for the next worker.

        Returns:
            The trial's id, or `None` if the worker had no trial.
        """
        self.tuner_ids.discard(tuner_id)
        trial = self.ongoing_trials.pop(tuner_id, None)
        if trial is None:
            return None
        self._retry_queue.append(trial.trial_id)
        self.save()
        return trial.trial_id

    def give_back(self, trial_id, tuner_id):
        """Gives a trial back to the worker that still trains it, which a restarted chief does not know.

        The caller must hold keras-tuner's lock.

        Returns:
            Whether the worker may go on: `False` if the trial went to another worker.
        """
        if is_over(self.trials[trial_id]):
            return True  # usually the worker has just ended it
        if self.runs_for(tuner_id, trial_id):
            return True
        if tuner_id in self.ongoing_trials or trial_id not in self._retry_queue:
            return False
        self._retry_queue.remove(trial_id)
        self.ongoing_trials[tuner_id] = self.trials[trial_id]
        self.tuner_ids.add(tuner_id)
        self.save()
        return True

    def runs_for(self, tuner_id, trial_id):
        """Whether the worker currently has the trial."""
        trial = self.ongoing_trials.get(tuner_id)
        return trial is not None and trial.trial_id == trial_id

    def awaits_workers(self):
        """Whether a worker still has to end its trial, fetch one, or be told that there are no more."""
        return bool(self.ongoing_trials or self.tuner_ids or self._retry_queue)

    def is_done(self):
        """Whether all trials are over and there will be no more."""
        no_more = len(self.trials) >= self.max_trials or self.exhausted
        return bool(no_more and self.trials and all(map(is_over, self.trials.values())))

    # === Overridden methods of keras-tuner ===

    def save(self):
        runs.write_json(Path(self._get_oracle_fname()), self.get_state())

    def _save_trial(self, trial):
        runs.write_json(Path(self._get_trial_dir(trial.trial_id)) / "trial.json", trial.get_state())

    def reload(self):
        """Reads only the trials in the state. keras-tuner reads every trial file, even of trials that were never handed out."""
        state = runs.read_json(Path(self._get_oracle_fname()))
        folder = Path(self._get_oracle_fname()).parent
        names = state["start_order"]
        self.trials = {name: Trial.from_state(runs.read_json(folder / f"trial_{name}" / "trial.json")) for name in names}
        self.set_state(state)
        self.ongoing_trials = {}

    def _random_values(self, draws=DRAWS):
        """Draws the values of a new candidate within the budget; the first is the recipe itself.

        The draw is uniform over the candidates within the budget. After `draws` refused ones in a row, candidates are shrunk
        instead, which favours those just within the budget.

        Returns:
            A dict of name -> value, or `None` if no new candidate was found.
        """
        if not self.start_order and self.candidates.own is not None:
            values = {hp.name: hp.default for hp in self.hyperparameters.space} | self.candidates.own
            if self.candidates.fits(values):
                return values
        duplicates = 0
        for refused in range(MAX_REFUSED):
            values = {}
            for hp in self.hyperparameters.space:
                values[hp.name] = hp.random_sample(self._seed_state)
                self._seed_state += 1
            values = self.candidates.canonical(values)
            if refused >= draws and self.candidates.max_macs is not None:
                values = self.candidates.shrunk(values, self._seed_state)
            if not self.candidates.fits(values):
                continue
            if not self._duplicate(values):
                return values
            duplicates += 1
            if duplicates > MAX_DUPLICATES:
                self._no_candidate = "almost every candidate of the space was tried"
                return None
        size = size_text(self.candidates.recipe.preprocessing.image_size)
        over_budget = ", or over the budget" if self.candidates.max_macs is not None else ""
        self._no_candidate = f"{MAX_REFUSED:,} candidates in a row were invalid for images of {size} pixels{over_budget}"
        return None

    @keras_tuner.synchronized
    def create_trial(self, tuner_id):
        again = tuner_id in self.ongoing_trials
        if self._retry_queue and time.monotonic() < self.hold and not again:
            self.tuner_ids.add(tuner_id)
            return Trial(self.hyperparameters.copy(), trial_id="", status=TrialStatus.IDLE)
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.ongoing_trials:
            # Another worker may still be lost, and its trial would need this one.
            self.tuner_ids.add(tuner_id)
            trial.status = TrialStatus.IDLE
        if trial.status == TrialStatus.RUNNING and not again:
            trial.metrics = type(trial.metrics)()  # discards the epochs of a lost worker
            self.listener(trial)
        return trial

    @keras_tuner.synchronized
    def end_trial(self, trial):
        known = self.trials[trial.trial_id]
        if trial.trial_id in self.end_order:  # another worker got it too, and was faster
            self._release(trial)
            return
        trial.hyperparameters = known.hyperparameters
        super().end_trial(trial)
        self._release(trial)
        self.save()  # keras-tuner saves before the trial is removed from `ongoing_trials`
        self.listener(known)

    def _release(self, trial):
        """Removes a trial from those that are training or waiting for a worker."""
        self.ongoing_trials = {
            tuner_id: other for tuner_id, other in self.ongoing_trials.items() if other.trial_id != trial.trial_id
        }
        self._retry_queue = [trial_id for trial_id in self._retry_queue if trial_id != trial.trial_id]

    def _check_consecutive_failures(self):
        """Ends the search after too many failures in a row. keras-tuner's method raises, and never releases its lock."""
        limit = self.max_consecutive_failed_trials
        failed = [self.trials[trial_id].status == TrialStatus.FAILED for trial_id in self.end_order]
        more_to_come = len(self.end_order) < self.max_trials
        if more_to_come and len(failed) >= limit and all(failed[-limit:]):
            self.exhausted, self.failing = f"the last {limit} trials failed", True

    def populate_space(self, trial_id):
        if self.exhausted:
            return {"status": TrialStatus.STOPPED, "values": None}
        response = super().populate_space(trial_id)
        if response["status"] == TrialStatus.RUNNING and response["values"] is None:
            response["status"] = TrialStatus.STOPPED
        if response["status"] == TrialStatus.STOPPED:
            self.exhausted = self._no_candidate
        return response


class Random(_Oracle, keras_tuner.oracles.RandomSearchOracle):
    """Draws each value independently."""


class Hyperband(_Oracle, keras_tuner.oracles.HyperbandOracle):
    """Trains many candidates for few epochs, and the best again from scratch for more."""


class Bayesian(_Oracle, keras_tuner.oracles.BayesianOptimizationOracle):
    """Chooses by a Gaussian process fitted to the trials so far."""

    def populate_space(self, trial_id):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # usual for the length scales with few trials
            return super().populate_space(trial_id)

    def _vector_to_values(self, vector):
        values = self.candidates.canonical(super()._vector_to_values(vector))
        if self.candidates.fits(values) and not self._duplicate(values):
            return values
        # The proposal is over the budget or was tried: choose from a sample within it, by the same acquisition function.
        sample = [drawn for drawn in (self._random_values(SAMPLE_DRAWS) for _ in range(SAMPLES)) if drawn]
        if not sample:
            return None
        points = np.array([[hp.value_to_prob(drawn[hp.name]) for hp in self._nonfixed_space()] for drawn in sample])
        mean, deviation = self.gpr.predict(points, return_std=True)
        return sample[int(np.argmin(mean - self.beta * deviation))]


def differences(stored, settings, phrase="{!r} in the search, now {!r}"):
    """Lists the differences between the settings of two searches as text; empty if there are none.

    The folder of the images does not count, nor the path of weights that were moved, nor whether broken files are skipped.

    Args:
        stored, settings: dicts of settings.
        phrase: the text about a value in each.
    """
    changes = []
    for part in ("algorithm", "max_macs"):
        if stored.get(part) != settings.get(part):
            changes.append(f"{part}: {phrase.format(stored.get(part), settings.get(part))}")
    for part in ("data", "recipe", "space"):
        # A field that is missing in the stored recipe is newer than the search: it had its default.
        defaults = Recipe().resized_like(Preprocessing()).settings() if part == "recipe" else {}
        old, new = stored[part], settings[part]
        for name in old | new:
            before, after = old.get(name, defaults.get(name)), new.get(name, defaults.get(name))
            if name in ("data_dir", "skip_broken") or before == after or (name == "weights" and same_weights(before, after)):
                continue
            if name == "variant" and _same_variant(before, after):
                continue
            change = {"variant": " differs", "class names": " differ"}.get(name) or f": {phrase.format(before, after)}"
            changes.append(f"{'space: ' if part == 'space' else ''}{name}{change}")
    return "; ".join(changes)


def _same_variant(stored, received):
    """Whether these are the same network, also if an older version wrote fewer fields of it."""
    try:
        return get_variant(stored) == get_variant(received)
    except (ValueError, TypeError):
        return False


def line(oracle, trial):
    """A line to print when a trial starts or ends."""
    place = f"trial {trial.trial_id} ({list(oracle.trials).index(trial.trial_id) + 1} of {oracle.max_trials})"
    if not is_over(trial):
        return f"\n{place}: {tried(oracle.candidates, trial)}"
    top = best(oracle)
    so_far = f"; best so far: trial {top.trial_id}, {top.score:.2%}" if top else ""
    if trial.status == TrialStatus.FAILED:
        return f"{place}: failed{f' ({reason(trial)})' if trial.message else ''}{so_far}"
    return f"{place}: {trial.score:.2%} top-1 on the validation images in {seconds(trial):.0f} s{so_far}"


def tried(candidates, trial):
    """The values of a trial, its MACs and its epochs in one line."""
    values = trial.hyperparameters.values
    shown = ", ".join(f"{name} {spaces.shown(values[name])}" for name in candidates.space)
    cost = candidates.macs(values)
    own = candidates.is_own(values)
    epochs = candidates.of(values).epochs
    notes = [f"{cost / 1e6:,.1f} M MACs"] if cost is not None else []
    notes.append(f"{epochs} epoch{'s' if epochs > 1 else ''}")
    if earlier := repeated(trial):
        notes.append(f"trial {earlier} again from scratch")
    return f"{'the recipe itself: ' if own else ''}{shown} ({', '.join(notes)})"


def repeated(trial):
    """The id of the trial of an earlier Hyperband round that this one repeats for longer, or `None`."""
    return trial.hyperparameters.values.get("tuner/trial_id")


def order(accuracy, epochs):
    """The sort key of a trial, lower is better: by accuracy, then by the number of epochs."""
    return -accuracy, -epochs


def best(oracle):
    """The best trial by `order`, then the earliest; `None` until one is completed."""
    done = [trial for trial in list(oracle.trials.values()) if trial.status == TrialStatus.COMPLETED]
    epochs = {trial.trial_id: oracle.candidates.of(trial.hyperparameters.values).epochs for trial in done}
    return min(done, key=lambda trial: order(trial.score, epochs[trial.trial_id]), default=None)


def is_over(trial):
    """Whether a trial has ended, completed or failed."""
    return trial.status in (TrialStatus.COMPLETED, TrialStatus.FAILED)


def curve(trial):
    """A list of the validation accuracy after each epoch."""
    return _series(trial, OBJECTIVE)


def seconds(trial):
    """Seconds of a trial's training, including validation after each epoch."""
    return sum(_series(trial, "seconds"))


def reason(trial):
    """The last line of a failed trial's error message."""
    return re.sub(r"\s+", " ", (trial.message or "").strip().rpartition("\n")[2])


def _series(trial, name):
    if not trial.metrics.exists(name):
        return []
    observations = sorted(trial.metrics.get_history(name), key=lambda observation: observation.step)
    return [observation.mean() for observation in observations]
