"""Flow-matching mathematics: schedules, training losses, step rules and sampling loops.

Nothing here knows a model: the velocity prediction is always a function argument.
"""
