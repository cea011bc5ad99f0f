"""The exercises of all lessons, by name: "NN.what"."""

from lightlib.exercise_data import numbers, start_here
from lightlib.exercise_data.exercise import Exercise

EXERCISES: dict[str, Exercise] = start_here.EXERCISES | numbers.EXERCISES
