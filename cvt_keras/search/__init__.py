"""python -m cvt_keras.search: tries recipes by keras-tuner, within a budget, on one machine or several."""
