"""Imports TensorFlow, as big_vision's utilities do, and calls nothing of it."""

import tensorflow.io.gfile as gfile

files = gfile
