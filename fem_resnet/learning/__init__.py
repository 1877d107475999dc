"""The learning problem (2.10), (2.11): heads, losses, regularisers, batches, and `LearningProblem`, which holds them all.

A `Head` is the output (2.9). Losses are `least_squares`, `cross_entropy` and their relatives; regularisers are `tikhonov`
(2.11), `smooth_in_space` and `smooth_in_time`. `hessian_spectrum` says which parameters the data determine.
"""
