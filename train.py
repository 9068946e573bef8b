"""Trains a network: flags in, one call of `cvt_keras.training.run`. See python train.py --help."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # before TensorFlow is imported: its notes would break the progress bar

try:
    from cvt_keras import runs, signals
    from cvt_keras.data.sources import DataError
    from cvt_keras.pretrained import CheckpointError
    from cvt_keras.training import RecipeError, flags, run
except (ImportError, ValueError) as error:  # ValueError: a KERAS_BACKEND that there is not
    sys.exit(f"train.py: {error}. Is all of requirements.txt installed, and KERAS_BACKEND unset?")
except KeyboardInterrupt:
    sys.exit(130)

PROGRAM = "python train.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(flags.RecipeFlags):
    """All flags."""

    run_dir: Path | None = None
    """Where the run is written; without it runs/<recipe>-<dataset>-<variant>."""
    resume: bool = False
    """Go on with the run in the run folder, after its last finished epoch."""


def parse(argv):
    """`[RECIPE] [flags]` -> `Arguments` with a run folder.

    Raises:
        RecipeError: for an unknown recipe or a value that no run can have.
        SystemExit: for flags that tyro refuses, with 2, and for --help.
    """
    name, arguments = flags.parse(argv, Arguments, PROGRAM, "Trains a network.")
    recipe = arguments.recipe
    folder = f"{name}-{recipe.dataset}-{recipe.variant_name}".replace(":", "-").replace("/", "-")
    return dataclasses.replace(arguments, run_dir=arguments.run_dir or Path("runs") / folder)


def main(argv, command=("python", "train.py")):
    """Runs the command line -> its exit code.

    Args:
        argv: the flags.
        command: what was typed before them.
    """
    resuming = shlex.join([*command, *argv, *([] if "--resume" in argv else ["--resume"])])
    signals.raise_on_sigterm()
    try:
        arguments = parse(argv)
        report = run(arguments.recipe, arguments.run_dir, resume=arguments.resume)
    except (RecipeError, FileExistsError) as error:
        return _fail(error, 2)
    except CheckpointError as error:
        head, *faults = str(error).splitlines()
        if not faults:
            return _fail(error, 1)
        recipe = arguments.recipe
        variant = ["--variant", recipe.variant] if isinstance(recipe.variant, str) else []
        everything = shlex.join([sys.executable, "-m", "cvt_keras.pretrained", recipe.weights, "all.keras", *variant])
        return _fail(f"{head.rstrip(':')}. The first: {faults[0].strip()}. All of them are told by {everything}", 1)
    except (DataError, runs.RunError, FloatingPointError, MemoryError) as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(f"{error}; finished epochs are kept. To go on once that is mended: {resuming}", 1)
    except KeyboardInterrupt as stop:
        return _fail(f"stopped; finished epochs are kept. To go on: {resuming}", signals.exit_code(stop))
    split = "test" if report.test else "validation"  # a run from Python may leave the test images alone
    found = getattr(report, split)
    print(f"{found['top1']:.2%} top-1 on {found['images']} {split} images; the run is in {arguments.run_dir}")
    return 0


def _fail(message, code):
    print(f"\ntrain.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(given, sys.orig_argv[: len(sys.orig_argv) - len(given)]))
