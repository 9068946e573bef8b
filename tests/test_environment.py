import os
import platform

import keras

from cvt_keras import environment


def test_versions_are_those_that_run():
    versions = environment.versions()
    assert versions["python"] == platform.python_version()
    assert versions["keras"] == keras.__version__


def test_cpu_counts_the_cores_of_this_process():
    name, _, cores = environment.cpu().rpartition(", ")
    assert name
    assert int(cores.split()[0]) <= os.cpu_count()
