"""Algorithms that solve a `LearningProblem`.

`train` uses the methods of TAO with the gradients (4.3), (4.4), `train_stochastic` stochastic gradients of mini-batches,
`train_pam` proximal alternating minimisation (Algorithm 1), and `msa` the method of successive approximations (Algorithm 2).
"""
