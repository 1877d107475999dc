"""Algorithms that solve a `LearningProblem`.

`train` uses the methods of TAO with the gradients (4.3), (4.4), `train_levenberg_marquardt` a matrix of Gauss and Newton where
J is a sum of squares, `train_stochastic` stochastic gradients of mini-batches, `train_pam` proximal alternating minimisation
(Algorithm 1), and `msa` the method of successive approximations (Algorithm 2).
"""
