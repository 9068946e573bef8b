"""keras-tuner's three algorithms, within a budget of MACs, and resumed after a kill as safely as a run is.

keras-tuner knows no budget and, killed at the wrong moment, repeats or loses a trial. No public method of it changes that: its
private ones are used here and in `distributed`, and nowhere else.
"""

import json
import re
import time
import warnings
from pathlib import Path

import numpy as np

from cvt_keras import runs
from cvt_keras.errors import MissingPackageError, RecipeError, RunError
from cvt_keras.search import space as spaces
from cvt_keras.training.recipes import Recipe
from cvt_keras.training.resume import same_weights

try:
    import keras_tuner
    from keras_tuner.engine.trial import Trial, TrialStatus
    from sklearn.exceptions import ConvergenceWarning
except ImportError as error:
    raise MissingPackageError(
        f"a search needs keras-tuner and scikit-learn: {error}", hint="Install them: pip install keras-tuner scikit-learn"
    ) from error

OBJECTIVE = "val_accuracy"
SETTINGS = "search"  # the name in each trial's values of what the search is, for a worker to compare
DRAWS = 1_000  # over the budget in a row: the next ones are shrunk until they are within it
SAMPLE_DRAWS = 10  # likewise, of the many that the Bayesian search chooses from
MOST_REFUSED = 2_000  # in a row, shrunk or not: then nothing can be trained
MOST_COLLISIONS = 20  # with what was tried, as keras-tuner has it: then the space is as good as used up
SAMPLES = 100  # of those within the budget that the Bayesian search chooses from, where its own choice is over it


def _hyperparameters(candidates, settings):
    found = keras_tuner.HyperParameters()
    for name, where in candidates.space.items():
        if isinstance(where, spaces.Choice):
            found.Choice(name, [where.kind(value) for value in where.values], ordered=where.kind is not str)
        else:
            found.Float(name, where.low, where.high, sampling="log" if where.log else "linear")
    found.Fixed(SETTINGS, json.dumps(settings, sort_keys=True))
    return found


def make(algorithm, candidates, trials, settings):
    """An oracle of keras-tuner.

    Args:
        algorithm: "hyperband", "bayesian" or "random".
        candidates: what it may try.
        trials: how many.
        settings: of the search, as JSON has them: every trial carries them.
    """
    given = {
        "objective": keras_tuner.Objective(OBJECTIVE, "max"),
        "hyperparameters": _hyperparameters(candidates, settings),
        "seed": candidates.recipe.seed + 1,  # keras-tuner takes 0 for none
    }
    if algorithm == "hyperband":
        # Round after round until the trials are used up.
        oracle = Hyperband(max_epochs=candidates.recipe.epochs, hyperband_iterations=None, **given)
    elif algorithm == "bayesian":
        # By default three for each dimension are random, which is all that most searches have.
        oracle = Bayesian(num_initial_points=max(3, trials // 3), **given)
    else:
        oracle = Random(**given)
    oracle.max_trials = trials
    oracle.candidates = candidates
    oracle.verbose = 0
    return oracle


class _Oracle:
    """What the three share, before keras-tuner's own class.

    Attributes:
        candidates: what may be tried.
        exhausted: why no trial can be had any more, or `None`.
        failing: whether that is because trials failed.
        hold: until when, by `time.monotonic`, what had begun before is kept for the workers that are still at it.
    """

    candidates = None
    exhausted = None
    failing = False
    hold = 0.0
    _why = None  # the last draw gave nothing

    def listener(self, trial):
        """Called with a trial as it begins and as it ends."""

    def open(self, folder):
        """Keeps its state in a folder, and goes on with what is there: what had begun and not ended comes first.

        Raises:
            RunError: if a file of it is broken.
        """
        self._set_project_dir(str(folder.parent), folder.name)
        if not (folder / "oracle.json").exists():
            return
        for part in (folder, *folder.glob("trial_*")):
            runs.remove_asides(part)
        try:
            self.reload()
        except (KeyError, OSError, TypeError, ValueError, RunError) as error:
            raise RunError(f"{folder} is damaged: {error}", hint="Start over with --fresh") from error
        # keras-tuner would also send a trial again that ended just before a kill.
        self._retry_queue = [name for name, trial in self.trials.items() if not is_over(trial)][::-1]

    def require_one(self):
        """Told before anything is tried.

        Raises:
            RecipeError: if no candidate is within the budget, or none can be trained.
        """
        candidates = self.candidates
        if candidates.own is not None and candidates.fits(candidates.own):
            return
        cost = candidates.macs({name: where.ends[0] for name, where in candidates.space.items()} | candidates.least)
        if cost is not None and candidates.max_macs is not None and cost > candidates.max_macs:
            raise RecipeError(
                f"`max_macs` leaves no network: the smallest of the space takes {cost:,} MACs an image. "
                f"Received: max_macs={candidates.max_macs:,}",
                argument="max_macs",
                hint=f"Give --max-macs {cost} or more",
            )
        state = self._seed_state
        if self._random_values() is None:
            raise RecipeError(f"`space` leaves nothing to try: {self._why}", argument="space")
        self._seed_state = state

    # === Workers that come and go ===

    @keras_tuner.synchronized
    def take_back(self, tuner_id):
        """Takes its trial from a worker that is gone; the next worker gets it.

        Returns:
            The trial's name, or `None` if it had none.
        """
        self.tuner_ids.discard(tuner_id)
        trial = self.ongoing_trials.pop(tuner_id, None)
        if trial is None:
            return None
        self._retry_queue.append(trial.trial_id)
        self.save()
        return trial.trial_id

    def give_back(self, trial_id, tuner_id):
        """Leaves a trial to the worker that is still at it, which a chief that was started again does not know.

        The caller holds keras-tuner's lock.

        Returns:
            Whether the trial is the worker's, and no other's.
        """
        if is_over(self.trials[trial_id]):
            return True  # as a rule the worker has just ended it
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
        """Whether the worker has the trial."""
        trial = self.ongoing_trials.get(tuner_id)
        return trial is not None and trial.trial_id == trial_id

    def awaits_workers(self):
        """Whether a worker has yet to end its trial, to fetch one, or to hear that there are no more."""
        return bool(self.ongoing_trials or self.tuner_ids or self._retry_queue)

    def is_done(self):
        """Whether all trials are over, and no more come."""
        no_more = len(self.trials) >= self.max_trials or self.exhausted
        return bool(no_more and self.trials and all(map(is_over, self.trials.values())))

    # === keras-tuner's methods ===

    def save(self):
        runs.write_json(Path(self._get_oracle_fname()), self.get_state())

    def _save_trial(self, trial):
        runs.write_json(Path(self._get_trial_dir(trial.trial_id)) / "trial.json", trial.get_state())

    def reload(self):
        """Without keras-tuner's search of the folder: a trial whose file alone was written was never handed out."""
        state = runs.read_json(Path(self._get_oracle_fname()))
        folder = Path(self._get_oracle_fname()).parent
        names = state["start_order"]
        self.trials = {name: Trial.from_state(runs.read_json(folder / f"trial_{name}" / "trial.json")) for name in names}
        self.set_state(state)
        self.ongoing_trials = {}

    def _random_values(self, draws=DRAWS):
        """As keras-tuner's, of a space without conditions, but within the budget.

        Uniform over what is within it, as long as that can be met by chance: after `draws` that were over it candidates are
        shrunk, of which more are just within it.
        """
        if not self.start_order and self.candidates.own is not None:
            values = {hp.name: hp.default for hp in self.hyperparameters.space} | self.candidates.own
            if self.candidates.fits(values):
                return values  # the recipe itself comes first, for the others to be seen beside it
        collisions = 0
        for refused in range(MOST_REFUSED):
            values = {}
            for hp in self.hyperparameters.space:
                values[hp.name] = hp.random_sample(self._seed_state)
                self._seed_state += 1
            values = self.candidates.settled(values)
            if refused >= draws and self.candidates.max_macs is not None:
                values = self.candidates.shrunk(values, self._seed_state)
            if not self.candidates.fits(values):
                continue
            if not self._duplicate(values):
                return values
            collisions += 1
            if collisions > MOST_COLLISIONS:
                self._why = "the space holds hardly any other candidate"
                return None
        size, over = self.candidates.recipe.image_size, ", or over the budget" if self.candidates.max_macs is not None else ""
        self._why = f"{MOST_REFUSED:,} candidates in a row were no networks for {size} pixels{over}"
        return None

    @keras_tuner.synchronized
    def create_trial(self, tuner_id):
        again = tuner_id in self.ongoing_trials
        if self._retry_queue and time.monotonic() < self.hold and not again:
            self.tuner_ids.add(tuner_id)
            return Trial(self.hyperparameters.copy(), trial_id="", status=TrialStatus.IDLE)
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.ongoing_trials:
            # Another worker may still be lost, and its trial be left over.
            self.tuner_ids.add(tuner_id)
            trial.status = TrialStatus.IDLE
        if trial.status == TrialStatus.RUNNING and not again:
            trial.metrics = type(trial.metrics)()  # of a worker that was lost on its way
            self.listener(trial)
        return trial

    @keras_tuner.synchronized
    def end_trial(self, trial):
        known = self.trials[trial.trial_id]
        if trial.trial_id in self.end_order:  # it was given to another worker too, who was faster
            self._release(trial)
            return
        trial.hyperparameters = known.hyperparameters
        super().end_trial(trial)
        self._release(trial)
        self.save()  # keras-tuner does so before the trial is off the list of those at work
        self.listener(known)

    def _release(self, trial):
        """Nobody is at it any more, nor is to be."""
        self.ongoing_trials = {who: other for who, other in self.ongoing_trials.items() if other.trial_id != trial.trial_id}
        self._retry_queue = [name for name in self._retry_queue if name != trial.trial_id]

    def _check_consecutive_failures(self):
        """Ends the search; keras-tuner's own raises, with its lock held for ever."""
        failed = [self.trials[name].status == TrialStatus.FAILED for name in self.end_order]
        over = len(self.end_order) >= self.max_trials
        if (
            not over
            and len(failed) >= self.max_consecutive_failed_trials
            and all(failed[-self.max_consecutive_failed_trials :])
        ):
            self.exhausted, self.failing = f"the last {self.max_consecutive_failed_trials} trials failed", True

    def populate_space(self, trial_id):
        if self.exhausted:
            return {"status": TrialStatus.STOPPED, "values": None}
        found = super().populate_space(trial_id)
        if found["status"] == TrialStatus.RUNNING and found["values"] is None:
            found["status"] = TrialStatus.STOPPED
        if found["status"] == TrialStatus.STOPPED:
            self.exhausted = self._why
        return found


class Random(_Oracle, keras_tuner.oracles.RandomSearchOracle):
    """Draws each value by itself."""


class Hyperband(_Oracle, keras_tuner.oracles.HyperbandOracle):
    """Trains many for few epochs, and the best of them anew for more."""


class Bayesian(_Oracle, keras_tuner.oracles.BayesianOptimizationOracle):
    """Chooses by a Gaussian process of what was seen so far."""

    def populate_space(self, trial_id):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of its length scales: with few trials the rule
            return super().populate_space(trial_id)

    def _vector_to_values(self, vector):
        values = self.candidates.settled(super()._vector_to_values(vector))
        if self.candidates.fits(values) and not self._duplicate(values):
            return values
        # What the process likes best is over the budget, or was tried: the best of a sample within it, by the same measure.
        sample = [found for found in (self._random_values(SAMPLE_DRAWS) for _ in range(SAMPLES)) if found]
        if not sample:
            return None
        points = np.array([[hp.value_to_prob(found[hp.name]) for hp in self._nonfixed_space()] for found in sample])
        mean, deviation = self.gpr.predict(points, return_std=True)
        return sample[int(np.argmin(mean - self.beta * deviation))]


def differences(stored, settings):
    """What two searches' settings differ in -> a text, empty if they are the same.

    Where images lie is no difference, nor where weights were moved to.
    """
    found = []
    for part in ("algorithm", "max_macs"):
        if stored.get(part) != settings.get(part):
            found.append(f"{part} was {stored.get(part)} and is {settings.get(part)}")
    for part in ("data", "recipe", "space"):
        # A field that a recipe lacks is newer than the search, and had its default.
        defaults = Recipe().settings() if part == "recipe" else {}
        was, is_now = stored[part], settings[part]
        for name in was | is_now:
            before, after = was.get(name, defaults.get(name)), is_now.get(name, defaults.get(name))
            if name == "data_dir" or before == after or (name == "weights" and same_weights(before, after)):
                continue
            shown = {"variant": "is another", "class names": "are others"}.get(name) or f"was {before!r} and is {after!r}"
            found.append(f"{name} {shown}{' in the space' if part == 'space' else ''}")
    return ", ".join(found)


def line(oracle, trial):
    """A trial that begins, or has ended, in a line."""
    place = f"trial {trial.trial_id} ({list(oracle.trials).index(trial.trial_id) + 1} of {oracle.max_trials})"
    if not is_over(trial):
        return f"\n{place}: {tried(oracle.candidates, trial)}"
    top = best(oracle)
    so_far = f"; the best so far: trial {top.trial_id}, {top.score:.2%}" if top else ""
    if trial.status == TrialStatus.FAILED:
        return f"{place}: failed{f' ({reason(trial)})' if trial.message else ''}{so_far}"
    return f"{place}: {trial.score:.2%} top-1 on the validation images in {seconds(trial):.0f} s{so_far}"


def tried(candidates, trial):
    """What a trial tries, in a line."""
    values = trial.hyperparameters.values
    shown = ", ".join(f"{name} {spaces.shown(values[name])}" for name in candidates.space)
    cost = candidates.macs(values)
    own = candidates.is_own(values)
    epochs = candidates.of(values).epochs
    told = [f"{cost / 1e6:,.1f} M MACs"] if cost is not None else []
    told.append(f"{epochs} epoch{'s' if epochs > 1 else ''}")
    if again := repeated(trial):
        told.append(f"trial {again} anew")
    return f"{'the recipe itself: ' if own else ''}{shown} ({', '.join(told)})"


def repeated(trial):
    """The trial of an earlier round of Hyperband that is trained anew for longer, or `None`."""
    return trial.hyperparameters.values.get("tuner/trial_id")


def order(accuracy, epochs):
    """Sorts the best first; of equals the longest trained."""
    return -accuracy, -epochs


def best(oracle):
    """The best trial by `order`, of equals the earliest; `None` before one is done."""
    done = [trial for trial in list(oracle.trials.values()) if trial.status == TrialStatus.COMPLETED]
    epochs = {trial.trial_id: oracle.candidates.of(trial.hyperparameters.values).epochs for trial in done}
    return min(done, key=lambda trial: order(trial.score, epochs[trial.trial_id]), default=None)


def is_over(trial):
    """Whether a trial is not to be run again."""
    return trial.status in (TrialStatus.COMPLETED, TrialStatus.FAILED)


def curve(trial):
    """Validation accuracy after each epoch of a trial -> a list."""
    return _series(trial, OBJECTIVE)


def seconds(trial):
    """What a trial's training took, with the validation after each epoch."""
    return sum(_series(trial, "seconds"))


def reason(trial):
    """The last line of what a failed trial left."""
    return re.sub(r"\s+", " ", (trial.message or "").strip().rpartition("\n")[2])


def _series(trial, name):
    if not trial.metrics.exists(name):
        return []
    return [observation.mean() for observation in sorted(trial.metrics.get_history(name), key=lambda seen: seen.step)]
